"""When hooks apply: conditions on the layer, the call, the batch row, the position, or anything; they combine.

A condition is asked with the value and the keyword arguments in scope. It answers yes or no, or with a mask over the
leading dimensions of the value, which names the part that is meant. ``&``, ``|`` and ``~`` combine both kinds.
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
"""Yes, no, or a boolean mask over the leading dimensions of the value."""


class Condition(ABC):
    """What all conditions are: asked by a call, combined by ``&``, ``|`` and ``~``."""

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
    """A keyword argument in scope has one of some values: ``Keyword("kind", "mlp")``."""

    name: str
    values: tuple[Any, ...]

    def __init__(self, name: str, *values: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> bool:
        """Look the keyword up.

        Raises:
            HookSignatureError: there is none of this name in scope.
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
    """In these layers, by the keyword ``layer``."""

    def __init__(self, *layers: int) -> None:
        super().__init__("layer", *layers)

    def __repr__(self) -> str:
        return f"Layers({', '.join(map(repr, self.values))})"


class Calls(Keyword):
    """In these calls of a module that runs several times in one forward, counted from 0, by the keyword ``call``."""

    def __init__(self, *calls: int) -> None:
        super().__init__("call", *calls)

    def __repr__(self) -> str:
        return f"Calls({', '.join(map(repr, self.values))})"


@dataclass(frozen=True, slots=True, init=False)
class Part(Condition):
    """Some indices along one dimension of the value; negative ones count from its end."""

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
    """These rows of the batch: dimension 0."""

    def __init__(self, *rows: int | slice) -> None:
        super().__init__(0, *rows)

    def __repr__(self) -> str:
        return f"Rows({', '.join(map(_spelled, self.indices))})"


class Positions(Part):
    """These positions of the sequence: dimension 1, or another."""

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
        """Ask the predicate.

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
    """Several conditions as one; asked in order, until one of them decides."""

    members: tuple[Condition, ...]
    deciding: ClassVar[bool]
    """The answer of a member after which the rest is not asked."""
    sign: ClassVar[str]

    def __init__(self, *members: Condition) -> None:
        object.__setattr__(self, "members", members)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Answer:
        """Ask the members in order."""
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
    """Where all members apply; after the first no, the rest is not asked."""

    __slots__ = ()
    deciding, sign = False, "&"


class Either(_Joined):
    """Where any member applies; after the first yes, the rest is not asked."""

    __slots__ = ()
    deciding, sign = True, "|"


@dataclass(frozen=True, slots=True)
class Not(Condition):
    """Where the other does not apply."""

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
    """Two masks, whose dimensions are the leading ones of a value, with as many dimensions each."""
    dims = max(one.dim(), other.dim())
    one, other = (mask.reshape(*mask.shape, *(1,) * (dims - mask.dim())) for mask in (one, other))
    return one, other


def checked(answer: Any, asked: Any) -> Answer:
    """An answer as a bool or a boolean mask.

    Raises:
        HookSignatureError: it is neither.
    """
    if isinstance(answer, Tensor) and answer.dtype == torch.bool:
        return answer if answer.dim() else bool(answer)
    if type(answer).__name__ in ("bool", "bool_"):  # Python's, or numpy's
        return bool(answer)
    got = f"a {answer.dtype} tensor" if isinstance(answer, Tensor) else repr(answer)
    raise HookSignatureError(f"condition {spell(asked)} returned {got}; return True, False or a boolean mask")


def as_condition(condition: Callable[..., Any]) -> Condition:
    """A condition as it is, any other predicate as one."""
    return condition if isinstance(condition, Condition) else When(condition)
