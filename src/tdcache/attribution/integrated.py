"""Integrated gradients, at the inputs and at layers, in chunks with a running weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.asks import Ask, Place, Point, View, wide
from tdcache.attribution.base import Attribution, Scores, Work
from tdcache.attribution.frame import Baseline, Frame, nothing
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.quadrature import quadrature
from tdcache.errors import AttributionError
from tdcache.selection import as_matcher
from tdcache.types import Match, Pick, Selector

__all__ = ["IntegratedGradients", "WeightedSum", "gap_key", "row_sum"]


def gap_key(name: str | None, target: str | None, place: Place) -> tuple[Any, ...]:
    """Where the completeness gap of a score is written: the score's key below ``"gap"``."""
    return ("gap", *key_of(name, target, place)[1:])


class WeightedSum:
    """A running sum over points of weighted gradients, by place, in at least single precision."""

    def __init__(self) -> None:
        self.sums: dict[Place, Tensor] = {}

    def sink(self, weight: float, places: list[Place]) -> _Term:
        """The sink of one point."""
        return _Term(self, weight, places)


@dataclass(frozen=True, slots=True)
class _Term:
    total: WeightedSum
    weight: float
    places: list[Place]

    def __call__(self, view: View) -> None:
        sums = self.total.sums
        for place in self.places:
            if not view.reached(place):
                continue
            term = wide(view.grad(place))
            sums[place] = torch.add(sums[place], term, alpha=self.weight) if place in sums else term * self.weight


