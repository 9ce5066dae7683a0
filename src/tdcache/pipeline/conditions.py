"""Conditions under which hooks apply: on the layer, the call, the batch row, the position, or anything else.

A condition is called with the value and the keyword arguments in scope. It returns a bool, or a mask over the leading
dimensions of the value, for hooks that apply to a part of it. ``&``, ``|`` and ``~`` combine both kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from tdcache.errors import HookSignatureError, SelectionError, listed
from tdcache.pipeline.calling import HookCall, only_positional, spell

__all__ = [
    "All",
    "Answer",
    "Calls",
    "Condition",
    "Either",
    "Keyword",
    "Layers",
    "Not",
    "Part",
    "Positions",
    "Rows",
    "When",
    "as_condition",
    "checked",
]

Answer = bool | Tensor
"""A bool, or a boolean mask over the leading dimensions of the value."""


class Condition(ABC):
    """Base of all conditions: evaluated by a call, combined by ``&``, ``|`` and ``~``."""

    @abstractmethod
    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Answer:
        """Whether, or where, hooks apply to ``x``."""

    def __and__(self, other: Condition) -> Condition:
        return All(self, as_condition(other))

    def __or__(self, other: Condition) -> Condition:
        return Either(self, as_condition(other))

    def __invert__(self) -> Condition:
        return Not(self)


@dataclass(frozen=True, slots=True, init=False)
class Keyword(Condition):
    """Holds if a keyword argument in scope has one of the given values: ``Keyword("kind", "mlp")``."""

    name: str
    values: tuple[Any, ...]

    def __init__(self, name: str, *values: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Compare the keyword with the values.

        Raises:
            HookSignatureError: no keyword of this name is in scope.
        """
        if self.name in kwargs and kwargs[self.name] is None:
            raise HookSignatureError(
                f"{self!r}: {self.name} is not known where a checkpoint recomputes one of several calls"
            )
        if self.name not in kwargs:
            raise HookSignatureError(
                f"{self!r} needs {self.name}=; in scope are {listed(list(kwargs)) or 'no keyword arguments'}: bind it, "
                f"pass it with the call, or attach the pipeline by a pattern with a named group (?P<{self.name}>...)"
            )
        return kwargs[self.name] in self.values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, (self.name, *self.values)))})"


class Layers(Keyword):
    """Holds in these layers, according to the keyword ``layer``."""

    def __init__(self, *layers: int) -> None:
        super().__init__("layer", *layers)

    def __repr__(self) -> str:
        return f"Layers({', '.join(map(repr, self.values))})"


class Calls(Keyword):
    """Holds in these calls of a module that runs several times per forward: the keyword ``call``, counted from 0."""

    def __init__(self, *calls: int) -> None:
        super().__init__("call", *calls)

    def __repr__(self) -> str:
        return f"Calls({', '.join(map(repr, self.values))})"


@dataclass(frozen=True, slots=True, init=False)
class Part(Condition):
    """Marks indices along one dimension of the value; negative ones count from its end."""

    dim: int
    indices: tuple[int | slice, ...]

    def __init__(self, dim: int, *indices: int | slice) -> None:
        object.__setattr__(self, "dim", dim)
        object.__setattr__(self, "indices", indices)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        """Mark the indices.

        Raises:
            SelectionError: the value has no such dimension, or an index is out of range.
        """
        if x.dim() <= self.dim:
            raise SelectionError(
                f"{self!r} is about dimension {self.dim}; the value has shape {tuple(x.shape)}", selector=self
            )
        size = x.shape[self.dim]
        mask = torch.zeros(size, dtype=torch.bool)
        for index in self.indices:
            if isinstance(index, int) and not -size <= index < size:
                raise SelectionError(
                    f"{self!r}: {index} is out of range for dimension {self.dim} of a value of shape {tuple(x.shape)}"
                    "; where sizes vary, count from the end, use a slice, or ask something first: When(...) & ...",
                    selector=self,
                )
            mask[index] = True
        return mask.reshape((1,) * self.dim + (size,))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([str(self.dim), *map(_spelled, self.indices)])})"


def _spelled(index: int | slice) -> str:
    return str(index) if isinstance(index, int) else f"slice({index.start}, {index.stop}, {index.step})"


