"""What a method asks of a pass: rows to run, and which activations and gradients of them it wants to see."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tdcache.attribution.place import Place
from tdcache.attribution.rows import RowAxes, UnstackableError
from tdcache.attribution.targets import Target
from tdcache.hooks import MultiHookHandle, Port
from tdcache.norms import wide
from tdcache.types import CacheKey

__all__ = ["Ask", "Between", "Modifies", "Point", "PointRows", "View", "expanded", "giving_own_outputs", "wide"]


_Key = TypeVar("_Key")


def expanded(value: Tensor, like: Tensor) -> Tensor | None:
    """``value`` in the shape of ``like``; None if it does not expand to it."""
    try:
        return value.expand_as(like)
    except RuntimeError:
        return None


class Modifies(Protocol):
    """Something that changes what the backward means, for the rows of one point."""

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Add hooks to ``model`` and their handles to ``handle``; ``rows`` None means all."""


@dataclass(frozen=True, eq=False, slots=True)
class Between(Mapping[_Key, Tensor]):
    """Tensors on the straight line from ``low`` to ``high``, computed when they are asked for.

    A path has many points, of which only those of one chunk are to be in memory.
    """

    low: Mapping[_Key, Tensor]
    high: Mapping[_Key, Tensor]
    node: float

    def __getitem__(self, key: _Key) -> Tensor:
        return torch.lerp(self.low[key], self.high[key], self.node)

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.low)

    def __len__(self) -> int:
        return len(self.low)


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Point:
    """One batch of rows to run: the user's, or a variation of it.

    Args:
        label: points with equal labels are the same one, and run once for all methods.
        inputs: entries that differ from the user's TensorDict.
        replace: what stands in place of the values at some modules.
        modifiers: what changes the backward of these rows.
    """

    label: Hashable
    inputs: Mapping[CacheKey, Tensor] = field(default_factory=dict)
    replace: Mapping[Place, Tensor] = field(default_factory=dict)
    modifiers: Sequence[Modifies] = ()


class Ask(NamedTuple):
    """What one method wants to see of one point.

    Args:
        point: the rows.
        sink: gets the :class:`View` once the point has run; it must not keep it.
        target: what is differentiated, or None.
        values: places whose values are wanted.
        grads: places whose gradients of the target are wanted.
        unused: a place that gets no gradient counts as zero instead of being an error.
        base_follows: the method will ask for the user's rows when it has seen this point.
    """

    point: Point
    sink: Callable[[View], None]
    target: Target | None = None
    values: Sequence[Place] = ()
    grads: Sequence[Place] = ()
    unused: bool = False
    base_follows: bool = False


def giving_own_outputs(points: Sequence[Point], *, modified: bool) -> set[Hashable]:
    """The labels of the points whose outputs are those of the user's own rows.

    Args:
        points: the points of a pass.
        modified: those with modifiers count as well: they change no value, only the backward.
    """
    return {each.label for each in points if not (each.inputs or each.replace or (each.modifiers and not modified))}


class PointRows(NamedTuple):
    """The rows of one point among those of the forward it takes part in."""

    start: int
    stop: int
    total: int
    axes: RowAxes | None = None

    def axis_at(self, place: Place, tensor: Tensor) -> int | None:
        """The axis of a place's value that holds the rows; None if all rows share it."""
        if place.kind == "key" or self.axes is None:
            return 0
        return self.axes.at(place, tensor.shape, self.total, str(place.name))

    def axis_in(self, port: Port, module: nn.Module, args: Any, rest: Any, tensor: Tensor) -> int:
        """The axis of one of the tensors at a port.

        Raises:
            UnstackableError: all rows share it.
        """
        steps = next((steps for steps, each in port.parts(module, args, rest) if each is tensor), None)
        key = (port.direction, id(module), steps)
        axis = None if self.axes is None else self.axes.at(key, tensor.shape, self.total, port.path)
        if axis is None:
            raise UnstackableError(f"all rows share the value at {port.path!r}", paths=(port.path,))
        return axis

    def part(self, tensor: Tensor, axis: int | None) -> Tensor:
        """These rows of ``tensor``; all of it where all rows share it."""
        return tensor if axis is None else tensor.narrow(axis, self.start, self.stop - self.start)

    def change(self, tensor: Tensor, axis: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``tensor`` with ``change`` applied to these rows, out of place and differentiable."""
        before, own, after = tensor.split([self.start, self.stop - self.start, self.total - self.stop], axis)
        return torch.cat([before, change(own), after], axis)


class View:
    """What a sink sees: the rows of its point."""

    def __init__(
        self,
        rows: PointRows | None,
        values: Mapping[Place, Any],
        grads: Mapping[Place, Tensor],
        target: Any,
    ) -> None:
        self._rows = rows
        self._values = values
        self._grads = grads
        self.target: Tensor = target
        """The target's values, one per row."""

    def values(self, places: Sequence[Place]) -> dict[Place, Tensor]:
        """The activations, where the model ran; one that all rows share, such as position embeddings, as it is."""
        return self._own(self._values, places)

    def grads(self, places: Sequence[Place]) -> dict[Place, Tensor]:
        """The gradients of the target's sum, where one came."""
        return self._own(self._grads, places)

    def _own(self, found: Mapping[Place, Any], places: Sequence[Place]) -> dict[Place, Tensor]:
        there = {place: found[place] for place in places if found.get(place) is not None}
        rows = self._rows
        if rows is None:
            return there
        return {place: rows.part(tensor, rows.axis_at(place, tensor)) for place, tensor in there.items()}
