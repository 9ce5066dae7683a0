"""Handles of registered hooks, to remove or mute them, or to put them behind a fence, one by one or together.

torch's own handles can only remove. Removing and registering again to pause a hook would change the order of hooks at
its site, and a failure half way through would leave some of them registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum
from types import TracebackType
from typing import Any

from torch.utils.hooks import RemovableHandle

from tdcache.hooks.threads import Fence, Fenced, one_at_a_time
from tdcache.hooks.transient import Transient
from tdcache.types import Removable

__all__ = [
    "MultiHookHandle",
    "MutedHook",
    "NumberedRegistrations",
    "Order",
    "Registration",
    "behind",
    "order_of",
]


class Order(IntEnum):
    """The position of a hook among this library's hooks at one site."""

    FIRST = -1
    """Registered with ``prepend=True``: stays first."""
    EDIT = 0
    EDIT_GRADIENT = 1
    CAPTURE = 2
    STOP = 3


def behind(fence: Fence | None, hook: Any) -> Any:
    """``hook`` behind ``fence``, if there is one."""
    if fence is None or isinstance(hook, Fenced):
        return hook
    return Fenced(hook, order_of(hook), fence)


class MutedHook(Transient):
    """Takes the position of a muted hook, so that the hook can return to it."""

    __slots__ = ("hook", "order")

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self.order = order_of(hook)

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
        hook.hook = behind(fence, hook.hook)
    elif hook is not None:
        hooks[number] = behind(fence, hook)


class Registration:
    """One torch hook, which can be removed, or muted without losing its position."""

    __slots__ = ("_handle",)

    def __init__(self, handle: RemovableHandle) -> None:
        self._handle = handle

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        with one_at_a_time:
            self._handle.remove()

    def mute(self) -> None:
        """Silence the hook; it keeps its position."""
        with one_at_a_time:
            _mute(self._handle.hooks_dict_ref() or {}, self._handle.id)

    def unmute(self) -> None:
        """Let the hook act again."""
        with one_at_a_time:
            _unmute(self._handle.hooks_dict_ref() or {}, self._handle.id)

    @property
    def is_there(self) -> bool:
        """Whether it is still registered."""
        return self._handle.id in (self._handle.hooks_dict_ref() or ())

    def put_behind(self, fence: Fence) -> None:
        """Make it ignore the threads that the fence excludes."""
        _fence_off(self._handle.hooks_dict_ref() or {}, self._handle.id, fence)


class NumberedRegistrations:
    """Hooks in many modules that share one registration number."""

    __slots__ = ("always_called", "dicts", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.dicts: list[Any] = []
        self.always_called: dict[int, bool] = {}

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        number = self.number
        with one_at_a_time:
            for hooks in self.dicts:
                hooks.pop(number, None)
            self.dicts.clear()
            self.always_called.pop(number, None)

    def mute(self) -> None:
        """Silence the hooks; they keep their positions."""
        with one_at_a_time:
            for hooks in self.dicts:
                _mute(hooks, self.number)

    def unmute(self) -> None:
        """Let the hooks act again."""
        with one_at_a_time:
            for hooks in self.dicts:
                _unmute(hooks, self.number)

    @property
    def is_there(self) -> bool:
        """Whether they are still registered."""
        return bool(self.dicts)

    def put_behind(self, fence: Fence) -> None:
        """Make them ignore the threads that the fence excludes."""
        for hooks in self.dicts:
            _fence_off(hooks, self.number, fence)


def order_of(hook: Any) -> int:
    """The order of a hook at its site."""
    order = getattr(getattr(hook, "__self__", hook), "order", None)
    return order if isinstance(order, int) else Order.FIRST  # a foreign hook stays where it is


class _Installing:
    """Removes the registrations of a handle if the block raises."""

    __slots__ = ("_handle",)

    def __init__(self, handle: MultiHookHandle) -> None:
        self._handle = handle

    def __enter__(self) -> MultiHookHandle:
        return self._handle

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._handle.remove()


class MultiHookHandle:
    """Several registrations that are undone together, last first; the sum of two handles is one over both.

    Example:
        >>> from torch import nn
        >>> from tdcache.hooks.attach import attach
        >>> handle = MultiHookHandle()
        >>> with handle.installing():  # all that the block adds, or none
        ...     handle.add(attach(nn.ReLU(), lambda module, args, output: None))
        >>> len(handle)
        1
    """

    def __init__(self, handles: Iterable[Removable] | None = None) -> None:
        self._handles = list(handles or ())
        self.add = self._handles.append
        """Add a registration."""

    def installing(self) -> AbstractContextManager[MultiHookHandle, None]:
        """Add registrations in a block; if it raises, every registration is removed."""
        return _Installing(self)

    def remove(self) -> None:
        """Undo every registration, even if one of them fails; the first failure is raised at the end.

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
        """Silence every registration inside a block; each keeps its position among the hooks of its site.

        Handles of other libraries are included if they have methods ``mute()`` and ``unmute()``.
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
        """Undo :meth:`mute` for every registration."""
        for handle in self._able("unmute"):
            handle.unmute()

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
