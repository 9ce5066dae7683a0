"""Inside the store imports go one way, also those that only annotations need."""

from graphlib import TopologicalSorter

from architecture.source_tree import Source, imports_of, package_sources


def test_no_file_of_the_store_imports_one_that_imports_it():
    sources = [source for source in package_sources() if source.module.startswith("tdcache.store.")]
    assert len(sources) > 15
    graph = {name: _modules(targets, sources) for name, targets in _all_imports(sources).items()}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("tdcache.store.files") < order.index("tdcache.store.reader")
    assert order.index("tdcache.store.reader") < order.index("tdcache.store.dataset")


def _all_imports(sources):
    return {source.module: {each.name for each in imports_of(source)} for source in sources}


def _modules(targets, sources):
    """The modules among the names that are imported, which may be those of things inside of modules."""
    names = {source.module for source in sources}
    return {name for name in names for target in targets if target == name or target.startswith(f"{name}.")}


def test_the_check_catches_a_circle_in_annotations():
    sources = [
        Source("tdcache.store.one", "if TYPE_CHECKING:\n    from tdcache.store.two import Two"),
        Source("tdcache.store.two", "def late():\n    from tdcache.store.one import One"),
    ]
    graph = {name: _modules(targets, sources) for name, targets in _all_imports(sources).items()}
    assert graph == {"tdcache.store.one": {"tdcache.store.two"}, "tdcache.store.two": {"tdcache.store.one"}}
