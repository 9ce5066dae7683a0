"""``__all__`` is sorted, true and complete, in every public module that has one and in the package itself."""

import ast
import importlib
import inspect
from types import ModuleType

import pytest

from architecture.source_tree import PACKAGE, Source, imports_of, package_sources


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def export_faults(module: ModuleType, expected: set[str]) -> list[str]:
    """One sentence for each thing wrong with the module's ``__all__``; none where it has no ``__all__``."""
    names = getattr(module, "__all__", None)
    if names is None:
        return []
    absent = [name for name in names if not hasattr(module, name)]
    faults = [f"{module.__name__}.__all__ names {name!r}, which does not exist" for name in absent]
    if list(names) != sorted(set(names)):
        faults.append(f"{module.__name__}.__all__ is not sorted(), or names something twice")
    missing = sorted(expected - set(names))
    return faults + [f"{module.__name__}.__all__ leaves out {name!r}" for name in missing]


def defined_in(module: ModuleType) -> set[str]:
    """Public classes and functions whose home is this very module."""
    members = inspect.getmembers(module, lambda each: inspect.isclass(each) or inspect.isfunction(each))
    return {name for name, each in members if is_public(name) and each.__module__ == module.__name__}


def gathered_by(source: Source) -> set[str]:
    """Public names that an ``__init__`` imports, when loaded, from the package's own modules with ``from``."""
    froms = {node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.ImportFrom)}
    own = [each for each in imports_of(source) if each.line in froms and each.when_loaded and each.at_run_time]
    # public_names answers for names that are not exported; that is no export.
    names = {
        each.name.rpartition(".")[2]
        for each in own
        if each.name.split(".")[0] == PACKAGE and "public_names" not in each.name
    }
    return {name for name in names if is_public(name)}


def faults_of(source: Source) -> list[str]:
    module = importlib.import_module(source.module)
    return export_faults(module, defined_in(module) | (gathered_by(source) if source.is_package else set()))


def public_sources() -> list[Source]:
    return [source for source in package_sources() if is_public(source.module)]


def test_every_list_of_exports_is_sorted_true_and_complete():
    assert [line for source in public_sources() for line in faults_of(source)] == []


def test_the_package_lists_what_it_exports():
    assert isinstance(importlib.import_module(PACKAGE).__all__, list)


@pytest.fixture
def module():
    made = ModuleType("tdcache.made")
    made.alpha, made.beta = 1, 2
    return made


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["beta", "alpha"], "is not sorted()"),
        (["alpha", "alpha", "beta"], "names something twice"),
        (["alpha", "beta", "gamma"], "'gamma', which does not exist"),
        (["alpha"], "leaves out 'beta'"),
    ],
)
def test_the_check_catches(module, names, complaint):
    module.__all__ = names
    (sentence,) = export_faults(module, {"alpha", "beta"})
    assert complaint in sentence


def test_the_check_lets_pass(module):
    assert export_faults(module, {"alpha"}) == []
    module.__all__ = ["alpha", "beta"]
    assert export_faults(module, {"alpha"}) == []


def test_names_gathered_by_a_package_are_those_imported_when_it_is_loaded():
    text = "from tdcache.errors import A, _b\nfrom torch import nn\nimport tdcache.cache\nfrom .store import C"
    assert gathered_by(Source("tdcache", text, is_package=True)) == {"A", "C"}
