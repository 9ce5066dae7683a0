"""The only place where torch hooks are added: one at a time, or all of them or none.

At one site our hooks run in the order of :class:`Order`, whatever order they were added in: edits before captures, so
that a capture sees the final value, and a stop after both. ``prepend=True`` puts a hook in front of all that is there.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from threading import RLock
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tdcache.errors import HookSignatureError
from tdcache.hooks.directions import Direction, direction_row
from tdcache.hooks.gradient_hooks import GradientHandle, GradInputHook, GradOutputHook
from tdcache.hooks.threads import Fence, Fenced, current_fence
from tdcache.hooks.transient import Transient
from tdcache.introspect import hooks_always_called, post_hooks, pre_hooks
from tdcache.types import HookDirection, Removable

__all__ = [
    "AttachedElsewhere",
    "MultiHookHandle",
    "MutedHook",
    "Order",
    "PortHook",
    "Registration",
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


class Order(IntEnum):
    """Where a hook stands among ours at one site."""

    FIRST = -1
    """Registered with ``prepend=True``: stays in front."""
    EDIT = 0
    EDIT_GRADIENT = 1
    CAPTURE = 2
    STOP = 3


class AttachedElsewhere(nn.Module):
    """Stands for a place that is no module: a hook that is registered on it is put there."""

    def attach_hook(self, hook: Callable[..., Any], direction: HookDirection, order: int) -> Removable:
        """Put a hook at the place; it is called as hooks of ``direction`` are."""
        raise NotImplementedError


_one_at_a_time = RLock()
"""Held while the hooks of a module are changed: two threads may open contexts on one model."""


def _behind(fence: Fence | None, hook: Any) -> Any:
    if fence is None or isinstance(hook, Fenced):
        return hook
    return Fenced(hook, _order_of(hook), fence)


@dataclass(frozen=True, slots=True)
class UserHook(Transient):
    """A hook that a user wrote, with the path it was registered at; calls it and nothing else."""

    hook: Callable[..., Any]
    path: str
    direction: str
    order: int

    def __call__(self, *args: Any) -> Any:
        """Pass the call on to the hook."""
        return self.hook(*args)


def attach(
    module: nn.Module,
    hook: Callable[..., Any],
    direction: HookDirection = "fwd",
    *,
    order: int = Order.EDIT,
    path: str = "",
) -> Removable:
    """Register ``hook`` on ``module``; the signature is trusted.

    Args:
        module: where.
        hook: called with the parameters of the direction's row.
        direction: a key of :data:`~tdcache.hooks.directions.DIRECTIONS`.
        order: one of :class:`Order`. The hook must answer to an ``order`` attribute of that value (itself, or the
            object it is a bound method of) to keep its place when others are added later.
        path: the name for messages.
    """
    if direction in ("fwd", "fwd_kwargs", "fwd_pre", "fwd_pre_kwargs"):
        return _register(module, hook, direction, order)
    if direction == "bwd_pre":
        return attach_gradient(module, TransientGradOutputHook(hook, order, path))
    return attach_gradient(module, TransientGradInputHook(hook, order, path))


class TransientGradOutputHook(Transient, GradOutputHook):
    """A gradient hook that is left out of copies of its module; those of a hook point go with it."""


class TransientGradInputHook(Transient, GradInputHook):
    """The same for hooks that see both gradients."""


def attach_gradient(module: nn.Module, watcher: GradOutputHook | GradInputHook) -> Removable:
    """Register the forward hooks of a gradient hook."""
    order = watcher.order
    handles = []
    if isinstance(watcher, GradInputHook):  # first: at a place that is no module, both stand in one row
        handles.append(_register(module, watcher.on_input, "fwd_pre_kwargs", order))
    handles.append(_register(module, watcher.on_output, "fwd", order))
    return GradientHandle(watcher, handles)


def _register(module: nn.Module, hook: Callable[..., Any], direction: HookDirection, order: int) -> Removable:
    if isinstance(module, AttachedElsewhere):
        return module.attach_hook(hook, direction, order)
    prepend, with_kwargs = order == Order.FIRST, direction.endswith("kwargs")
    hook = _behind(current_fence(), hook)
    with _one_at_a_time:
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
    return Registration(handle)


def _registering(module: nn.Module) -> type[nn.Module]:
    """Whose methods register: those of a TorchScript module refuse, though its calls from Python run hooks."""
    return nn.Module if isinstance(module, torch.jit.ScriptModule) else type(module)


def attach_outputs(pairs: Iterable[tuple[nn.Module, Callable[..., Any]]], handle: MultiHookHandle, order: int) -> None:
    """Register a forward hook per pair: :func:`attach` for many at a third of the cost; ``handle`` takes them in.

    torch numbers registrations over all modules, so that one number may serve for all of these: no handle per module
    is needed, only the dicts to remove it from.
    """
    fence = current_fence()
    with _one_at_a_time:  # torch's counter is not safe with threads either: one number twice would lose a hook
        number = RemovableHandle(OrderedDict()).id
        placed = _Numbered(number)
        handle.add(placed)
        taken_in = placed.dicts.append
        for module, hook in pairs:
            if isinstance(module, AttachedElsewhere):
                handle.add(module.attach_hook(hook, "fwd", order))
                continue
            hooks = post_hooks(module)
            if not hooks and fence is None:  # the common case
                hooks[number] = hook
                taken_in(hooks)
                continue
            if number in hooks:  # the module has several names, and a hook for each
                handle.add(attach(module, hook, "fwd", order=order))
                continue
            hooks[number] = _behind(fence, hook)
            taken_in(hooks)
            if order == Order.FIRST:
                hooks.move_to_end(number, last=False)
            else:
                settle(hooks, order)


def attach_ports(
    taps: Iterable[tuple[nn.Module, PortHook]], direction: HookDirection, handle: MultiHookHandle, order: int
) -> None:
    """Register the ``on_call`` of each tap at its side of a module; ``handle`` takes the registrations in."""
    if direction == "fwd":
        attach_outputs(((module, tap.on_call) for module, tap in taps), handle, order)
        return
    for module, tap in taps:
        handle.add(attach(module, tap.on_call, direction, order=order))


class PortHook(Protocol):
    """A tap at a port: one method for outputs ``(module, args, output)`` and inputs ``(module, args, kwargs)``."""

    def on_call(self, module: nn.Module, args: Any, rest: Any, /) -> Any:
        """See the value; what is returned, if not None, takes its place."""


class MutedHook(Transient):
    """Stands where a muted hook stands, so that it keeps its place."""

    __slots__ = ("hook", "order")

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.order = _order_of(hook)

    def __call__(self, *args: Any) -> None:
        """Do nothing while the hook is muted."""


def _mute(hooks: Any, number: int) -> None:
    hook = hooks.get(number)
    if hook is not None and not isinstance(hook, MutedHook):
        hooks[number] = MutedHook(hook)


def _unmute(hooks: Any, number: int) -> None:
    hook = hooks.get(number)
    if isinstance(hook, MutedHook):
        hooks[number] = hook.hook


def _fence_off(hooks: Any, number: int, fence: Fence) -> None:
    hook = hooks.get(number)
    if isinstance(hook, MutedHook):
        hook.hook = _behind(fence, hook.hook)
    elif hook is not None:
        hooks[number] = _behind(fence, hook)


class Registration:
    """One hook of torch's: removed, or muted in its place. torch counts the hook as there while it is muted."""

    __slots__ = ("_handle",)

    def __init__(self, handle: RemovableHandle) -> None:
        self._handle = handle

    def remove(self) -> None:
        """Remove it; a second call does nothing."""
        with _one_at_a_time:
            self._handle.remove()

    def mute(self) -> None:
        """Silence it without giving up its place."""
        _mute(self._handle.hooks_dict_ref() or {}, self._handle.id)

    def unmute(self) -> None:
        """Let it act again."""
        _unmute(self._handle.hooks_dict_ref() or {}, self._handle.id)

    def put_behind(self, fence: Fence) -> None:
        """Have it act in no thread that is fenced off."""
        _fence_off(self._handle.hooks_dict_ref() or {}, self._handle.id, fence)


