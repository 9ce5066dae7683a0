"""The backward of a pass: targets' values at each point, and one gradient of their sum for all places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, PointRows
from tdcache.attribution.taps import SiteTap
from tdcache.attribution.targets import At, Target, Unit, row_values
from tdcache.errors import AttributionError, listed

__all__ = ["Targets", "gradients"]


class Targets:
    """The targets of one forward.

    Args:
        after: the TensorDict after it.
        taps: what was seen at its sites.
    """

    def __init__(self, after: TensorDictBase, taps: dict[Place, SiteTap]) -> None:
        self.after = after
        self.taps = taps
        self.found: dict[tuple[int, PointRows | None], Tensor] = {}
        """The values of each target (by its identity) at each point, one per row."""
        self.seeds: dict[int, list[Tensor]] = {}

    def outputs(self, part: PointRows | None) -> TensorDictBase:
        """The rows of one point."""
        return self.after if part is None else self.after[part.start : part.stop]

    def compute(self, target: Target | None, entries: Sequence[tuple[Ask, PointRows | None]]) -> None:
        """Compute a target at the points of ``entries``."""
        if target is None:
            return
        whole = None
        if isinstance(target, At) and target.is_one_for_all:  # all points at once: no slice of the TensorDict each
            whole = row_values(target, target(self.after), self.after.batch_size)
        differentiated: dict[PointRows | None, bool] = {}
        for ask, part in entries:
            differentiated[part] = differentiated.get(part, False) or bool(ask.grads)
        for part in differentiated:
            self.found[id(target), part] = self._at(target, part) if whole is None else _rows_of(whole, part)
        if whole is not None and all(differentiated.values()) and _cover(differentiated):
            self.seeds[id(target)] = [whole]
        else:
            self.seeds[id(target)] = [self.found[id(target), part] for part, grads in differentiated.items() if grads]

    def _at(self, target: Target, part: PointRows | None) -> Tensor:
        outputs = self.outputs(part)
        if not isinstance(target, Unit):
            return row_values(target, target(outputs), outputs.batch_size)
        value: Any = self.taps[target.place].chosen().live
        own = value if part is None else part.part(value, part.axis_at(target.place, value))
        return row_values(target, target.of(own), outputs.batch_size)


def _cover(parts: Iterable[PointRows | None]) -> bool:
    """Whether the points have all rows of their forward."""
    found = list(filter(None, parts))
    return not found or sum(part.stop - part.start for part in found) == found[0].total


def _rows_of(whole: Tensor, part: PointRows | None) -> Tensor:
    return whole if part is None else whole[part.start : part.stop]


def gradients(
    targets: Targets,
    target: Target | None,
    asks: Sequence[Ask],
    inputs: dict[Place, Tensor],
    *,
    keep: bool,
    graph: bool,
) -> dict[Place, Tensor]:
    """One backward of the sum of a target's values: the gradient at every place that the asks want.

    Raises:
        AttributionError: none reaches a place, and the ask does not say that it may be unused.
    """
    taps = targets.taps
    needed: set[Place] = set()
    wanted: dict[Place, Any] = {}
    for ask in asks:
        if not ask.unused:
            needed.update(ask.grads)
        for place in ask.grads:
            if place in inputs:
                wanted[place] = inputs[place]
            elif place in taps:  # what did not run, and need not, has none
                wanted[place] = taps[place].chosen().edge
    seeds = [] if target is None else [seed for seed in targets.seeds.get(id(target), []) if seed.requires_grad]
    if not seeds:
        if not needed:
            return {}
        raise AttributionError(
            f"the target does not depend on {listed([str(place.name) for place in wanted])}: no gradient can reach "
            "it; is the output detached, or the site not used?"
        )
    arrived = _arrived(seeds, wanted, taps, inputs, keep=keep, graph=graph)
    missing = [str(place.name) for place in wanted if place in needed and place not in arrived]
    if missing:
        raise AttributionError(
            f"no gradient reaches {listed(missing)}: the target does not depend on it, or it is detached "
            "or overwritten in place on the way; select other sites, or allow_unused=True for scores of zero"
        )
    return arrived


def _arrived(
    seeds: Sequence[Tensor],
    wanted: Mapping[Place, Any],
    taps: Mapping[Place, SiteTap],
    inputs: Mapping[Place, Tensor],
    *,
    keep: bool,
    graph: bool,
) -> dict[Place, Tensor]:
    others = [tensor for place, tensor in inputs.items() if place not in wanted and tensor.requires_grad]
    for tap in taps.values():
        tap.grads.clear()
    # Ones for each value are the gradient of their sum. Of complex ones there is none, and torch says so.
    ones = [None if seed.is_complex() else torch.ones_like(seed) for seed in seeds]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        seeds, [*wanted.values(), *others], ones, allow_unused=True, retain_graph=keep, create_graph=graph
    )
    arrived = {}
    for place, grad in zip(wanted, found, strict=False):
        own = taps[place].grad() if place in taps else grad
        if own is not None:
            arrived[place] = own
    return arrived
