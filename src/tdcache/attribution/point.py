"""What a method asks of a pass: rows to run, and which activations and gradients of them it wants to see."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from tdcache.attribution.place import Place
from tdcache.attribution.rows import PointRows
from tdcache.attribution.targets import Target
from tdcache.hooks import MultiHookHandle
from tdcache.norms import wide
from tdcache.types import CacheKey

__all__ = ["Ask", "Between", "Modifies", "Point", "View", "wide"]


_Key = TypeVar("_Key")


class Modifies(Protocol):
    """Something that changes what the backward means, for the rows of one point."""

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Add hooks to ``model`` and their handles to ``handle``; ``rows`` None means all."""


class Between(Mapping[_Key, Tensor]):
    """Tensors on the straight line from ``low`` to ``high``, computed when they are asked for.

    A path has many points, of which only those of one chunk are to be in memory.
    """

    __slots__ = ("high", "low", "node")

    def __init__(self, low: Mapping[_Key, Tensor], high: Mapping[_Key, Tensor], node: float) -> None:
        self.low = low
        self.high = high
        self.node = node

    def __getitem__(self, key: _Key) -> Tensor:
        low = self.low[key]
        return low + self.node * (self.high[key] - low)

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
        base_follows: the method will ask for the user's rows when it has seen this point.
    """

    point: Point
    sink: Callable[[View], None]
    target: Target | None = None
    values: Sequence[Place] = ()
    grads: Sequence[Place] = ()
    unused: bool = False
    base_follows: bool = False


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

    def value(self, place: Place) -> Tensor:
        """The activation; one that all rows share, such as that of position embeddings, is given as it is."""
        return self._own(self._values[place], place)

    def ran(self, place: Place) -> bool:
        """Whether there is a value."""
        return self._values.get(place) is not None

    def reached(self, place: Place) -> bool:
        """Whether a gradient came."""
        return place in self._grads

    def grad(self, place: Place) -> Tensor:
        """The gradient of the target's sum."""
        return self._own(self._grads[place], place)

    def _own(self, tensor: Tensor, place: Place) -> Tensor:
        if self._rows is None:
            return tensor
        return self._rows.part(tensor, 0 if place.kind == "key" else self._rows.axis_at(place, tensor))
