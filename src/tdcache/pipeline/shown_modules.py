"""Showing a module in a model's tree under a path beside one that is there, until the handle is removed."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdcache.errors import ContextError
from tdcache.function_calls.sites import CallSite, is_call
from tdcache.hooks import MultiHookHandle, bracket
from tdcache.paths import join, resolve

__all__ = ["Planted", "plant", "shown_path"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def shown_path(path: str) -> str:
    """What a site is called among modules: ``"layers.3::gelu"`` is ``"layers.3.gelu"``."""
    if not is_call(path):
        return path
    site = CallSite.parse(path)
    return join(site.path, site.label)


class Planted:
    """A module under a name in another module's children; ``remove()`` takes it out."""

    def __init__(self, holder: nn.Module, name: str, module: nn.Module) -> None:
        self.holder = holder
        self.name = name
        self.module = module
        self.show()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def show(self, *_: Any) -> None:
        """Put it at the end of the children."""
        self.holder._modules[self.name] = self.module

    def hide(self, *_: Any) -> None:
        """Take it out of the children, if it is there."""
        if self.holder._modules.get(self.name) is self.module:
            del self.holder._modules[self.name]

    remove = mute = hide
    unmute = show


def plant(model: nn.Module, path: str, module: nn.Module, suffix: str, handle: MultiHookHandle) -> None:
    """Show ``module`` at ``shown_path(path) + suffix`` in ``named_modules()``; ``handle`` takes it out again.

    It is put among the children of the parent, at their end; for a call, among those of the module that makes it.
    Containers (``ModuleList``, ``ModuleDict``, ``Sequential``) are iterated over by whoever runs them, and a child more
    would run as well: there it is put, under a name with dots, into the nearest ancestor that is none; where all are
    containers, it is hidden while the outermost one runs.

    Raises:
        ContextError: there is a module of that path.
    """
    ancestors = _ancestors(model, path)
    path = shown_path(path)
    if _lineage(ancestors[0][1], path + suffix, "") is not None:
        raise ContextError(f"there is a module {path + suffix!r} already; give one of the two splices another name=")
    open_ones = [(prefix, each) for prefix, each in ancestors if not isinstance(each, _CONTAINERS)]
    prefix, holder = open_ones[-1] if open_ones else ancestors[0]
    planted = Planted(holder, (path + suffix)[len(prefix) :], module)
    handle.add(planted)
    if not open_ones:
        bracket(holder, planted.hide, planted.show, handle)


def _ancestors(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules above ``path``, outermost first, each with the prefix that the names of its children have."""
    if is_call(path):
        host = CallSite.parse(path).path
        return [*_ancestors(model, host), (f"{host}.", resolve(model, host))] if host else [("", model)]
    for base in model.modules():  # the names of a wrapped model begin below the wrapper
        found = _lineage(base, path, "")
        if found is not None:
            return found
    return [("", model)]


def _lineage(module: nn.Module, path: str, prefix: str) -> list[tuple[str, nn.Module]] | None:
    rest = path[len(prefix) :]
    for name, child in module._modules.items():
        if rest == name:
            return [(prefix, module)]
        if child is not None and rest.startswith(name + "."):
            below = _lineage(child, path, f"{prefix}{name}.")
            if below is not None:
                return [(prefix, module), *below]
    return None