class Rows(Part):
    """Marks rows of the batch: dimension 0."""

    def __init__(self, *rows: int | slice) -> None:
        super().__init__(0, *rows)

    def __repr__(self) -> str:
        return f"Rows({', '.join(map(_spelled, self.indices))})"


class Positions(Part):
    """Marks positions of the sequence: dimension 1 by default."""

    def __init__(self, *positions: int | slice, dim: int = 1) -> None:
        super().__init__(dim, *positions)

    def __repr__(self) -> str:
        return (
            f"Positions({', '.join([*map(_spelled, self.indices), *([f'dim={self.dim}'] if self.dim != 1 else [])])})"
        )


@dataclass(frozen=True, slots=True)
class When(Condition):
    """Any predicate of the value and of the keyword arguments in scope that it names."""

    predicate: Callable[..., Any]

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Answer:
        """Call the predicate.

        Raises:
            HookSignatureError: it returned neither a bool nor a boolean mask.
        """
        name = only_positional(self.predicate)
        if name is not None and name in kwargs:  # lambda layer: layer == 3
            x, kwargs = kwargs[name], {key: value for key, value in kwargs.items() if key != name}
        return checked(HookCall(self.predicate)(x, args, kwargs), self)

    def __repr__(self) -> str:
        return f"When({spell(self.predicate)})"


@dataclass(frozen=True, slots=True, init=False)
class _Joined(Condition):
    """Several conditions as one, evaluated in order until one of them decides."""

    members: tuple[Condition, ...]
    deciding: ClassVar[bool]
    """The result of a member that decides, so that the rest is not evaluated."""
    sign: ClassVar[str]

    def __init__(self, *members: Condition) -> None:
        object.__setattr__(self, "members", members)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Answer:
        """Evaluate the members in order."""
        join = torch.logical_or if self.deciding else torch.logical_and
        neutral = not self.deciding
        found: Any = neutral
        for member in self.members:
            answer: Any = member(x, *args, **kwargs)
            if answer is self.deciding:
                return not neutral
            found = answer if found is neutral else found if answer is neutral else join(*_aligned(found, answer))
        return cast(Answer, found)

    def __repr__(self) -> str:
        return f" {self.sign} ".join(map(_in_brackets, self.members))


class All(_Joined):
    """Holds where all members hold; after the first False, the rest is not evaluated."""

    __slots__ = ()
    deciding, sign = False, "&"


class Either(_Joined):
    """Holds where any member holds; after the first True, the rest is not evaluated."""

    __slots__ = ()
    deciding, sign = True, "|"


@dataclass(frozen=True, slots=True)
class Not(Condition):
    """Holds where the member does not."""

    member: Condition

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Answer:
        """Return the negated answer of the member."""
        answer = self.member(x, *args, **kwargs)
        return ~answer if isinstance(answer, Tensor) else not answer

    def __repr__(self) -> str:
        return f"~{_in_brackets(self.member)}"


def _in_brackets(member: Condition) -> str:
    return f"({member!r})" if isinstance(member, _Joined) else repr(member)


def _aligned(one: Any, other: Any) -> tuple[Tensor, Tensor]:
    """Two masks over leading dimensions of a value, with trailing axes added so that both have the same number."""
    dims = max(one.dim(), other.dim())
    one, other = (mask.reshape(*mask.shape, *(1,) * (dims - mask.dim())) for mask in (one, other))
    return one, other


def checked(answer: Any, asked: Any) -> Answer:
    """The result of a condition as a bool or a boolean mask.

    Raises:
        HookSignatureError: the result is neither.
    """
    if isinstance(answer, Tensor) and answer.dtype == torch.bool:
        return answer if answer.dim() else bool(answer)
    if type(answer).__name__ in ("bool", "bool_"):  # Python's, or numpy's
        return bool(answer)
    got = f"a {answer.dtype} tensor" if isinstance(answer, Tensor) else repr(answer)
    raise HookSignatureError(f"condition {spell(asked)} returned {got}; return True, False or a boolean mask")


def as_condition(condition: Callable[..., Any]) -> Condition:
    """A condition unchanged; any other predicate wrapped in :class:`When`."""
    return condition if isinstance(condition, Condition) else When(condition)
