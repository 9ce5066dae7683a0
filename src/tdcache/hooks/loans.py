"""Exchanging tensors among the arguments of one call, and giving the caller's containers back as they were.

A module may append to a list that it is given, or write its results into a TensorDict: a copy of the container would
swallow that. So the tensor is exchanged in the caller's own container and put back when the call is over.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdcache.hooks.values import children, is_entries, with_parts
from tdcache.introspect import calls_on_stack

__all__ = ["Loan", "OpenCalls", "lend"]


class _Lent(NamedTuple):
    container: Any
    step: Any
    before: Any
    meanwhile: Any


class Loan:
    """What was exchanged in containers that belong to the caller, until :meth:`end`."""

    __slots__ = ("_lent",)

    def __init__(self) -> None:
        self._lent: list[_Lent] = []

    def __bool__(self) -> bool:
        return bool(self._lent)

    def exchange(self, container: Any, step: Any, new: Any) -> None:
        """Put ``new`` in place of one part of a container."""
        self._lent.append(_Lent(container, step, _part(container, step), new))
        _put(container, step, new)

    def end(self) -> None:
        """Put back what is still in its exchanged place; what the module wrote there itself stays."""
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
    """The arguments with the next of ``new`` in place of each tensor, where it is not None.

    Returns:
        Positional and keyword arguments for the module, and the loan to end after its call; None where no container of
        the caller's was touched.
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
    """The calls of one module that are under way, the innermost last: what each was given in place of its inputs."""

    __slots__ = ("_stack",)

    def __init__(self) -> None:
        self._stack: list[_OpenCall] = []

    def __len__(self) -> int:
        return len(self._stack)

    def begin(self, module: nn.Module, aliases: Sequence[Tensor] = (), loan: Loan | None = None) -> None:
        """Note that a call begins, and drop what calls left that an exception ended."""
        if self._stack and not torch.compiler.is_compiling():  # what an exception ended never came to its output
            under_way = max(0, calls_on_stack(module) - 1)
            while len(self._stack) > under_way:
                self._stack.pop().end()
        self._stack.append(_OpenCall(aliases, [alias._version for alias in aliases], loan))

    def end(self) -> bool:
        """The innermost call is over: gives back what was lent; says whether the module changed an alias in place."""
        return self._stack.pop().end()

    def forget(self) -> None:
        """Let go of calls that an exception ended."""
        while self._stack:
            self._stack.pop().end()
