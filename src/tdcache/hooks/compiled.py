"""Compiled models: a graph that was traced before the hooks came skips them, so inside a context it is not used.

``torch.compile`` does not guard on hooks (``skip_nnmodule_hook_guards``, pytorch#117758). Hooks that are there when a
model is first traced become part of its graph; hooks that come later are silently never called.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tdcache.introspect import compiled_modules, has_stale_graph, is_optimized_module

__all__ = ["eager_where_stale"]


_FORWARD, _COMPILED_CALL = "forward", "_compiled_call_impl"


@dataclass(slots=True)
class _Suspended:
    """What a module had before the first of the contexts that suspend it came, and how many those are."""

    original: Any
    count: int = 0


# The contexts on one model may be left in any order: the last one to leave restores.
_suspended: WeakKeyDictionary[nn.Module, _Suspended] = WeakKeyDictionary()


def eager_where_stale(model: nn.Module, undo: ExitStack) -> bool:
    """Let ``model`` run eagerly until ``undo`` closes, if it was traced before; says whether it was.

    A module of torch.nn's own classes that was compiled in place never makes a graph (its frames are skipped), but
    would have every hook compiled by itself: it runs eagerly in any case.
    """
    stale = has_stale_graph(model)
    if stale and is_optimized_module(model):
        _suspend(model, _FORWARD, model.get_submodule("_orig_mod").__call__, undo)
    compiled = compiled_modules(model) if stale or model._compiled_call_impl is not None else []
    before = [module for module in model.modules() if module in _suspended] if _suspended else []
    for module in (*before, *compiled):
        if not is_optimized_module(module) and (stale or module in _suspended or _is_torchs_own(module)):
            _suspend(module, _COMPILED_CALL, None, undo)
    return stale


def _is_torchs_own(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn.")


def _suspend(module: nn.Module, name: str, instead: Any, undo: ExitStack) -> None:
    suspended = _suspended.setdefault(module, _Suspended(module.__dict__.get(name)))
    suspended.count += 1
    module.__dict__[name] = instead
    undo.callback(_resume, module, name)


def _resume(module: nn.Module, name: str) -> None:
    suspended = _suspended[module]
    suspended.count -= 1
    if not suspended.count:
        module.__dict__[name] = suspended.original
        del _suspended[module]
