"""A pytest plugin that puts tdcache's hook points into TransformerLens before any of its modules has taken its own.

Its modules import the classes by name, so exchanging them afterwards would come too late: each of the two modules that
define them gets ours as soon as it has run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import pytest

from tdcache import points

OURS = {
    "transformer_lens.hook_points": ("HookPoint", "LensHandle"),
    "transformer_lens.HookedRootModule": ("HookedRootModule",),
}


class Exchanging(MetaPathFinder):
    """Finds the modules of :data:`OURS` where they are, and exchanges their classes when they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec, whose loader then exchanges the classes; None for any other module."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in OURS else None
        if spec is not None and spec.loader is not None:
            spec.loader = Exchanged(spec.loader)
        return spec


class Exchanged:
    """A loader that goes by another one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and give it our classes."""
        self._loader.exec_module(module)
        for name in OURS[module.__name__]:
            setattr(module, name, getattr(points, name))


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before anything of TransformerLens is imported."""
    if any(name in sys.modules for name in OURS):
        raise RuntimeError("transformer_lens was imported already, so its hook points cannot be exchanged")
    sys.meta_path.insert(0, Exchanging())
