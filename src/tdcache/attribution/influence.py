"""What layers receive along a path of the inputs: internal influence and conductance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.base import SiteAttribution, Work
from tdcache.attribution.frame import Baseline, Frame
from tdcache.attribution.gradients import key_of, same_rows
from tdcache.attribution.integrated import PathEnds, WeightedSum, WeightedTerm, gap_key
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, View, wide
from tdcache.attribution.quadrature import quadrature
from tdcache.types import Selector

__all__ = ["Conductance", "InternalInfluence"]


class _PathMethod(SiteAttribution):
    """A site method over a path of the inputs.

    Args:
        selector: which modules.
        n_steps: the number of points, or of intervals, on the path.
        method: a rule of :func:`~tdcache.attribution.quadrature.quadrature`.
        baseline: see :class:`IntegratedGradients`.
        **options: see :class:`SiteAttribution`.
    """

    def __init__(
        self,
        selector: Selector,
        *,
        n_steps: int = 50,
        method: str = "gausslegendre",
        baseline: Baseline = None,
        **options: Any,
    ) -> None:
        super().__init__(selector, **options)
        self.n_steps = n_steps
        self.method = method
        self.baseline = baseline
        self.nodes = quadrature(method, n_steps)


class InternalInfluence(_PathMethod):
    """The gradient at each selected module, averaged along the inputs' path (Leino et al. 2018, arXiv:1802.03788)."""

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.sites()
        frame.explained()  # integers have no path: the error says what to do
        path = frame.path(self.baseline)
        sums = {name: WeightedSum() for name in frame.targets}
        values = places if self.allow_unused else ()  # where no gradient comes, zeros of their shape
        yield [
            frame.ask(path(node), WeightedTerm(sums[name], weight, places), target, values=values, grads=places)
            for name, target in frame.targets.items()
            for node, weight in self.nodes
        ]
        return {
            key_of(self.name, name, place): self._summed(total)
            for name, integral in sums.items()
            for place, total in integral.sums.items()
        }


class Conductance(_PathMethod):
    """What flows through each selected module along the inputs' path (Dhamdhere et al. 2018, arXiv:1805.12233).

    ``sum_k g_k * (a_{k+1} - a_k)`` over activations ``a`` and their gradients ``g`` at ``n_steps + 1`` points. By
    default these are Gauss-Legendre nodes and the gradient is that at the step's beginning, as in captum; the nodes
    leave out the path's ends, so that the scores miss ``f(input) - f(baseline)`` by the first order of the step. With
    ``method="trapezoid"`` the steps begin and end at the path's ends and gradients are averaged over a step, so that
    the scores of a layer that everything passes through sum to the difference up to the second order. ``("gap", ...)``
    holds, per row, by how much they miss it.

    Args:
        selector: which modules.
        n_steps: the number of steps.
        method: where the points lie; a rule of :func:`~tdcache.attribution.quadrature.quadrature`.
        **options: see :class:`IntegratedGradients` and :class:`SiteAttribution`.
    """

    def __init__(self, selector: Selector, **options: Any) -> None:
        super().__init__(selector, **options)
        self.nodes = quadrature(self.method, self.n_steps + 1)

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.sites()
        frame.explained()
        path = frame.path(self.baseline)
        steps = {name: _Steps(places, len(self.nodes), self.method == "trapezoid") for name in frame.targets}
        ends = {name: PathEnds() for name in frame.targets}
        asks: list[Ask] = []
        for name, target in frame.targets.items():
            asks += [
                frame.ask(path(node), _StepSink(steps[name], at), target, values=places, grads=places)
                for at, (node, _) in enumerate(self.nodes)
            ]
            asks += ends[name].asks(frame, path, target)
        yield asks
        scores = {}
        for name, total in steps.items():
            rise = ends[name].rise()
            for place, found in total.sums.items():
                scores[key_of(self.name, name, place)] = self._summed(found)
                scores[gap_key(self.name, name, place)] = frame.completeness_gap({place: found}, rise)
        return scores


class _Steps:
    """A running sum over the steps between neighbouring points, which may arrive in any order."""

    def __init__(self, places: Sequence[Place], count: int, average: bool) -> None:
        self.places = places
        self.count = count
        self.average = average
        self.sums: dict[Place, Tensor] = {}
        self.waiting: dict[int, dict[Place, tuple[Tensor, Tensor]]] = {}
        self.done: set[int] = set()

    def add(self, low: int) -> None:
        """Add the step from point ``low`` to the next."""
        for place in self.places:
            if place not in self.waiting[low] or place not in self.waiting[low + 1]:
                continue
            (before, grad), (after, next_grad) = self.waiting[low][place], self.waiting[low + 1][place]
            change = same_rows(place, after, before) - before
            slope = (grad + next_grad) / 2 if self.average else grad
            term = slope * change  # g_k (a_{k+1} - a_k)
            self.sums[place] = same_rows(place, self.sums[place], term) + term if place in self.sums else term
        self.done.add(low)
        for at in (low, low + 1):  # a point between two steps that are done is not needed any more
            if (at == 0 or at - 1 in self.done) and (at == self.count - 1 or at in self.done):
                del self.waiting[at]


@dataclass(frozen=True, slots=True)
class _StepSink:
    """The sink of the point number ``at``."""

    steps: _Steps
    at: int

    def __call__(self, view: View) -> None:
        steps, at = self.steps, self.at
        grads = view.grads(steps.places)
        steps.waiting[at] = {
            place: (wide(value), wide(grads.get(place, torch.zeros_like(value))))
            for place, value in view.values(steps.places).items()
        }
        for low in (at - 1, at):
            if low in steps.waiting and low + 1 in steps.waiting:
                steps.add(low)
