"""Integrated gradients, at the inputs and at layers, in chunks with a running weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.base import Scores, SiteAttribution, Work
from tdcache.attribution.frame import Baseline, Frame, nothing
from tdcache.attribution.gradients import Seen, key_of, same_rows
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, Between, Point, View, expanded, wide
from tdcache.attribution.quadrature import quadrature
from tdcache.attribution.targets import Target
from tdcache.errors import AttributionError
from tdcache.types import Selector

__all__ = ["IntegratedGradients", "PathEnds", "WeightedSum", "WeightedTerm", "gap_key"]


def gap_key(name: str | None, target: str | None, place: Place) -> tuple[Any, ...]:
    """The key of a score's completeness gap: the key of the score below ``"gap"``."""
    return ("gap", *key_of(name, target, place)[1:])


class WeightedSum:
    """A running sum over points of weighted gradients, by place, in at least single precision."""

    def __init__(self) -> None:
        self.sums: dict[Place, Tensor] = {}

    def at(self, place: Place, like: Tensor) -> Tensor:
        """The sum, or zeros if there was no gradient."""
        return self.sums[place] if place in self.sums else torch.zeros_like(wide(like))


@dataclass(frozen=True, slots=True)
class WeightedTerm:
    """The sink of one point: adds its gradients to a sum."""

    total: WeightedSum
    weight: float
    places: list[Place]

    def __call__(self, view: View) -> None:
        """Add the gradients of the point."""
        sums, grads = self.total.sums, view.grads(self.places)
        if len(grads) < len(self.places):
            for place, value in view.values(self.places).items():
                grads.setdefault(place, torch.zeros_like(value))
        for place, grad in grads.items():  # half-precision gradients are added to sums in single precision
            if place in sums:
                sums[place] = torch.add(same_rows(place, sums[place], grad), grad, alpha=self.weight)
            else:
                sums[place] = wide(grad) * self.weight


