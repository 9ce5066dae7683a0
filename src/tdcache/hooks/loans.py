"""Replaces tensors inside the arguments of one call, and restores the caller's containers afterwards.

A module may append to a list that it receives, or write its results into a TensorDict; with a copy of the container
these writes would be lost. So the tensor is replaced in the caller's own container and put back after the call.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdcache.hooks.gradients import note_views_out
from tdcache.hooks.values import children, is_entries, with_parts
from tdcache.introspect import calls_on_stack

__all__ = ["Loan", "OpenCalls", "lend"]


class _Lent(NamedTuple):
    container: Any
    step: Any
    before: Any
    meanwhile: Any


class Loan:
    """The replacements made in the caller's containers, until :meth:`end`."""

    __slots__ = ("_lent",)

    def __init__(self) -> None:
        self._lent: list[_Lent] = []

    def __bool__(self) -> bool:
        return bool(self._lent)

    def exchange(self, container: Any, step: Any, new: Any) -> None:
        """Replace one part of a container by ``new``."""
        self._lent.append(_Lent(container, step, _part(container, step), new))
        _put(container, step, new)

    def end(self) -> None:
        """Restore every replaced part, unless the module has overwritten it."""
        while self._lent:
            container, step, before, meanwhile = self._lent.pop()
            if _part(container, step) is meanwhile:
                _put(container, step, before)


def _part(container: Any, step: Any) -> Any:
    if isinstance(container, list):
        return container[step] if step < len(container) else None
    return container.get(step, None)


def _put(container: Any, step: Any, value: Any) -> None:
    if is_entries(container):
        container.set(step, value)
    else:
        container[step] = value


def lend(
    args: tuple[Any, ...], kwargs: dict[str, Any], new: Iterator[Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any], Loan | None]:
    """The arguments with each tensor replaced by the next of ``new``, unless that is None.

    Returns:
        Positional and keyword arguments for the module, and the loan to end after its call; None if none of the
        caller's containers was changed.
    """
    loan = Loan()
    args = tuple(_exchanged(value, new, loan) for value in args)
    kwargs = {name: _exchanged(value, new, loan) for name, value in kwargs.items()}
    return args, kwargs, loan if loan else None


def _exchanged(value: Any, new: Iterator[Tensor | None], loan: Loan) -> Any:
    if isinstance(value, Tensor):
        other = next(new)
        return value if other is None else other
    changed = {}
    for step, child in list(children(value)):
        after = _exchanged(child, new, loan)
        if after is not child:
            changed[step] = after
    if not changed:
        return value
    if isinstance(value, list | MutableMapping) or (is_entries(value) and not value.is_locked):
        for step, after in changed.items():
            loan.exchange(value, step, after)
        return value
    return with_parts(value, changed)


class _OpenCall(NamedTuple):
    aliases: Sequence[Tensor]
    versions: Sequence[int]
    loan: Loan | None

    def end(self) -> bool:
        if self.loan is not None:
            self.loan.end()
        return any(alias._version != version for alias, version in zip(self.aliases, self.versions, strict=True))


class OpenCalls:
    """The running calls of one module, the innermost last, with the replacements of their inputs."""

    __slots__ = ("_stack",)

    def __init__(self) -> None:
        self._stack: list[_OpenCall] = []

    def __len__(self) -> int:
        return len(self._stack)

    def begin(self, module: nn.Module, aliases: Sequence[Tensor] = (), loan: Loan | None = None) -> None:
        """Record that a call begins, and drop calls that an exception left open."""
        if self._stack and not torch.compiler.is_compiling():  # calls that raised have no output hook to end them
            under_way = max(0, calls_on_stack(module) - 1)
            while len(self._stack) > under_way:
                self._stack.pop().end()
        self._stack.append(_OpenCall(aliases, [alias._version for alias in aliases], loan))

    def end(self, output: Any) -> bool:
        """The innermost call has returned: restore the caller's containers.

        Args:
            output: what the module returned.

        Returns:
            Whether the module changed an alias in place.
        """
        call = self._stack.pop()
        if call.aliases and not torch.compiler.is_compiling():
            note_views_out(call.aliases, output)
        return call.end()

    def forget(self) -> None:
        """Drop calls that an exception left open."""
        while self._stack:
            self._stack.pop().end()
