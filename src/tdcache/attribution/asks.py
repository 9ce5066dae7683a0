"""What a method asks of a pass: rows to run, and which activations and gradients of them it wants to see."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tdcache.attribution.targets import Target
from tdcache.errors import CaptureError
from tdcache.hooks import MultiHookHandle
from tdcache.types import CacheKey

__all__ = ["Ask", "Modifies", "Place", "Point", "Rows", "View", "wide"]


class Place(NamedTuple):
    """Something with a value and a gradient: a model input, what a module returns, or what it reads."""

    kind: str
    """``"key"``, ``"out"`` or ``"in"``."""
    name: CacheKey


class Rows(NamedTuple):
    """The rows of one point among those of the forward it takes part in."""

    start: int
    stop: int
    total: int

    def of(self, tensor: Tensor, where: object) -> slice:
        """The slice of the leading axis of ``tensor`` that holds these rows; heads may be folded into that axis.

        Raises:
            CaptureError: the leading axis is not the batch.
        """
        if self.total == self.stop - self.start:
            return slice(None)
        length = tensor.shape[0] if tensor.ndim else 0
        if length == 0 or length % self.total:
            raise CaptureError(
                f"the value at {where!r} has shape {tuple(tensor.shape)}, whose leading axis is not the batch of "
                f"{self.total} rows, so its rows cannot be told apart; call with a TensorDict of batch_size=[], which "
                "runs them one after the other",
                paths=(str(where),),
            )
        fold = length // self.total
        return slice(self.start * fold, self.stop * fold)

    def part(self, tensor: Tensor, where: object) -> Tensor:
        """These rows of ``tensor``."""
        rows = self.of(tensor, where)
        return tensor if rows == slice(None) else tensor[rows]

    def change(self, tensor: Tensor, where: object, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``tensor`` with ``change`` applied to these rows, out of place and differentiable."""
        rows = self.of(tensor, where)
        if rows == slice(None):
            return change(tensor)
        return torch.cat([tensor[: rows.start], change(tensor[rows]), tensor[rows.stop :]])

    def exchange(self, tensor: Tensor, where: object, new: Tensor) -> Tensor:
        """``tensor`` with ``new`` in place of these rows."""
        rows = self.of(tensor, where)
        return new if rows == slice(None) else torch.cat([tensor[: rows.start], new, tensor[rows.stop :]])


class Modifies(Protocol):
    """Something that changes what the backward means, for the rows of one point."""

    def install(self, model: nn.Module, rows: Rows | None, handle: MultiHookHandle) -> None:
        """Add hooks to ``model`` and their handles to ``handle``; ``rows`` None means all."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Point:
    """One batch of rows to run: the user's, or a variation of it.

    Args:
        label: points with equal labels are the same one, and run once for all methods.
        inputs: entries that differ from the user's TensorDict.
        replace: by path, what stands in place of a module's output.
        modifiers: what changes the backward of these rows.
        copies: how many times the user's batch the rows are; of several, the first is the user's own.
    """

    label: Hashable
    inputs: Mapping[CacheKey, Tensor] = field(default_factory=dict)
    replace: Mapping[str, Tensor] = field(default_factory=dict)
    modifiers: Sequence[Modifies] = ()
    copies: int = 1


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Ask:
    """What one method wants to see of one point.

    Args:
        point: the rows.
        sink: gets the :class:`View` once the point has run; it must not keep it.
        target: what is differentiated, or None.
        values: places whose values are wanted.
        grads: places whose gradients of the target are wanted.
        unused: a place that gets no gradient counts as zero instead of being an error.
    """

    point: Point
    sink: Callable[[View], None]
    target: Target | None = None
    values: Sequence[Place] = ()
    grads: Sequence[Place] = ()
    unused: bool = False


class View:
    """What a sink sees: the rows of its point."""

    def __init__(self, rows: Rows, values: Mapping[Place, Any], grads: Mapping[Place, Tensor], target: Any) -> None:
        self._rows = rows
        self._values = values
        self._grads = grads
        self.target: Tensor = target
        """The target's values, one per row."""

    def value(self, place: Place) -> Tensor:
        """The activation; one that all rows share, such as that of position embeddings, is given as it is."""
        value: Tensor = self._values[place]
        return value if value.shape[:1] == (1,) else self._rows.part(value, place.name)

    def reached(self, place: Place) -> bool:
        """Whether a gradient came."""
        return place in self._grads

    def grad(self, place: Place) -> Tensor:
        """The gradient of the target's sum."""
        return self._rows.part(self._grads[place], place.name)


def wide(tensor: Tensor) -> Tensor:
    """In at least single precision: half-precision scores are accumulated and returned in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
