"""Compiled models: the one place that keeps graphs of ``torch.compile`` from running.

``torch.compile`` does not guard on hooks (``skip_nnmodule_hook_guards``, pytorch#117758). Hooks that exist when a model
is first traced become part of its graph; hooks that are added later are silently never called. Hooks that a graph
cannot run faithfully (gradients, reducers, edits that depend on values) must not be traced either.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from operator import itemgetter
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from tdcache.errors import ContextError, TdcacheWarning, warn_user
from tdcache.introspect import has_stale_graph, is_compiled, may_be_compiled, scripted_ancestor, uncompiled

__all__ = ["refuse_scripted", "running_eagerly"]


def running_eagerly(
    model: nn.Module, *, fits_graph: bool = False, noticed: bool = False, tell: bool = False
) -> AbstractContextManager[None, None]:
    """Make ``model`` run eagerly inside the block if its compiled graphs would ignore its hooks.

    All compiled code runs eagerly meanwhile, in all threads, since any compiled function may contain the model. Nothing
    changes for a model that is part of no graph.

    Args:
        model: the hooked model.
        fits_graph: whether the hooks may become part of a graph.
        noticed: whether graphs notice these hooks, as they do at function calls: one that exists is made anew.
        tell: warn, once per model, if it is compiled and has no graph yet, since the user may expect one to be used.
    """
    if not may_be_compiled(model):
        return _AS_IT_IS
    if has_stale_graph(model, noticed=fits_graph and noticed):
        return _stance
    if fits_graph or not (is_compiled(model) or _wrappers.need_whole_graph_of(model)):
        return _AS_IT_IS
    if tell:
        _tell(model)
    return _stance


_AS_IT_IS = nullcontext()


class _EagerStance:
    """Sets the stance of ``torch.compile``: the first block to be entered sets it, the last one to exit restores it.

    Blocks may exit in any order, which torch's own stances do not support.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._users = 0
        self._set: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._set = torch.compiler.set_stance("force_eager")
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._set.__exit__(None, None, None)
                self._set = None


_stance = _EagerStance()


class _Wrappers:
    """The wrappers that ``torch.compile(module)`` has returned in this process; a module does not refer to its own.

    They are found by a slow search of all objects, which is repeated only if their number has changed.
    """

    def __init__(self) -> None:
        self._found: WeakSet[Any] = WeakSet()
        self._seen = (-1, -1)

    def need_whole_graph_of(self, model: nn.Module) -> bool:
        """Whether ``model`` is in a wrapper with ``fullgraph=True``, which fails where a hook fits no graph."""
        kind = sys.modules["torch._dynamo"].OptimizedModule
        if self._seen != (sys.getrefcount(kind), len(self._found)):  # a class counts its instances as references
            self._found = WeakSet(each for each in gc.get_objects() if type(each) is kind)
            self._seen = (sys.getrefcount(kind), len(self._found))
        whole = [each for each in self._found if getattr(each.dynamo_ctx, "fullgraph", False)]
        return any(model is part for each in whole for part in each.modules())


_wrappers = _Wrappers()
_told: WeakSet[nn.Module] = WeakSet()


def _tell(model: nn.Module) -> None:
    model = uncompiled(model)
    if model in _told:
        return
    _told.add(model)
    warn_user(
        f"{type(model).__name__} is compiled, and runs eagerly while this context is open; what can be part of a graph "
        "is an ActivationCaching of 'fwd' that keeps outputs as they are (no reducer=, pick=, callback=, stop_early=), "
        "and what reads or edits calls of Python functions alone ('path::function')",
        TdcacheWarning,
    )


def refuse_scripted(model: nn.Module, places: Sequence[tuple[Any, ...]]) -> None:
    """Refuse places, given as path and module, inside a TorchScript module.

    Raises:
        ContextError: it names the first one, and the script module, which can be hooked itself.
    """
    kinds = set(map(type, map(itemgetter(1), places)))
    if True not in map(issubclass, kinds, repeat(torch.jit.ScriptModule)):
        return
    for path in [each[0] for each in places if isinstance(each[1], torch.jit.ScriptModule)]:
        ancestor = scripted_ancestor(model, path)
        if ancestor is not None:
            raise ContextError(
                f"{path!r} is inside the TorchScript module {ancestor!r}, which calls its parts without their hooks; "
                f"hook {ancestor!r} itself, or the model before torch.jit.script or torch.jit.trace"
            )
