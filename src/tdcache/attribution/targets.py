"""What is explained: a rule that turns the model's outputs into one scalar per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.attribution.place import Place
from tdcache.errors import AttributionError
from tdcache.types import CacheKey, Pick

__all__ = ["At", "Target", "TargetLike", "Unit", "as_targets", "row_values"]

TargetLike: TypeAlias = (
    "Callable[[TensorDictBase], Tensor] | int | Tensor | tuple[Any, ...] | Sequence[Any] | Mapping[str, Any] | None"
)
"""A callable on the output TensorDict, an index, one index per row, a key with an index, or several of these."""

Target: TypeAlias = Callable[[TensorDictBase], Tensor]


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class At:
    """The entry ``key`` of the outputs at ``index`` of its last axis; a tensor of indices has one per row.

    An output of shape ``(batch,)`` or ``(batch, 1)`` needs no index. ``key`` None is the model's first output.
    """

    index: Any = None
    key: CacheKey | None = None
    default: CacheKey = "output"

    @property
    def is_one_for_all(self) -> bool:
        """Whether every row has the same index."""
        return not isinstance(self.index, Tensor) or self.index.ndim == 0

    @property
    def _identity(self) -> tuple[Any, ...]:
        return (id(self.index) if isinstance(self.index, Tensor) else repr(self.index), self.key, self.default)

    def __repr__(self) -> str:  # as it was given
        return repr(self.index if self.key is None else (self.key, self.index))

    def __eq__(self, other: object) -> bool:  # equal targets share one backward
        return isinstance(other, At) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash((self.key, self.default))

    def __call__(self, data: TensorDictBase) -> Tensor:
        """Pick the values, of shape ``(batch,)``."""
        key = self.default if self.key is None else self.key
        output: Tensor | None = data.get(key, None)
        if output is None:
            raise AttributionError(
                f"target {self!r}: the model wrote no entry {key!r}; there are {sorted(map(str, data.keys()))!r}"
            )
        if self.index is None:
            return output.squeeze(-1) if output.ndim > 1 and output.shape[-1] == 1 else output
        if isinstance(self.index, Tensor) and self.index.ndim:
            where = self.index.to(output.device)
            if where.shape != output.shape[:-1]:
                raise AttributionError(
                    f"target: {tuple(where.shape)} indices for an output {key!r} of shape {tuple(output.shape)}; "
                    f"give one per row, shape {tuple(output.shape[:-1])}"
                )
            return output.gather(-1, where.unsqueeze(-1)).squeeze(-1)
        try:
            return output[(..., *self.index) if isinstance(self.index, tuple) else (..., self.index)]
        except IndexError as error:
            raise AttributionError(
                f"target={self!r} does not fit the output {key!r} of shape {tuple(output.shape)}: {error}"
            ) from None


@dataclass(frozen=True, eq=False, slots=True)
class Unit:
    """A unit inside the model as target: what the module at ``path`` returns, at ``index``.

    Args:
        path: the module.
        index: into the last axis, or a tuple into the last axes; a callable gets the tensor, and returns one scalar per
            row, such as the mean of a channel.
        pick: which tensor of a structured output.
        call: which call of a module that runs several times.

    Example:
        >>> Unit("layers.3", 17)
        Unit('layers.3', 17)
    """

    path: str
    index: Any
    pick: Pick = None
    call: int | None = None

    def __repr__(self) -> str:
        return f"Unit({self.path!r}, {self.index!r})"

    @property
    def place(self) -> Place:
        """Return the place in the model whose value this one is."""
        return Place("out", self.path, self.pick, self.call)

    def __call__(self, data: TensorDictBase) -> Tensor:
        """Units are no outputs: they are read where they are."""
        raise AttributionError(f"{self!r} is read inside the model, not from its outputs; give it as target=")

    def of(self, value: Tensor) -> Tensor:
        """The values of the unit, from those of its module."""
        if callable(self.index):
            found: Tensor = self.index(value)
            return found
        return value[(..., *self.index) if isinstance(self.index, tuple) else (..., self.index)]


def as_targets(target: TargetLike, out_keys: Sequence[CacheKey]) -> dict[str | None, Target]:
    """The targets by name; a single one has the name None, those of a list their positions.

    Raises:
        AttributionError: not a target.
    """
    if isinstance(target, Mapping):
        return {name: _as_target(each, out_keys) for name, each in target.items()}
    if isinstance(target, list):
        return {str(at): _as_target(each, out_keys) for at, each in enumerate(target)}
    return {None: _as_target(target, out_keys)}


def _as_target(target: Any, out_keys: Sequence[CacheKey]) -> Target:
    default = out_keys[0] if out_keys else "output"
    if target is None or isinstance(target, Tensor):
        return At(target, default=default)
    if isinstance(target, Integral):
        return At(int(target), default=default)
    if callable(target):
        return target  # type: ignore[no-any-return]  # what it returns is checked where it is called
    if isinstance(target, tuple) and target:
        key = target[0] if isinstance(target[0], tuple) else target[:1]
        if key and all(isinstance(part, str) for part in key):
            return At(*_index_and_key((*key, *target[1:])), default=default)
    raise AttributionError(
        "a target is a callable on the output TensorDict, an index, a tensor of indices, a tuple (key, index), or a "
        f"list or dict of these; got {target!r} ({type(target).__name__})"
    )


def _index_and_key(target: tuple[Any, ...]) -> tuple[Any, CacheKey]:
    strings = [part for part in target if isinstance(part, str)]
    index = target[len(strings) :]
    key: CacheKey = strings[0] if len(strings) == 1 else tuple(strings)
    return (None if not index else index[0] if len(index) == 1 else index), key


def row_values(target: Target, values: Any, batch_size: torch.Size) -> Tensor:
    """What ``target`` gave, if it has the shape ``batch_size`` (or at most one axis where that is empty).

    Raises:
        AttributionError: not one scalar per row.
    """
    if not isinstance(values, Tensor):
        raise AttributionError(
            f"target {target!r} returned {type(values).__name__}; return a tensor, one scalar per row"
        )
    fits = values.shape == batch_size if batch_size else values.ndim <= 1
    if not fits:
        wanted = tuple(batch_size) if batch_size else "(batch,)"
        raise AttributionError(
            f"target {target!r} gives values of shape {tuple(values.shape)}, not one scalar per row {wanted}; "
            "choose an index (target=3, target=('logits', 3)) or reduce in a callable"
        )
    return values
