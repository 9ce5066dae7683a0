"""The hooks of one forward of a pass: they note values and the graph's edges, and put replacements in place.

Gradients are asked of the edge of the graph that a tensor had when it was seen, so that an operation that later changes
it in place changes neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tdcache.attribution.asks import Place, Rows
from tdcache.errors import AttributionError, InplaceModificationError, listed
from tdcache.hooks import Order
from tdcache.hooks.values import leaves, pick_tensor, replace_tensor
from tdcache.types import Pick

__all__ = ["InputTap", "OutputTap", "Replacement", "check_unchanged"]

_CLOCK = count(1)


class _Tap:
    """Notes what passes one place in one forward: the value of each call, and the edge its gradient comes by."""

    order = Order.EDIT_GRADIENT  # behind the edits, whose result counts, and before the captures, which see our alias

    def __init__(self, place: Place, pick: Pick, call: int | None) -> None:
        self.place = place
        self.pick = pick
        self.call = call
        self.wants_value = False
        self.wants_grad = False
        self.snapshot = False
        self.live = False
        self.grads: dict[int, Tensor] = {}
        """The gradient of each call in the latest backward."""
        self.when = 0
        """When the place was seen first."""
        self._seen: list[tuple[Tensor | None, int, GradientEdge | None]] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place.name!r})"

    def note(self, tensor: Tensor) -> None:
        """Keep the value and the edge of one call."""
        self.when = self.when or next(_CLOCK)
        edge = None
        if self.wants_grad:
            edge = get_gradient_edge(tensor)
            tensor.register_hook(_Arrived(self.grads, len(self._seen)))
        value = None
        if self.wants_value:
            value = tensor if self.live else tensor.detach()
            value = value.clone() if self.snapshot else value
        version = -1 if value is None or value.is_inference() else value._version
        self._seen.append((value, version, edge))

    @property
    def calls(self) -> int:
        """How often the module ran."""
        return len(self._seen)

    def grad(self) -> Tensor | None:
        """The gradient that arrived at the call that counts."""
        self.chosen()
        return self.grads.get(range(len(self._seen))[-1 if self.call is None else self.call])

    def chosen(self) -> tuple[Tensor | None, int, GradientEdge | None]:
        """What the call that counts gave.

        Raises:
            AttributionError: the module did not run, or ran several times and none was chosen.
        """
        if not self._seen:
            raise AttributionError(
                f"{self.place.name!r} did not run in the forward, so it has no score; select modules that are called"
            )
        if self.call is None and len(self._seen) > 1:
            raise AttributionError(
                f"{self.place.name!r} ran {len(self._seen)} times in one forward; choose one call with call=0 (the "
                "first) or call=-1 (the last)"
            )
        try:
            return self._seen[-1 if self.call is None else self.call]
        except IndexError:
            raise AttributionError(
                f"call={self.call}: {self.place.name!r} ran {len(self._seen)} times in the forward"
            ) from None


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A tensor hook that keeps the gradient, behind the hooks that change it.

    What ``autograd.grad`` returns is from before those hooks where the backward goes on, and from behind where not.
    """

    grads: dict[int, Tensor]
    call: int

    def __call__(self, grad: Tensor) -> None:
        self.grads[self.call] = grad


class OutputTap(_Tap):
    """Notes what a module returns."""

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Note it; hands on another tensor of the same value where the gradient could not be told otherwise."""
        tensor = pick_tensor(output, self.pick, str(self.place.name))
        passed = _with_graph(tensor, args, self.place) if self.wants_grad else tensor
        self.note(passed)
        return None if passed is tensor else replace_tensor(output, passed, pick=self.pick, path=str(self.place.name))


class InputTap(_Tap):
    """Notes what a module reads, through an alias, so that the gradient is that of this reader alone."""

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note the first tensor among the arguments."""
        path = str(self.place.name)
        tensor = pick_tensor((args, kwargs), self.pick, path)
        if not self.wants_grad:
            self.note(tensor)
            return None
        alias = tensor.view_as(tensor) if tensor.requires_grad else _with_graph(tensor, (), self.place)
        self.note(alias)
        return replace_tensor((args, kwargs), alias, pick=self.pick, path=path)


def _with_graph(tensor: Any, args: Any, place: Place) -> Any:
    """``tensor``, or one of the same value whose gradient is that of the module's output alone."""
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise AttributionError(f"the value at {place.name!r} is {kind}, which has no gradient; choose with pick=")
    if not tensor.requires_grad:  # frozen parameters and integer inputs: the graph begins here
        return tensor.detach().requires_grad_().clone()
    if tensor.is_leaf or any(tensor is each for _, each in leaves(args)):
        return tensor.clone()
    return tensor


class Replacement:
    """Puts a tensor in place of a module's output, in the rows of one point."""

    order = Order.EDIT

    def __init__(self, path: str, pick: Pick, call: int | None, parts: Sequence[tuple[Rows | None, Tensor]]) -> None:
        self.path = path
        self.pick = pick
        self.call = call
        self.parts = parts
        self._calls = count()

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Exchange the rows, in the call that counts."""
        if next(self._calls) != self.call and self.call is not None:
            return output
        tensor = pick_tensor(output, self.pick, self.path)
        for rows, part in self.parts:
            new = part.to(tensor)
            tensor = new if rows is None else rows.exchange(tensor, self.path, new)
        return replace_tensor(output, tensor, pick=self.pick, path=self.path)


def check_unchanged(taps: Sequence[_Tap]) -> None:
    """Refuse values that an in-place operation has overwritten since they were seen.

    Raises:
        InplaceModificationError: it names every place.
    """
    stale = []
    for tap in taps:
        value, version, _ = tap.chosen()
        if value is not None and version >= 0 and value._version != version:
            stale.append(str(tap.place.name))
    if stale:
        raise InplaceModificationError(
            f"the values at {listed(stale)} were changed in place after they were seen; keep copies with snapshot=True",
            paths=stale,
        )
