"""Imports inside the package point downward only; the floors are those of docs/architecture.md."""

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import pytest

from architecture.source_tree import PACKAGE, Source, imports_of, package_sources

FLOORS = (
    ("errors", "public_names", "types"),
    (
        *(
            "arguments",
            "inplace",
            "masks",
            "named_models",
            "named_places",
            "named_proof",
            "named_roles",
            "named_rows",
            "named_streams",
        ),
        *("named_selection", "norms", "options", "paths", "regions", "selection", "tables", "tokens"),
    ),
    ("current_call", "function_calls", "hooks", "introspect", "place_modules", "sequences", "steps", "transforms"),
    ("reducers", "cache", "store"),
    ("modules", "contexts", "points"),
    ("caching", "naming", "pipeline", "interventions", "attribution", "residual"),
    ("harvesting",),
    ("compat", "inspect", "plot", "cli", "__main__"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# Who may import a neighbour on the same floor. Floor 5 has no entry: no method family imports another.
NEIGHBOURS = {
    ("types", "errors"),
    ("named_models", "paths"),
    ("named_places", "named_models"),
    ("named_places", "named_proof"),
    ("named_places", "named_streams"),
    ("named_proof", "tables"),
    ("named_places", "named_roles"),
    ("options", "paths"),
    ("named_places", "named_rows"),
    ("named_places", "paths"),
    ("named_places", "tables"),
    ("named_selection", "named_places"),
    ("named_selection", "paths"),
    ("named_selection", "selection"),
    ("place_modules", "current_call"),
    ("place_modules", "function_calls"),
    ("place_modules", "hooks"),
    ("selection", "paths"),
    ("selection", "tables"),
    ("hooks", "introspect"),
    ("steps", "introspect"),
    ("function_calls", "hooks"),
    ("function_calls", "introspect"),
    ("current_call", "hooks"),
    ("current_call", "introspect"),
    ("current_call", "sequences"),
    ("current_call", "steps"),
    ("cache", "reducers"),
    ("contexts", "modules"),
    ("cli", "inspect"),
    ("cli", "plot"),
    ("__main__", "cli"),
}

# Packages whose front door also gives names of what stands on them: looked up when asked for, never on import. And
# modules that are nothing but an earlier import path of what stands on their package.
FRONT_DOORS = {
    ("tdcache.harvesting", "compat"),
    ("tdcache.harvesting.memory", "compat"),
    ("tdcache.harvesting.saved", "compat"),
}


def upward_imports(source: Source) -> list[str]:
    """One sentence for each import of the file that the layer table forbids."""
    if source.module == PACKAGE:
        return []  # the front door gathers names from every floor
    if source.top_level not in FLOOR_OF:
        return [f"{source.module} is on no floor: add {source.top_level!r} to FLOORS in tests/architecture"]
    found = [(each, each.name.split(".")) for each in imports_of(source)]
    inner = [(each, parts[1] if len(parts) > 1 else "") for each, parts in found if parts[0] == PACKAGE]
    return [
        f"{source.module}:{each.line} imports {each.name}: {reason}"
        for each, target in inner
        if (source.module, target) not in FRONT_DOORS
        if (reason := _forbidden(source.top_level, target))
    ]


def _forbidden(importer: str, target: str) -> str:
    if target not in FLOOR_OF:
        return f"{target!r} is on no floor; import from the module that defines the name, or add it to FLOORS"
    if target == importer or (importer, target) in NEIGHBOURS:
        return ""
    if FLOOR_OF[target] < FLOOR_OF[importer]:
        return ""
    return f"floor {FLOOR_OF[importer]} may not reach floor {FLOOR_OF[target]}"


def circles(sources: Iterable[Source]) -> set[tuple[str, ...]]:
    """The files that import each other in a circle, imports for typing and inside functions included."""
    by_name = {source.module: source for source in sources}
    graph = {name: set(_targets(source, by_name)) for name, source in by_name.items() if name != PACKAGE}
    found: set[tuple[str, ...]] = set()
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            found.add(tuple(sorted(set(circle))))
            graph[circle[1]].discard(circle[0])  # look for the next one without this import
        else:
            return found


def _targets(source: Source, by_name: dict[str, Source]) -> Iterable[str]:
    for each in imports_of(source):
        name = each.name
        while name and name not in by_name:
            name = name.rpartition(".")[0]
        if name not in ("", PACKAGE, source.module):
            yield name


def test_no_file_imports_another_in_a_circle():
    assert circles(package_sources()) == set()


@pytest.mark.parametrize(
    "text",
    [
        "from tdcache.store.files import save",
        "from .files import save",
        "if TYPE_CHECKING:\n    from tdcache.store.files import save",
        "def late():\n    from tdcache.store import files",
        "import tdcache.store.files",
    ],
)
def test_the_search_for_circles_finds_one(text):
    pair = [Source("tdcache.store.layout", text), Source("tdcache.store.files", "from tdcache.store.layout import x")]
    assert circles(pair) == {("tdcache.store.files", "tdcache.store.layout")}
    assert circles([pair[0], Source("tdcache.store.files", "import torch")]) == set()


def test_the_search_finds_circles_of_three_and_through_the_package_itself():
    three = [Source(f"tdcache.store.{a}", f"from tdcache.store.{b} import x") for a, b in ("ab", "bc", "ca")]
    assert circles(three) == {("tdcache.store.a", "tdcache.store.b", "tdcache.store.c")}
    through = [
        Source("tdcache.store", "from tdcache.store.a import x", is_package=True),
        Source("tdcache.store.a", "from tdcache.store import x"),
    ]
    assert circles(through) == {("tdcache.store", "tdcache.store.a")}


def test_every_import_points_downward():
    assert [line for source in package_sources() for line in upward_imports(source)] == []


def test_the_package_is_where_these_tests_look():
    assert PACKAGE in {source.module for source in package_sources()}


def test_neighbours_stand_on_one_floor_and_form_no_circle():
    assert [pair for pair in NEIGHBOURS if FLOOR_OF[pair[0]] != FLOOR_OF[pair[1]]] == []
    graph = {importer: {target for each, target in NEIGHBOURS if each == importer} for importer, _ in NEIGHBOURS}
    assert set(TopologicalSorter(graph).static_order()) == {name for pair in NEIGHBOURS for name in pair}


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("tdcache.errors", "import tdcache.caching", "floor 0 may not reach floor 5"),
        ("tdcache.errors", "from tdcache.types import Value", "floor 0 may not reach floor 0"),
        ("tdcache.hooks", "from tdcache import cache", "floor 2 may not reach floor 3"),
        ("tdcache.hooks", "from .contexts import HookingContext", "floor 2 may not reach floor 4"),
        ("tdcache.store.files", "from ..contexts import HookingContext", "floor 3 may not reach floor 4"),
        ("tdcache.attribution.saliency", "from tdcache.interventions import patch", "floor 5 may not reach floor 5"),
        ("tdcache.cache", "def late():\n    from tdcache.caching import x", "floor 3 may not reach floor 5"),
        ("tdcache.cache", "if TYPE_CHECKING:\n    from tdcache.caching import x", "floor 3 may not reach floor 5"),
        ("tdcache.cache", "importlib.import_module('tdcache.cli')", "floor 3 may not reach floor 7"),
        ("tdcache.cache", "from tdcache import select", "'select' is on no floor"),
        ("tdcache.cache", "import tdcache", "'' is on no floor"),
        ("tdcache.helpers", "", "add 'helpers' to FLOORS"),
    ],
)
def test_the_check_catches(module, text, complaint):
    (sentence,) = upward_imports(Source(module, text))
    assert complaint in sentence


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("tdcache.caching", "from tdcache.errors import SelectionError\nfrom tdcache import cache"),
        ("tdcache.selection", "from tdcache.paths import resolve"),
        ("tdcache.store.files", "from .layout import Layout\nfrom tdcache.store import layout"),
        ("tdcache.errors", "import torch\nfrom collections import abc"),
        ("tdcache", "from tdcache.cli import main"),
    ],
)
def test_the_check_lets_pass(module, text):
    assert upward_imports(Source(module, text)) == []


def test_relative_imports_of_a_package_start_at_the_package():
    assert upward_imports(Source("tdcache.store", "from .files import save", is_package=True)) == []
    (sentence,) = upward_imports(Source("tdcache.store", "from ..contexts import x", is_package=True))
    assert "floor 3 may not reach floor 4" in sentence
