"""Attribution patching: what patching an activation would do to the target, to first order, for all sites at once.

The sign: scores estimate ``metric(patched) - metric(base)``, where the base is the TensorDict's own input and the patch
comes from its ``("corrupt", in_key)`` entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.base import SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.modifiers import GradDrop
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, wide
from tdcache.attribution.reductions import difference_x_gradient
from tdcache.errors import AttributionError
from tdcache.place_modules import sites_of
from tdcache.types import Selector

__all__ = ["AttributionPatching"]


class AttributionPatching(SiteAttribution):
    """The difference between two inputs' activations times the base input's gradient (Nanda 2023; AtP).

    The counterfactual runs in the same forward. Without ``("corrupt", in_key)`` entries the patch is zero, so that the
    scores estimate zero ablation.

    Args:
        selector: which modules; also what a splice adds, such as the latents and the error of a dictionary.
        drop: GradDrop of AtP* (Kramár et al. 2024, arXiv:2403.00745): a selector of the modules whose outputs are added
            to the residual stream, with a named group ``layer``. One backward per layer leaves that layer out; the
            scores are then the mean of the absolute estimates, ``sum_l |AtP_l| / (L - 1)``, which cancel less.
        **options: see :class:`SiteAttribution`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
        >>> x = {"input": torch.randn(4, 3), "corrupt": {"input": torch.randn(4, 3)}}
        >>> with AttributionPatching("1", target=0, reduce=-1).prepare(model) as hooked:
        ...     hooked(TensorDict(x, batch_size=[4]))["attr", "1"].shape
        torch.Size([4])
    """

    def __init__(self, selector: Selector, *, drop: Selector | None = None, **options: Any) -> None:
        super().__init__(selector, **options)
        self.drop = drop

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.sites()
        corrupt = frame.counterfactual(required=False)
        other = Seen(places, with_grads=False) if corrupt.inputs else None
        points = [frame.base] if self.drop is None else self._dropping(frame)
        seen = {(name, at): Seen(places) for name in frame.targets for at in range(len(points))}
        unused = self.allow_unused or self.drop is not None
        asks: list[Ask] = [
            frame.ask(points[at], each, frame.targets[name], values=places, grads=places, unused=unused)
            for (name, at), each in seen.items()
        ]
        if other is not None:
            asks.append(frame.ask(corrupt, other, values=places, unused=unused))
        yield asks
        scores: dict[tuple[Any, ...], Tensor] = {}
        for name in frame.targets:
            for place in seen[name, 0].values:
                parts = [self._score(seen[name, at], other, place) for at in range(len(points))]
                scores[key_of(self.name, name, place)] = parts[0] if self.drop is None else _mean_size(parts)
        return scores

    def _score(self, seen: Seen, other: Seen | None, place: Place) -> Tensor:
        base = wide(seen.values[place])
        patched = torch.zeros_like(base) if other is None else wide(other.beside(place, base))
        return self._summed(difference_x_gradient(base, patched, seen.grad(place, base)))

    def _dropping(self, frame: Frame) -> list[Any]:
        """One point per layer, whose backward leaves that layer's contribution out."""
        layers: dict[str, list[str]] = {}
        for path, _, groups in sites_of(frame.model, self.drop or "", self.names):
            if "layer" not in groups:
                raise AttributionError(
                    f"drop={self.drop!r} has no group 'layer'; write e.g. r'layers\\.(?P<layer>\\d+)\\.(attn|mlp)'"
                )
            layers.setdefault(groups["layer"], []).append(path)
        if len(layers) < 2:
            raise AttributionError(f"drop={self.drop!r} means {len(layers)} layer(s); GradDrop averages over several")
        return [
            frame.point(("drop", layer, id(self)), modifiers=(GradDrop(paths, self.names),))
            for layer, paths in layers.items()
        ]


def _mean_size(parts: list[Tensor]) -> Tensor:
    # c = 1 / (L - 1) * sum_l |AtP_l|: of L runs one leaves out the node's own layer.
    return torch.stack(parts).abs().sum(0) / (len(parts) - 1)
