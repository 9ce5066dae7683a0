"""``Hooks``: an ordered sequence of callables that is itself a callable.

Keyword arguments (``layer``, ``call``) reach each hook by name, and may be bound at any level of a tree, so that the
same hook can be used in every layer without a closure over the layer's number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast, overload

from tdcache.errors import listed
from tdcache.pipeline.calling import HookCall, spell

__all__ = ["Hook", "HookNode", "Hooks", "WrapperHooks", "run"]

Hook = Callable[..., Any]
"""``x -> x``, or ``x -> None`` for one that only reads; it gets the keyword arguments in scope that it names."""

_INDENT = 4 * " "


def run(calls: Iterable[HookCall], x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Pass ``x`` through the calls in order; one that returns None leaves it unchanged."""
    for call in calls:
        new = call(x, args, kwargs)
        if new is not None:
            x = new
    return x


@dataclass(frozen=True, slots=True)
class _HooksAsOne:
    """A snapshot of the hooks of a sequence, as one hook."""

    calls: tuple[HookCall, ...]
    takes_any_keyword: ClassVar[bool] = True

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        return run(self.calls, x, args, kwargs)

    def __repr__(self) -> str:
        return " -> ".join(spell(call.hook) for call in self.calls)


class HookNode:
    """Base of sequences and collections: bound keyword arguments, separate copies, a nested repr.

    A keyword bound here reaches every hook below. If it is bound at several levels, the binding nearest to the hook
    wins, also over an argument of the call.
    """

    takes_any_keyword: ClassVar[bool] = True
    """Precomputed, so that a call need not inspect the signature."""

    def __init__(self) -> None:
        self._own: dict[str, Any] = {}
        self._inherited: dict[str, Any] = {}

    @property
    def bound(self) -> dict[str, Any]:
        """The keyword arguments in force here: those bound on this object over those bound further up."""
        return {**self._inherited, **self._own}

    def bind(self, **kwargs: Any) -> Self:
        """Fix keyword arguments for every hook below; returns this object.

        Raises:
            ValueError: one of them is already bound on this object; nothing is bound then.
        """
        taken = [f"{name}={self._own[name]!r}" for name in kwargs if name in self._own]
        if taken:
            raise ValueError(
                f"{type(self).__name__} has {', '.join(taken)} bound already; unbind it first, or bind a deepcopy()"
            )
        self._own.update(kwargs)
        self._pass_scope_on()
        return self

    def unbind(self, keys: str | Iterable[str]) -> Self:
        """Undo :meth:`bind` for one key or several; returns this object.

        Raises:
            ValueError: one of them is not bound on this object; nothing is unbound then.
        """
        keys = [keys] if isinstance(keys, str) else list(keys)
        strange = [key for key in keys if key not in self._own]
        if strange:
            above = [key for key in strange if key in self._inherited]
            there = (
                f"{listed(above)} is bound further up: unbind it there" if above else f"bound are {list(self._own)!r}"
            )
            raise ValueError(f"{type(self).__name__} cannot unbind {listed(strange)}; {there}")
        for key in keys:
            self._own.pop(key, None)
        self._pass_scope_on()
        return self

    def inherit(self, scope: Mapping[str, Any]) -> None:
        """Replace the bindings from further up."""
        self._inherited = dict(scope)
        self._pass_scope_on()

    def _pass_scope_on(self) -> None:
        """Pass the bindings to the nodes below."""

    def is_empty(self) -> bool:
        """Whether nothing would be called."""
        raise NotImplementedError

    def targets(self, part: str) -> Iterator[Hooks]:
        """The sequences below that :meth:`HookCollection.append_all` appends to."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of the structure, with separate bindings and sequences; the hooks in it are the same objects."""
        new = copy.copy(self)
        memo[id(self)] = new
        new._separate(memo)  # noqa: SLF001 - the copy's own
        return new

    def _separate(self, memo: dict[int, Any]) -> None:
        self._own, self._inherited = dict(self._own), dict(self._inherited)

    def title(self) -> str:
        """The first line of the repr."""
        return f"{type(self).__name__}()"

    def lines(self) -> list[str]:
        """The lines of the repr: the title with the bindings of this object, then the nodes below, indented."""
        own = ", ".join(f"{name}={value!r}" for name, value in self._own.items())
        return [f"{self.title()} [{own}]" if own else self.title(), *(_INDENT + line for line in self._lines_below())]

    def _lines_below(self) -> Iterator[str]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return "\n".join(self.lines())