class _Numbered:
    """The registrations of one number in many modules."""

    __slots__ = ("always_called", "dicts", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.dicts: list[Any] = []
        self.always_called: dict[int, bool] = {}

    def remove(self) -> None:
        """Remove them; a second call does nothing."""
        number = self.number
        with _one_at_a_time:
            for hooks in self.dicts:
                hooks.pop(number, None)
            self.dicts.clear()
            self.always_called.pop(number, None)

    def mute(self) -> None:
        """Silence them without giving up their places."""
        for hooks in self.dicts:
            _mute(hooks, self.number)

    def unmute(self) -> None:
        """Let them act again."""
        for hooks in self.dicts:
            _unmute(hooks, self.number)

    def put_behind(self, fence: Fence) -> None:
        """Have them act in no thread that is fenced off."""
        for hooks in self.dicts:
            _fence_off(hooks, self.number, fence)


def bracket(root: nn.Module, begin: Callable[..., None], end: Callable[..., None], handle: MultiHookHandle) -> None:
    """Call ``begin`` before and ``end`` after every forward of ``root``, also one that raises."""
    fence = current_fence()
    with _one_at_a_time:
        number = RemovableHandle(OrderedDict()).id
        placed = _Numbered(number)
        handle.add(placed)
        before, after = placed.dicts = [pre_hooks(root), post_hooks(root)]
        before[number] = _behind(fence, begin)
        before.move_to_end(number, last=False)
        after[number] = _behind(fence, end)
        placed.always_called = hooks_always_called(root)
        placed.always_called[number] = True


def settle(hooks: Any, order: int) -> None:
    """Move our hooks that come after ``order`` behind the one that was just added to the ordered dict ``hooks``."""
    if len(hooks) < 2:
        return
    ranked = [(_order_of(hook), key) for key, hook in hooks.items()]
    later = sorted((rank, at) for at, (rank, _) in enumerate(ranked) if rank > order)
    for _, at in later:
        hooks.move_to_end(ranked[at][1])


def _order_of(hook: Any) -> int:
    order = getattr(getattr(hook, "__self__", hook), "order", None)
    return order if isinstance(order, int) else Order.FIRST  # a foreign hook stays where it is


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
        HookSignatureError: it names the parameters that are expected and those that are there.
    """
    if not callable(hook):
        raise HookSignatureError(f"a hook is a callable ({', '.join(row.params)}), got {hook!r}")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some builtins have none; the call itself will tell
        return
    try:
        signature.bind(*row.params)
    except TypeError:
        raise HookSignatureError(
            f"a hook of direction {row.name!r} is called as hook({', '.join(row.params)}), "
            f"but {getattr(hook, '__name__', hook)!r} takes {signature}"
        ) from None


class _Installing:
    """Removes what a handle has taken in if the block raises."""

    __slots__ = ("_handle",)

    def __init__(self, handle: MultiHookHandle) -> None:
        self._handle = handle

    def __enter__(self) -> MultiHookHandle:
        return self._handle

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._handle.remove()


class MultiHookHandle:
    """Several registrations that are undone together, last first; adding two handles gives one over both.

    Example:
        >>> handle = MultiHookHandle()
        >>> with handle.installing():  # all of what the block adds, or none
        ...     handle.add(attach(nn.ReLU(), lambda module, args, output: None))
        >>> len(handle)
        1
    """

    def __init__(self, handles: Iterable[Removable] | None = None) -> None:
        self._handles = list(handles or ())
        self.add = self._handles.append
        """Take one more registration in."""

    def installing(self) -> AbstractContextManager[MultiHookHandle, None]:
        """Add registrations in a block; if it raises, every registration is removed."""
        return _Installing(self)

    def remove(self) -> None:
        """Undo every registration, also when one of them fails; the first failure is raised at the end.

        A second call does nothing.
        """
        failure: BaseException | None = None
        while self._handles:
            try:
                self._handles.pop().remove()
            except BaseException as error:  # noqa: BLE001  (raised again below)
                failure = failure or error
        if failure is not None:
            raise failure

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Silence every registration inside a block; each keeps its place among the hooks of its site.

        Of others than torch's and this library's, those with ``mute()`` and ``unmute()`` of their own.
        """
        self.mute()
        try:
            yield
        finally:
            self.unmute()

    def mute(self) -> None:
        """Silence every registration until :meth:`unmute`."""
        for handle in self._able("mute"):
            handle.mute()

    def unmute(self) -> None:
        """Let every registration act again."""
        for handle in self._able("unmute"):
            handle.unmute()

    def put_behind(self, fence: Fence) -> None:
        """Have no registration act in a thread that is fenced off, from now on."""
        with _one_at_a_time:
            for handle in self._able("put_behind"):
                handle.put_behind(fence)

    def _able(self, what: str) -> Iterator[Any]:
        for handle in self._handles:
            able = Registration(handle) if isinstance(handle, RemovableHandle) else handle
            if hasattr(able, what):
                yield able

    def __len__(self) -> int:
        return len(self._handles)

    def __enter__(self) -> MultiHookHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __add__(self, other: object) -> MultiHookHandle:
        if not isinstance(other, MultiHookHandle):
            raise TypeError(f"a MultiHookHandle can be added to another, not to {type(other).__name__}")
        return MultiHookHandle([*self._handles, *other._handles])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} handles)"
