"""The hooks of one forward of a pass: they note values and the graph's edges, and put replacements in place.

Gradients are asked of the edge of the graph that a tensor had when it was seen, so that an operation that later changes
it in place changes neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tdcache.attribution.place import Place
from tdcache.attribution.point import PointRows
from tdcache.attribution.rows import UnstackableError
from tdcache.errors import AttributionError
from tdcache.hooks import Order
from tdcache.hooks.gradients import handed_on, watch_made
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import leaves
from tdcache.inplace import overwritten, version_of

__all__ = ["Replacement", "SiteTap", "check_unchanged"]

_CLOCK = count(1)


class _SeenCall(NamedTuple):
    value: Tensor | None
    version: int
    live: Tensor | None
    edge: GradientEdge | None


class SiteTap(Transient):
    """Notes what passes one place in one forward: the value of each call, and the edge its gradient comes by.

    Args:
        place: where.
        rows: those of one of several points, if the forward has several.
        snapshot: copy values, and inputs whose gradient is wanted.
        live: keep values with their graph.
    """

    order = Order.EDIT_GRADIENT  # after the edits, whose result counts, and before the captures, which see our alias
    use = "watch"  # a value that is derived from an attention call gets a gradient

    def __init__(self, place: Place, rows: PointRows | None, *, snapshot: bool, live: bool) -> None:
        self.place = place
        self.port = place.port
        self.rows = rows
        self.snapshot = snapshot
        self.live = live
        self.wants_value = self.wants_grad = self.is_target = False
        self.grads: dict[int, Tensor] = {}
        """The gradient of each call in the latest backward."""
        self.when = 0
        """When the place was seen first."""
        self._seen: list[_SeenCall] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place.name!r})"

    def on_call(self, module: nn.Module, args: Any, rest: Any, given: Any = None) -> Any:
        """Note the value; hands on another tensor of the same value where the gradient could not be told otherwise."""
        tensor = self.port.read(module, args, rest)
        if self.rows is not None and self.rows.axis_at(self.place, tensor) is None and self.wants_grad:
            raise UnstackableError(f"all rows share the value at {self.port.path!r}", paths=(self.port.path,))
        passed = tensor
        if self.wants_grad:
            passed = self._with_graph(tensor)
            if passed is tensor and self.place.kind == "out" and self._is_argument(module, tensor, args, given):
                passed = tensor.clone()
        self._note(passed)
        return None if passed is tensor else self.port.write(module, args, rest, passed)

    def on_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """:meth:`on_call` for a place that is no module, whose arguments by name no stack tells."""
        return self.on_call(module, args, output, given=(args, kwargs))

    @staticmethod
    def _is_argument(module: nn.Module, tensor: Tensor, args: Any, given: Any) -> bool:
        """Whether an output is an argument that is handed on, whose gradient is not the module's alone."""
        if given is None:
            return handed_on(module, tensor, args)
        return any(each is tensor for _, each in leaves(given))

    def _with_graph(self, tensor: Any) -> Tensor:
        """``tensor``, or one of the same value whose gradient is that of this module's side alone."""
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise AttributionError(
                f"the value at {self.place.name!r} is {kind}, which has no gradient; choose with pick="
            )
        if not tensor.requires_grad:  # frozen parameters and integer inputs: the graph begins here
            return tensor.detach().requires_grad_().clone()
        if self.place.kind == "in":  # the gradient of this reader alone
            return tensor.clone() if self.snapshot or tensor.is_leaf else tensor.view_as(tensor)
        # An in-place operation on a view takes it out of the graph, and snapshots say that there may be one.
        return tensor.clone() if tensor.is_leaf or (self.snapshot and tensor._base is not None) else tensor

    def _note(self, tensor: Tensor) -> None:
        self.when = self.when or next(_CLOCK)
        edge = value = None
        if self.wants_grad:
            edge = get_gradient_edge(tensor)
            # What autograd.grad returns is from before the hooks that change a gradient where the backward goes on, and
            # from after them where it ends. A hook of our own, after those, sees the same in both cases.
            watch_made(tensor, _Arrived(self.grads, len(self._seen)), self.port.path)
        if self.wants_value:
            value = tensor if self.live else tensor.detach()
            value = value.clone() if self.snapshot else value
        self._seen.append(_SeenCall(value, version_of(value), tensor if self.is_target else None, edge))

    @property
    def calls(self) -> int:
        """How often the module ran."""
        return len(self._seen)

    def grad(self) -> Tensor | None:
        """The gradient that arrived at the call that counts."""
        self.chosen()
        return self.grads.get(range(len(self._seen))[-1 if self.place.call is None else self.place.call])

    def chosen(self) -> _SeenCall:
        """What the call that counts gave.

        Raises:
            AttributionError: the module did not run, or ran several times and none was chosen.
        """
        name, call = self.place.name, self.place.call
        if not self._seen:
            raise AttributionError(
                f"{name!r} did not run in the forward, so it has no score; select modules that are called, or leave "
                "it out with allow_unused=True"
            )
        if call is None and len(self._seen) > 1:
            raise AttributionError(
                f"{name!r} ran {len(self._seen)} times in one forward; choose one call with call=0 (the first) or "
                "call=-1 (the last)"
            )
        try:
            return self._seen[-1 if call is None else call]
        except IndexError:
            raise AttributionError(f"call={call}: {name!r} ran {len(self._seen)} times in the forward") from None


@dataclass(frozen=True, slots=True)
class _Arrived:
    """Keeps the gradient of one call."""

    grads: dict[int, Tensor]
    call: int

    def __call__(self, grad: Tensor) -> None:
        self.grads[self.call] = grad


class Replacement(Transient):
    """Puts tensors in place of the value at one place, each in the rows of one point."""

    order = Order.EDIT

    def __init__(self, place: Place, call: int | None, parts: Sequence[tuple[PointRows | None, Tensor]]) -> None:
        self.place = place
        self.port = place.port
        self.call = call
        self.parts = parts
        self._calls = count()

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """Exchange the rows, in the call that counts."""
        if next(self._calls) != self.call and self.call is not None:
            return None
        tensor = self.port.read(module, args, rest)
        for rows, part in self.parts:
            new = part.to(tensor)
            if rows is not None:
                axis = rows.axis_at(self.place, tensor)
                if axis is None:
                    raise UnstackableError(f"all rows share the value at {self.port.path!r}", paths=(self.port.path,))
                new = rows.change(tensor, axis, lambda _, new=new: new)  # type: ignore[misc]
            tensor = new
        return self.port.write(module, args, rest, tensor)


def check_unchanged(taps: Iterable[SiteTap]) -> None:
    """Refuse values that an in-place operation has overwritten since they were seen.

    Raises:
        InplaceModificationError: it names every place.
    """
    seen = [(tap, tap.chosen()) for tap in taps if tap.calls]
    stale = [tap.port.path for tap, (value, version, *_) in seen if value is not None and version_of(value) != version]
    if stale:
        raise overwritten(stale, "keep copies with snapshot=True")
