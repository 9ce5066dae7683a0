"""The only place where torch hooks are added, one at a time or many at once, all or none.

At one site this library's hooks run in the order of :class:`Order`, whatever order they were added in: edits before
captures, so that a capture sees the final value, and a stop after both. ``prepend=True`` puts a hook before all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tdcache.errors import HookSignatureError
from tdcache.hooks.directions import Direction, direction_row
from tdcache.hooks.gradient_hooks import GradientHandle, GradInputHook, GradOutputHook
from tdcache.hooks.registrations import (
    MultiHookHandle,
    NumberedRegistrations,
    Order,
    Registration,
    behind,
    order_of,
)
from tdcache.hooks.threads import Fence, active_fence, note_placed, one_at_a_time
from tdcache.hooks.transient import Transient
from tdcache.introspect import hooks_always_called, next_registration, post_hooks, pre_hooks
from tdcache.types import HookDirection, Removable

__all__ = [
    "AttachedElsewhere",
    "PortHook",
    "TransientGradInputHook",
    "TransientGradOutputHook",
    "UserHook",
    "attach",
    "attach_gradient",
    "attach_outputs",
    "attach_ports",
    "bracket",
    "check_signature",
    "register_hook_to_module",
    "settle",
]


class AttachedElsewhere(nn.Module):
    """A place that is not a module, such as a function call; hooks registered on it are attached there."""

    def attach_hook(self, hook: Callable[..., Any], direction: HookDirection, order: int) -> Removable:
        """Put a hook at the place; it is called as hooks of ``direction`` are."""
        return self.attach_hooks([(self, hook)], direction, order)

    @classmethod
    def attach_hooks(
        cls, pairs: Iterable[tuple[Any, Callable[..., Any]]], direction: HookDirection, order: int
    ) -> Removable:
        """Put a hook at each of several places."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class UserHook(Transient):
    """Wraps a hook that a user wrote, to give it the path that it was registered at."""

    hook: Callable[..., Any]
    path: str
    direction: str
    order: int

    def __call__(self, *args: Any) -> Any:
        """Call the user's hook."""
        return self.hook(*args)


def attach(
    module: nn.Module,
    hook: Callable[..., Any],
    direction: HookDirection = "fwd",
    *,
    order: int = Order.EDIT,
    path: str = "",
) -> Removable:
    """Register ``hook`` on ``module`` without checking its signature.

    Args:
        module: the module, or a place that is not one.
        hook: called with the parameters of the direction's row.
        direction: a key of :data:`~tdcache.hooks.directions.DIRECTIONS`.
        order: one of :class:`Order`. The hook (or the object that it is a bound method of) must have an attribute
            ``order`` of that value to keep its position when others are added later.
        path: the name for messages.
    """
    if direction in ("fwd", "fwd_kwargs", "fwd_pre", "fwd_pre_kwargs"):
        return _register(module, hook, direction, order)
    if direction == "bwd_pre":
        return attach_gradient(module, TransientGradOutputHook(hook, order, path))
    return attach_gradient(module, TransientGradInputHook(hook, order, path))


class TransientGradOutputHook(Transient, GradOutputHook):
    """A gradient hook that is left out of copies of its module, unlike those of a hook point."""


class TransientGradInputHook(Transient, GradInputHook):
    """Like :class:`TransientGradOutputHook`, for hooks that see both gradients."""


def attach_gradient(module: nn.Module, watcher: GradOutputHook | GradInputHook) -> Removable:
    """Register the forward hooks of a gradient hook."""
    order = watcher.order
    handles = []
    if isinstance(watcher, GradInputHook):  # input first: a place that is not a module has one list of hooks for both
        handles.append(_register(module, watcher.on_input, "fwd_pre_kwargs", order))
    handles.append(_register(module, watcher.on_output, "fwd", order))
    return GradientHandle(watcher, handles)


def _register(module: nn.Module, hook: Callable[..., Any], direction: HookDirection, order: int) -> Removable:
    if isinstance(module, AttachedElsewhere):
        return module.attach_hook(hook, direction, order)
    prepend, with_kwargs = order == Order.FIRST, direction.endswith("kwargs")
    with one_at_a_time:
        hook = behind(active_fence(), hook)
        register: Callable[..., RemovableHandle]
        if direction.startswith("fwd_pre"):
            register = _registering(module).register_forward_pre_hook
            hooks = pre_hooks(module)
        else:
            register = _registering(module).register_forward_hook
            hooks = post_hooks(module)
        handle = register(module, hook, prepend=prepend, with_kwargs=with_kwargs)
        if not prepend:
            settle(hooks, order)
        registration = Registration(handle)
        note_placed(registration)
    return registration


def _registering(module: nn.Module) -> type[nn.Module]:
    """The class whose registration methods to call: a TorchScript module's refuse, although it runs hooks."""
    return nn.Module if isinstance(module, torch.jit.ScriptModule) else type(module)


