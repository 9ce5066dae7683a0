"""The backward of a pass: targets' values at each point, and one gradient of their sum for all places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, PointRows
from tdcache.attribution.taps import SiteTap
from tdcache.attribution.targets import At, Target, Unit, row_values
from tdcache.errors import AttributionError, listed
from tdcache.types import CacheKey

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
        for ask, part in entries:
            if (id(target), part) not in self.found:
                if whole is None:
                    value = self._at(target, part)
                else:
                    value = whole if part is None else whole[part.start : part.stop]
                self.found[id(target), part] = value
                if any(ask.grads for ask, other in entries if other == part):
                    self.seeds.setdefault(id(target), []).append(value)

    def _at(self, target: Target, part: PointRows | None) -> Tensor:
        outputs = self.outputs(part)
        if not isinstance(target, Unit):
            return row_values(target, target(outputs), outputs.batch_size)
        value = self.taps[target.place].chosen().live
        if value is None:
            raise AttributionError(f"target {target!r}: nothing was seen there")
        own = value if part is None else part.part(value, part.axis_at(target.place, value))
        return row_values(target, target.of(own), outputs.batch_size)


def gradients(
    targets: Targets,
    target: Target | None,
    asks: Sequence[Ask],
    inputs: dict[CacheKey, Tensor],
    *,
    keep: bool,
    graph: bool,
) -> dict[Place, Tensor]:
    """One backward of the sum of a target's values: the gradient at every place that the asks want.

    Raises:
        AttributionError: none reaches a place, and the ask does not say that it may be unused.
    """
    taps = targets.taps
    lenient = {place for ask in asks if ask.unused for place in ask.grads}
    wanted = [
        place
        for place in dict.fromkeys(place for ask in asks for place in ask.grads)
        if place.kind == "key" or place in taps or place not in lenient
    ]
    seeds = [] if target is None else [seed for seed in targets.seeds.get(id(target), []) if seed.requires_grad]
    if not seeds:
        if all(place in lenient for place in wanted):
            return {}
        raise AttributionError(
            f"the target does not depend on {listed([str(place.name) for place in wanted])}: no gradient can reach "
            "it; is the output detached, or the site not used?"
        )
    arrived = _arrived(seeds, wanted, taps, inputs, keep=keep, graph=graph)
    missing = [str(place.name) for place in wanted if arrived[place] is None and place not in lenient]
    if missing:
        raise AttributionError(
            f"no gradient reaches {listed(missing)}: the target does not depend on it, or it is detached "
            "or overwritten in place on the way; select other sites, or allow_unused=True for scores of zero"
        )
    return {place: grad for place, grad in arrived.items() if grad is not None}


def _arrived(
    seeds: Sequence[Tensor],
    wanted: Sequence[Place],
    taps: dict[Place, SiteTap],
    inputs: dict[CacheKey, Tensor],
    *,
    keep: bool,
    graph: bool,
) -> dict[Place, Tensor | None]:
    keys = {Place("key", key): tensor for key, tensor in inputs.items()}
    edges: list[Any] = [keys[place] if place in keys else taps[place].chosen().edge for place in wanted]
    others = [tensor for place, tensor in keys.items() if place not in wanted and tensor.requires_grad]
    for tap in taps.values():
        tap.grads.clear()
    # Ones for each value are the gradient of their sum. Of complex ones there is none, and torch says so.
    ones = [None if seed.is_complex() else torch.ones_like(seed) for seed in seeds]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        seeds, [*edges, *others], ones, allow_unused=True, retain_graph=keep, create_graph=graph
    )
    arrived = dict(zip(wanted, found, strict=False))
    return arrived | {place: taps[place].grad() for place in wanted if place in taps}
