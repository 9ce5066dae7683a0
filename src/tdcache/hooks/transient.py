"""Hooks, replaced forwards and added modules that are left out when a model is copied, pickled or saved inside a block.

A copy of a hooked module would contain our hooks and everything they refer to: the recorder, the cache, the values of a
forward. Nothing could remove them there. So what we put into a module is copied as inert placeholders, which are
removed from the copy as soon as it is complete. That is when the memo of ``copy.deepcopy`` (or of the unpickler) is
freed, which calls the finalizer of the :class:`_StandInSweep` in it.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from tdcache.introspect import remove_hooks

__all__ = ["Transient", "TransientForward"]


class Transient:
    """Base of everything that is left out of copies of a module.

    That is a hook, an object whose method is a hook, or a module that was added to the module's children.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: dict[Any, Any]) -> _StandIn:
        return _StandIn(memo.setdefault(_StandInSweep, _StandInSweep()))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _StandIn, (_SWEEP_OF_A_LOAD,)


class TransientForward(Transient):
    """Base of what stands as ``forward`` on a module; copies have the ``forward`` that stood there before, if any."""

    __slots__ = ()

    own: Callable[..., Any] | None

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        return super().__deepcopy__(memo) if self.own is None else copy.deepcopy(self.own, memo)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return super().__reduce__() if self.own is None else (_same, (self.own,))


def _same(value: Any) -> Any:
    return value


class _StandIn:
    """The placeholder for a hook in a copy, until it is removed; does nothing if it is called."""

    def __init__(self, sweep: _StandInSweep) -> None:
        sweep.left.append(self)

    def __call__(self, *args: Any) -> None:
        """Do nothing, since hooks are not copied."""

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self  # for a registered method: pickle looks it up on the placeholder by name


class _StandInSweep:
    """Kept in the memo of one copy or load; removes its placeholders from the modules when the memo is freed."""

    def __init__(self) -> None:
        self.left: list[_StandIn] = []

    def __del__(self) -> None:
        left = self.left
        if not left:
            return
        methods = [each for each in gc.get_referrers(*left) if type(each) is MethodType]
        holders = gc.get_referrers(*left, *methods)
        remove_hooks([each for each in holders if type(each) is OrderedDict], _is_stand_in)
        for holder in holders:  # a module with a replaced forward, or what holds its children
            held = holder.__dict__ if isinstance(holder, nn.Module) else holder
            if isinstance(held, dict):
                for name in [name for name, value in held.items() if type(value) is _StandIn]:
                    del held[name]


def _is_stand_in(hook: Any) -> bool:
    return type(getattr(hook, "__self__", hook)) is _StandIn


class _Token:
    """Unpickles to one new sweep for all objects of one load."""

    def __reduce__(self) -> tuple[type[_StandInSweep], tuple[()]]:
        return _StandInSweep, ()


_SWEEP_OF_A_LOAD = _Token()