class Hooks(HookNode):
    """An ordered sequence of hooks ``x -> x``, called one after the other.

    A hook that returns None leaves the value unchanged. Hooks are called with the keyword arguments in scope that they
    name (all, if they take ``**kwargs``). Calling is plain Python, so autograd works through the hooks as usual.

    Args:
        *hooks: the first ones; :meth:`append` adds more.

    Example:
        >>> Hooks(lambda x: x + 1).append(lambda x, layer: x * layer).bind(layer=10)(2)
        30
    """

    def __init__(self, *hooks: Hook) -> None:
        super().__init__()
        self._calls: list[HookCall] = []
        for hook in hooks:
            self.append(hook)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Pass ``x`` through the hooks, in the order they were appended."""
        return run(self._calls, x, args, self._in_scope(kwargs))

    def _in_scope(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The bindings, merged with the keyword arguments of this call."""
        if self._inherited:
            kwargs.update(self._inherited)
        if self._own:
            kwargs.update(self._own)
        return kwargs

    def append(self, hook: Hook) -> Self:
        """Add a hook at the end; returns this object.

        Raises:
            HookSignatureError: the hook is not callable.
            ValueError: the hook is, or contains, this sequence.
        """
        call = HookCall(hook)
        if isinstance(hook, Hooks) and any(node is self for node in _nodes(hook)):
            raise ValueError(f"{type(self).__name__} cannot be appended to itself; append a deepcopy() of it")
        self._calls.append(call)
        return self

    @property
    def calls(self) -> tuple[HookCall, ...]:
        """The hooks, each with the keyword arguments that it takes."""
        return tuple(self._calls)

    def is_empty(self) -> bool:
        """Whether there is no hook."""
        return not self._calls

    def targets(self, part: str) -> Iterator[Hooks]:
        """This sequence, for any part."""
        yield self

    def __len__(self) -> int:
        return len(self._calls)

    def __iter__(self) -> Iterator[Hook]:
        return (call.hook for call in self._calls)

    @overload
    def __getitem__(self, index: int) -> Hook: ...
    @overload
    def __getitem__(self, index: slice) -> list[Hook]: ...
    def __getitem__(self, index: int | slice) -> Hook | list[Hook]:
        return [call.hook for call in self._calls[index]] if isinstance(index, slice) else self._calls[index].hook

    def _separate(self, memo: dict[int, Any]) -> None:
        super()._separate(memo)
        hooks: list[Any] = list(self)
        self._calls = [
            HookCall(cast(Hook, copy.deepcopy(hook, memo))) if isinstance(hook, HookNode) else call
            for hook, call in zip(hooks, self._calls, strict=True)
        ]

    def _lines_below(self) -> Iterator[str]:
        hooks: list[Any] = list(self)
        for hook in hooks:
            yield from hook.lines() if isinstance(hook, HookNode) else [spell(hook)]


def _nodes(hooks: Hooks) -> Iterator[Hooks]:
    yield hooks
    for hook in hooks:
        if isinstance(hook, Hooks):
            yield from _nodes(hook)


class WrapperHooks(Hooks):
    """A sequence that is passed, as one hook, to ``wrapper``, which returns the hook that is called.

    The sequence is wrapped as a whole, so that its hooks run in the order in which they were appended even if the
    wrapper runs them in the backward: with :func:`~tdcache.pipeline.grad_hook_wrapper`, a save sees the effect of an
    edit that was appended before it.

    Args:
        wrapper: takes a hook and returns a hook; called again when the sequence has changed, and not while it is empty.
        *hooks: the first ones.
    """

    def __init__(self, wrapper: Callable[[Hook], Hook], *hooks: Hook) -> None:
        self.wrapper = wrapper
        self._wrapped: Hook | None = None
        super().__init__(*hooks)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Wrap the current hooks if they have changed, and call the result."""
        if not self._calls:
            return x
        if self._wrapped is None:
            self._wrapped = self.wrapper(_HooksAsOne(tuple(self._calls)))
        return self._wrapped(x, *args, **self._in_scope(kwargs))

    def append(self, hook: Hook) -> Self:
        """Add a hook at the end; the sequence is wrapped again before the next call. Returns this object."""
        self._wrapped = None
        return super().append(hook)

    def _separate(self, memo: dict[int, Any]) -> None:
        super()._separate(memo)
        self._wrapped = None

    def title(self) -> str:
        """The first line of the repr."""
        return f"{type(self).__name__}({spell(self.wrapper)})"