class IntegratedGradients(Attribution):
    r"""The gradient averaged along the straight path from a baseline, times the difference (Sundararajan et al. 2017).

    Without a selector the inputs are explained. With one, every selected module's output: the path then runs from its
    activation for the baseline inputs to its activation for the inputs, one module at a time. The scores of a module
    whose output all information passes through sum to ``f(input) - f(baseline)``; those of a branch to the effect of
    that branch alone. ``("gap", ...)`` holds, per row, by how much the sum misses this, from points of the same pass.

    Args:
        selector: which modules; None for the inputs.
        n_steps: the number of points on the path.
        method: ``"gausslegendre"``, ``"trapezoid"``, ``"left"``, ``"middle"`` or ``"right"``.
        baseline: where ``("baseline", in_key)`` is not given: a number, a tensor, a callable of the input, or a dict of
            these by in_key; zeros by default. For modules, a number or tensor takes the place of their activation; by
            default that of zero inputs, or zeros where all inputs are integers.
        multiply_by_inputs: multiply by the difference; without, the scores are averaged gradients.
        match: see :class:`SiteAttribution`.
        pick: likewise.
        call: likewise.
        **options: see :class:`Attribution`.

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
        match: Match = "full",
        pick: Pick = None,
        call: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if selector is not None:
            as_matcher(selector, match)
        self.selector = selector
        self.match: Match = match
        self.pick = pick
        self.call = call
        self.nodes = quadrature(method, n_steps)
        self.baseline = baseline
        self.multiply_by_inputs = multiply_by_inputs

    def __repr__(self) -> str:
        where = "" if self.selector is None else f"{self.selector!r}, "
        return f"{type(self).__name__}({where}target={self.target!r}, n_steps={len(self.nodes)})"

    def selectors_by_role(self) -> Mapping[str, tuple[Selector, Match]]:
        """The selectors of the method by role."""
        return {} if self.selector is None else {"sites": (self.selector, self.match)}

    def site_options(self, role: str) -> tuple[Pick, int | None]:
        """Which tensor and which call of the selected modules."""
        return (self.pick, self.call)

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        return self._at_inputs(frame) if self.selector is None else self._at_sites(frame)

    def _at_inputs(self, frame: Frame) -> Work:
        places = frame.explained()
        start = frame.baselines(self.baseline)
        tag = (
            ("given",)
            if self.baseline is None
            else self.baseline
            if isinstance(self.baseline, int | float)
            else id(self)
        )
        sums = {name: WeightedSum() for name in frame.targets}
        high = {name: Seen((), with_values=False) for name in frame.targets}
        low = {name: Seen((), with_values=False) for name in frame.targets}
        asks: list[Ask] = []
        for name, target in frame.targets.items():
            asks += [
                frame.ask(
                    frame.along(start, node, tag), sums[name].sink(weight, places), target, grads=places, unused=True
                )
                for node, weight in self.nodes
            ]
            asks.append(frame.ask(frame.along(start, 0.0, tag), low[name], target))
            asks.append(frame.ask(frame.base, high[name], target))
        yield asks
        delta = {place: frame.data.get(place.name) - start[place.name] for place in places}
        return self._scores(sums, dict.fromkeys(sums, delta), _differences(high, low), joint=True)

    def _at_sites(self, frame: Frame) -> Work:
        places = frame.sites()
        high, low = Seen(places, with_grads=False), Seen(places, with_grads=False)
        start, inputs = self._start(frame)
        yield [
            frame.ask(frame.base, high, values=places),
            frame.ask(start, low if inputs else nothing, values=places if inputs else ()),
        ]
        ends = {place: (self._low(low, high.values[place], place), high.values[place]) for place in places}
        sums = {name: WeightedSum() for name in frame.targets}
        at_high = {name: Seen((), with_values=False) for name in frame.targets}
        at_low = {(name, place): Seen((), with_values=False) for name in frame.targets for place in places}
        asks = []
        for name, target in frame.targets.items():
            for place in places:
                path = _SitePath(frame, place, *ends[place], id(self))
                asks += [
                    frame.ask(path(node), sums[name].sink(weight, [place]), target, grads=[place])
                    for node, weight in self.nodes
                ]
                asks.append(frame.ask(path(0.0), at_low[name, place], target))
            asks.append(frame.ask(frame.base, at_high[name], target))
        yield asks
        delta = {place: wide(top) - wide(bottom) for place, (bottom, top) in ends.items()}
        gaps = {(n, place): _minus(at_high[n], seen) for (n, place), seen in at_low.items()}
        return self._scores(sums, dict.fromkeys(sums, delta), gaps, joint=False)

    def _start(self, frame: Frame) -> tuple[Point, bool]:
        """The baseline's point, and whether the activations there are wanted."""
        if isinstance(self.baseline, Tensor | int | float):
            return frame.base, False
        known = frame.baselines(self.baseline)
        if not known:
            return frame.base, False
        return frame.point(("baseline", id(self)), inputs=known), True

    def _low(self, low: Seen, high: Tensor, place: Place) -> Tensor:
        if low.values:
            return low.values[place]
        value = 0.0 if self.baseline is None else self.baseline
        if not isinstance(value, Tensor):
            return torch.full_like(high, float(value))  # type: ignore[arg-type]  # others made a point
        try:
            return value.to(high).expand_as(high)
        except RuntimeError:
            raise AttributionError(
                f"the baseline of {place.name!r} has shape {tuple(value.shape)}, the activation {tuple(high.shape)}; "
                "give one of that shape"
            ) from None

    def _scores(
        self,
        sums: dict[str | None, WeightedSum],
        deltas: dict[str | None, dict[Place, Tensor]],
        wanted: Mapping[Any, Tensor],
        *,
        joint: bool,
    ) -> Scores:
        scores: dict[tuple[Any, ...], Any] = {}
        for name, total in sums.items():
            delta = deltas[name]
            grads = {place: total.sums.get(place, torch.zeros_like(delta[place])) for place in delta}
            products = {place: grads[place] * wide(delta[place]) for place in delta}
            for place in delta:
                scores[key_of(self.name, name, place)] = products[place] if self.multiply_by_inputs else grads[place]
                gap = wanted[name if joint else (name, place)]
                parts = list(products.values()) if joint else [products[place]]
                scores[gap_key(self.name, name, place)] = row_sum(parts, gap) - wide(gap)
        return scores


@dataclass(frozen=True, slots=True)
class _SitePath:
    """The points of the path at one site."""

    frame: Frame
    place: Place
    low: Tensor
    high: Tensor
    tag: int

    def __call__(self, node: float) -> Point:
        path = str(self.place.name)
        value = self.low + node * (self.high - self.low)
        return self.frame.point(("site path", path, node, self.tag), replace={path: value})


def _minus(high: Seen, low: Seen) -> Tensor:
    if high.target is None or low.target is None:
        raise AttributionError("the target was not computed at both ends of the path")
    return wide(high.target) - wide(low.target)


def _differences(high: Mapping[Any, Seen], low: Mapping[Any, Seen]) -> dict[Any, Tensor]:
    return {name: _minus(high[name], low[name]) for name in high}


def row_sum(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sum of all scores of each row, in the shape of the target's values."""
    total = torch.zeros_like(wide(like))
    for part in parts:
        if like.ndim and part.shape[: like.ndim] != like.shape:
            return total + torch.nan  # rows are not the leading axis here, so that the sum per row is unknown
        total = total + part.reshape(*like.shape, -1).sum(-1)
    return total
