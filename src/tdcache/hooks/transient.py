"""Hooks that stay behind when their module is copied, pickled or saved inside a block.

A copy of a hooked module would carry our hooks along, with all that they hold: the recorder, the cache, the values of a
forward. Nothing could remove them there. So what we register copies to an inert stand-in, and the stand-ins are taken
out of the copy as soon as it is complete. That moment is when the memo of ``copy.deepcopy`` (or of the unpickler) dies:
a :class:`_StandInSweep` lies in it and is told.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

from tdcache.introspect import remove_hooks

__all__ = ["Transient"]


class Transient:
    """What is registered as a hook, or has methods that are; left out of copies of the module."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[Any, Any]) -> _StandIn:
        return _StandIn(memo.setdefault(_StandInSweep, _StandInSweep()))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _StandIn, (_SWEEP_OF_A_LOAD,)


class _StandIn:
    """Stands in a copy for one of our hooks until it is swept out; does nothing if it is called."""

    def __init__(self, sweep: _StandInSweep) -> None:
        sweep.left.append(self)

    def __call__(self, *args: Any) -> None:
        """Do nothing: the copy has no hooks of ours."""

    def __getattr__(self, name: str) -> _StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return self  # a method that was registered: pickle asks the stand-in for it by name


class _StandInSweep:
    """Lies in the memo of one copy or load, and takes its stand-ins out of the modules when the memo is dropped."""

    def __init__(self) -> None:
        self.left: list[_StandIn] = []

    def __del__(self) -> None:
        left = self.left
        methods = [each for each in gc.get_referrers(*left) if type(each) is MethodType] if left else []
        if not left:
            return
        hook_dicts = [each for each in gc.get_referrers(*left, *methods) if type(each) is OrderedDict]
        remove_hooks(hook_dicts, _is_stand_in)


def _is_stand_in(hook: Any) -> bool:
    return type(getattr(hook, "__self__", hook)) is _StandIn


class _Token:
    """Pickles to one new sweep for all that is loaded together."""

    def __reduce__(self) -> tuple[type[_StandInSweep], tuple[()]]:
        return _StandInSweep, ()


_SWEEP_OF_A_LOAD = _Token()
