"""Skips a module: something else is called instead of its ``forward``, while its hooks still run.

A hook cannot do that, because the forward runs whatever a pre-hook returns. So ``forward`` is set on the instance and
removed again. If a module has several replacements the latest one acts; they may be removed in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tdcache.hooks.on_demand import OnDemandPlace
from tdcache.hooks.threads import Fence, active_fence, note_placed, one_at_a_time, this_thread
from tdcache.hooks.transient import TransientForward

__all__ = ["ReplacedForward", "replace_forward", "skip_module"]


class _ForwardStack:
    """The replacements of one module's forward."""

    def __init__(self, own: Any) -> None:
        self.own = own
        """The ``forward`` that was set on the instance before, or None."""
        self.replacements: list[ReplacedForward] = []

    def settle(self, module: nn.Module) -> None:
        """Set on the instance what is to be called, or nothing."""
        acting = [each for each in reversed(self.replacements) if not each.muted]
        if not acting and self.own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = _ActingForward(acting, self.own, module) if acting else self.own
        if isinstance(module, OnDemandPlace):
            module.settle()


class _ActingForward(TransientForward):
    """Calls the replacement that is meant for the thread that runs the module, or the module's own forward."""

    def __init__(self, acting: list[ReplacedForward], own: Any, module: nn.Module) -> None:
        self.acting, self.own, self.module = acting, own, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        thread = this_thread()
        for each in self.acting:
            if each.fence is None or thread not in each.fence.others:
                return each.instead(*args, **kwargs)
        own = self.own or type(self.module).forward.__get__(self.module)
        return own(*args, **kwargs)


_STACKS: WeakKeyDictionary[nn.Module, _ForwardStack] = WeakKeyDictionary()


class ReplacedForward:
    """One replacement; several may be removed or muted in any order."""

    def __init__(self, module: nn.Module, instead: Callable[..., Any]) -> None:
        self.module = module
        self.instead = instead
        self.muted = False
        with one_at_a_time:
            stack = _STACKS.get(module)
            if stack is None:
                stack = _STACKS[module] = _ForwardStack(module.__dict__.get("forward"))
            stack.replacements.append(self)
            note_placed(self)
            self.fence = active_fence()
            """What keeps it out of other threads; None while there are none."""
            stack.settle(module)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__}, {self.instead!r})"

    def remove(self) -> None:
        """Let the module run again; a second call does nothing."""
        with one_at_a_time:
            if not self.is_there:
                return
            stack = _STACKS[self.module]
            stack.replacements.remove(self)
            stack.settle(self.module)
            if not stack.replacements:
                del _STACKS[self.module]

    @property
    def is_there(self) -> bool:
        """Whether it is still registered."""
        stack = _STACKS.get(self.module)
        return stack is not None and self in stack.replacements

    def put_behind(self, fence: Fence) -> None:
        """Make it ignore the threads that the fence excludes."""
        self.fence = fence
        self._settle()

    def mute(self) -> None:
        """Let the module run until :meth:`unmute`."""
        self._set_muted(True)

    def unmute(self) -> None:
        """Call the replacement again."""
        self._set_muted(False)

    def _set_muted(self, muted: bool) -> None:
        self.muted = muted
        self._settle()

    def _settle(self) -> None:
        with one_at_a_time:
            if self.is_there:
                _STACKS[self.module].settle(self.module)


def replace_forward(module: nn.Module, instead: Callable[..., Any]) -> ReplacedForward:
    """Call ``instead(*args, **kwargs)`` in place of the module's forward, until the handle is removed."""
    return ReplacedForward(module, instead)


class _Give:
    """Returns a value instead of running the module."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.value).__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = self.value.resolve() if hasattr(self.value, "resolve") else self.value
        return value(*args, **kwargs) if callable(value) else value


def skip_module(module: nn.Module, value: Any) -> ReplacedForward:
    """Make a module return ``value`` without running, until the handle is removed; its hooks still run.

    Args:
        module: the module to skip.
        value: the complete return value of the module (for an attention module often a tuple); an object whose
            ``resolve()`` returns it, such as the proxy of a run; or a function of the module's arguments.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> handle = skip_module(model[0], lambda x: x)
        >>> handle.remove()
    """
    return ReplacedForward(module, _Give(value))
