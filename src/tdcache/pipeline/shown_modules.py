"""Adds a module to a model's tree, next to an existing one, until the handle is removed.

Selectors, captures and edits all work by path; so for a splice's latents to be ordinary sites they need a path in
``named_modules()``, although no forward of the model calls them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tdcache.errors import ContextError
from tdcache.function_calls.sites import CallSite, is_call
from tdcache.hooks import MultiHookHandle, bracket
from tdcache.hooks.transient import Transient
from tdcache.paths import join, resolve

__all__ = ["Planted", "plant", "shown_path"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def shown_path(path: str) -> str:
    """What a site is called among modules: ``"layers.3::gelu"`` is ``"layers.3.gelu"``."""
    if not is_call(path):
        return path
    site = CallSite.parse(path)
    return join(site.path, site.label)


class Planted(Transient):
    """A module that was added to another module's children; ``remove()`` takes it out."""

    def __init__(self, holder: nn.Module, name: str, module: nn.Module) -> None:
        self.holder = holder
        self.name = name
        self.module = module
        self.show()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def show(self, *_: Any) -> None:
        """Add it at the end of the children."""
        self.holder._modules[self.name] = self.module

    def hide(self, *_: Any) -> None:
        """Remove it from the children, if it is there."""
        if self.holder._modules.get(self.name) is self.module:
            del self.holder._modules[self.name]

    remove = mute = hide
    unmute = show


def plant(model: nn.Module, path: str, module: nn.Module, suffix: str, handle: MultiHookHandle) -> None:
    """Make ``module`` appear at ``shown_path(path) + suffix`` in ``named_modules()``, until ``handle`` is removed.

    It becomes the last child of the parent or, for a function call, of the module that makes the call. Code that
    iterates over a container (``ModuleList``, ``ModuleDict``, ``Sequential``) would run an additional child, so in that
    case it becomes, under a name with dots, a child of the nearest ancestor that is not a container; if all are
    containers, it is hidden while the outermost one runs.

    Raises:
        ContextError: there is a module at that path already.
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
    """The modules above ``path``, outermost first, each with the prefix of its children's names."""
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