def attach_outputs(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]], handle: MultiHookHandle, order: int) -> None:
    """Register a forward hook per pair: :func:`attach` for many, at a third of the cost; ``handle`` owns them.

    torch numbers registrations across all modules, so one number can serve for all of these: removing needs that number
    and the modules' dicts, but no handle per module.
    """
    with one_at_a_time:  # torch's counter is not thread-safe: a number used twice would lose a hook
        placed, fence = _numbered(handle)
        number, taken_in = placed.number, placed.dicts.append
        elsewhere: list[tuple[AttachedElsewhere, Callable[..., Any]]] = []
        for module, hook in pairs:
            if isinstance(module, AttachedElsewhere):
                elsewhere.append((module, hook))
                continue
            hooks = post_hooks(module)
            if not hooks and fence is None:  # the common case
                hooks[number] = hook
                taken_in(hooks)
                continue
            if number in hooks:  # the module has several names, each with its own hook
                handle.add(attach(module, hook, "fwd", order=order))
                continue
            hooks[number] = behind(fence, hook)
            taken_in(hooks)
            if order == Order.FIRST:
                hooks.move_to_end(number, last=False)
            else:
                settle(hooks, order)
        if elsewhere:
            handle.add(elsewhere[0][0].attach_hooks(elsewhere, "fwd", order))


def _numbered(handle: MultiHookHandle) -> tuple[NumberedRegistrations, Fence | None]:
    """Begin to register hooks under one number, which ``handle`` owns; with the fence that they go behind."""
    placed = NumberedRegistrations(next_registration())
    handle.add(placed)
    return placed, note_placed(placed)


def attach_ports(
    taps: Iterable[tuple[nn.Module, PortHook]], direction: HookDirection, handle: MultiHookHandle, order: int
) -> None:
    """Register the ``on_call`` of each tap on the input or output of its module; ``handle`` owns the registrations."""
    if direction == "fwd":
        attach_outputs(((module, tap.on_call) for module, tap in taps), handle, order)
        return
    for module, tap in taps:
        handle.add(attach(module, tap.on_call, direction, order=order))


class PortHook(Protocol):
    """A tap at a port: one method for outputs ``(module, args, output)`` and inputs ``(module, args, kwargs)``."""

    def on_call(self, module: nn.Module, args: Any, rest: Any, /) -> Any:
        """Receive the value; a return value other than None replaces it."""


def bracket(root: nn.Module, begin: Callable[..., None], end: Callable[..., None], handle: MultiHookHandle) -> None:
    """Call ``begin`` before and ``end`` after every forward of ``root``, including one that raises."""
    with one_at_a_time:
        placed, fence = _numbered(handle)
        number = placed.number
        before, after = placed.dicts = [pre_hooks(root), post_hooks(root)]
        before[number] = behind(fence, begin)
        before.move_to_end(number, last=False)
        after[number] = behind(fence, end)
        placed.always_called = hooks_always_called(root)
        placed.always_called[number] = True


def settle(hooks: Any, order: int) -> None:
    """Move hooks of a higher ``order`` after the one that was just added to the ordered dict ``hooks``."""
    if len(hooks) < 2:
        return
    ranked = [(order_of(hook), key) for key, hook in hooks.items()]
    later = sorted((rank, at) for at, (rank, _) in enumerate(ranked) if rank > order)
    for _, at in later:
        hooks.move_to_end(ranked[at][1])


def register_hook_to_module(
    module: nn.Module,
    hook: Callable[..., Any],
    direction: HookDirection = "fwd",
    prepend: bool = False,
    *,
    path: str = "",
) -> Removable:
    """Register a user's hook after checking its signature.

    Raises:
        DirectionError: unknown direction.
        HookSignatureError: the hook does not take the direction's parameters.
    """
    row = direction_row(direction)
    check_signature(hook, row)
    default = Order.EDIT_GRADIENT if row.gradient else Order.EDIT
    order = Order.FIRST if prepend else getattr(hook, "order", default)
    return attach(module, UserHook(hook, path, direction, order), direction, order=order, path=path)


def check_signature(hook: Callable[..., Any], row: Direction) -> None:
    """Refuse a hook that cannot be called with the direction's parameters.

    Raises:
        HookSignatureError: it names the parameters that are expected and those that the hook has.
    """
    if not callable(hook):
        raise HookSignatureError(f"a hook is a callable ({', '.join(row.params)}), got {hook!r}")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some builtins have no signature; calling them will show
        return
    try:
        signature.bind(*row.params)
    except TypeError:
        raise HookSignatureError(
            f"a hook of direction {row.name!r} is called as hook({', '.join(row.params)}), "
            f"but {getattr(hook, '__name__', hook)!r} takes {signature}"
        ) from None