class IntegratedGradients(SiteAttribution):
    r"""The gradient averaged along the straight path from a baseline, times the difference (Sundararajan et al. 2017).

    Without a selector the inputs are scored. With one, the output of every selected module is scored: the path then
    runs from its activation for the baseline inputs to its activation for the inputs, one module at a time. The scores
    of a module that all information passes through sum to ``f(input) - f(baseline)``; those of a branch to the effect
    of that branch alone. ``("gap", ...)`` holds the remaining difference of each row, from points of the same pass.

    Args:
        selector: which modules; None for the inputs.
        n_steps: the number of points on the path.
        method: ``"gausslegendre"``, ``"trapezoid"``, ``"left"``, ``"middle"`` or ``"right"``.
        baseline: used if ``("baseline", in_key)`` is not given: a number, a tensor, a callable of the input, or a dict
            of these by in_key; zeros by default. For modules, a number or tensor replaces their activation; by default
            the activation for zero inputs, or zeros if all inputs are integers.
        multiply_by_inputs: multiply by the difference; with False, the scores are averaged gradients.
        joint: move all selected modules along their paths at the same time, so that their scores share one sum; by
            default one module at a time. The effect of one selected module on another is then part of neither score.
        **options: see :class:`SiteAttribution`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> square = torch.nn.Bilinear(3, 3, 1)
        >>> with IntegratedGradients(n_steps=2).prepare(square, ["a", "b"]) as hooked:
        ...     td = hooked(TensorDict({"a": torch.ones(4, 3), "b": torch.ones(4, 3)}, batch_size=[4]))
        >>> bool(td["gap", "a"].abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        selector: Selector | None = None,
        *,
        n_steps: int = 50,
        method: str = "gausslegendre",
        baseline: Baseline = None,
        multiply_by_inputs: bool = True,
        joint: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(selector, **options)
        self.nodes = quadrature(method, n_steps)
        self.baseline = baseline
        self.multiply_by_inputs = multiply_by_inputs
        self.joint = joint

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, n_steps={len(self.nodes)})"

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        return self._at_inputs(frame) if self.selector is None else self._at_sites(frame)

    def _at_inputs(self, frame: Frame) -> Work:
        places = frame.explained()
        path = frame.path(self.baseline)
        integrals = {name: _Integral(places) for name in frame.targets}
        yield self._along(frame, path, integrals)
        delta = {place: wide(frame.data.get(place.name) - path.start[place.name]) for place in places}
        return self._scores(frame, [(integrals, delta)])

    def _at_sites(self, frame: Frame) -> Work:
        places = frame.sites()
        high, low = Seen(places, with_grads=False), Seen(places, with_grads=False)
        start, inputs = self._start(frame)
        yield [
            frame.ask(frame.base, high, values=places),
            frame.ask(start, low if inputs else nothing, values=places if inputs else ()),
        ]
        known = low if inputs else None
        ends = {place: (self._low(known, top, place), top) for place, top in high.values.items()}
        asks: list[Ask] = []
        found = []
        for group in [list(ends)] if self.joint else [[place] for place in ends]:
            integrals = {name: _Integral(group) for name in frame.targets}
            asks += self._along(frame, _SitePath(frame, {place: ends[place] for place in group}, id(self)), integrals)
            found.append((integrals, {place: wide(ends[place][1]) - wide(ends[place][0]) for place in group}))
        yield asks
        return self._scores(frame, found)

    def _along(
        self, frame: Frame, path: Callable[[float], Point], integrals: Mapping[str | None, _Integral]
    ) -> list[Ask]:
        """The points of one path, its end and its start."""
        unused = self.selector is None or self.allow_unused
        asks: list[Ask] = []
        for name, target in frame.targets.items():
            total = integrals[name]
            terms = [(node, WeightedTerm(total.sum, weight, total.places)) for node, weight in self.nodes]
            asks += [frame.ask(path(node), term, target, grads=term.places, unused=unused) for node, term in terms]
            asks += total.asks(frame, path, target)
        return asks

    def _start(self, frame: Frame) -> tuple[Point, bool]:
        """The baseline's point, and whether the activations there are needed."""
        if isinstance(self.baseline, Tensor | int | float):
            return frame.base, False
        known = frame.baselines(self.baseline)
        if not known:
            return frame.base, False
        return frame.point(("baseline", id(self)), inputs=known), True

    def _low(self, low: Seen | None, high: Tensor, place: Place) -> Tensor:
        if low is not None:
            return low.beside(place, high)
        value = 0.0 if self.baseline is None else self.baseline
        if not isinstance(value, Tensor):
            return torch.full_like(high, float(value))  # type: ignore[arg-type]  # others made a point
        found = expanded(value.to(high), high)
        if found is None:
            raise AttributionError(
                f"the baseline of {place.name!r} has shape {tuple(value.shape)}, the activation {tuple(high.shape)}; "
                "give one of that shape"
            )
        return found

    def _scores(
        self, frame: Frame, found: Sequence[tuple[Mapping[str | None, _Integral], Mapping[Place, Tensor]]]
    ) -> Scores:
        scores: dict[tuple[Any, ...], Any] = {}
        for integrals, delta in found:
            for name, total in integrals.items():
                grads = {place: total.sum.at(place, step) for place, step in delta.items()}
                products = {place: grads[place] * step for place, step in delta.items()}
                gap = frame.completeness_gap(products, total.rise())
                for place in delta:
                    chosen = products if self.multiply_by_inputs else grads
                    scores[key_of(self.name, name, place)] = self._summed(chosen[place])
                    scores[gap_key(self.name, name, place)] = gap
        return scores


class PathEnds:
    """The values of one target at both ends of a path."""

    def __init__(self) -> None:
        self.high = Seen((), with_values=False)
        self.low = Seen((), with_values=False)

    def asks(self, frame: Frame, path: Callable[[float], Point], target: Target) -> list[Ask]:
        """Request the target at the path's start, and at the user's own rows."""
        return [frame.ask(path(0.0), self.low, target), frame.ask(frame.base, self.high, target)]

    def rise(self) -> Tensor:
        """The change of the target along the path."""
        return wide(self.high.needed_target()) - wide(self.low.needed_target())


class _Integral(PathEnds):
    """The gradients of one target along one path, and its values at both ends."""

    def __init__(self, places: list[Place]) -> None:
        super().__init__()
        self.places = places
        self.sum = WeightedSum()


@dataclass(frozen=True, slots=True)
class _SitePath:
    """The points between the activations for the baseline and for the inputs."""

    frame: Frame
    ends: Mapping[Place, tuple[Tensor, Tensor]]
    tag: int

    def __call__(self, node: float) -> Point:
        low, high = ({place: ends[at] for place, ends in self.ends.items()} for at in (0, 1))
        return self.frame.point(("site path", tuple(low), node, self.tag), replace=Between(low, high, node))
