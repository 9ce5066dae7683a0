"""Attribution patching: what patching an activation would do to the target, to first order, for all sites at once.

The sign: scores estimate ``metric(patched) - metric(base)``, where the base is the TensorDict's own input and the patch
comes from its ``("corrupt", in_key)`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.asks import Ask, Place, wide
from tdcache.attribution.base import Attribution, SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.modifiers import GradDrop
from tdcache.attribution.reductions import difference_x_gradient
from tdcache.errors import AttributionError
from tdcache.selection import select
from tdcache.types import Match, Selector

__all__ = ["AttributionPatching", "QKAttributionPatching"]


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
        other = Seen(places, with_grads=False)
        points = [frame.base] if self.drop is None else self._dropping(frame)
        seen = {(name, at): Seen(places) for name in frame.targets for at in range(len(points))}
        asks: list[Ask] = [
            frame.ask(points[at], each, frame.targets[name], values=places, grads=places, unused=self.drop is not None)
            for (name, at), each in seen.items()
        ]
        if self.drop is not None:
            for each in seen.values():
                each.lenient = True
        if corrupt.inputs:
            asks.append(frame.ask(corrupt, other, values=places))
        yield asks
        scores: dict[tuple[Any, ...], Tensor] = {}
        for name in frame.targets:
            for place in places:
                parts = [self._score(seen[name, at], other, place) for at in range(len(points))]
                scores[key_of(self.name, name, place)] = parts[0] if self.drop is None else _mean_size(parts)
        return scores

    def _score(self, seen: Seen, other: Seen, place: Place) -> Tensor:
        base = wide(seen.values[place])
        patched = wide(other.values[place]) if other.values else torch.zeros_like(base)
        grad = seen.grads.get(place)
        estimate = difference_x_gradient(base, patched, torch.zeros_like(base) if grad is None else wide(grad))
        return self._summed(estimate)

    def _dropping(self, frame: Frame) -> list[Any]:
        """One point per layer, whose backward leaves that layer's contribution out."""
        layers: dict[str, list[str]] = {}
        for path, _, groups in select(frame.model, self.drop or ""):
            if "layer" not in groups:
                raise AttributionError(
                    f"drop={self.drop!r} has no group 'layer'; write e.g. r'layers\\.(?P<layer>\\d+)\\.(attn|mlp)'"
                )
            layers.setdefault(groups["layer"], []).append(path)
        if len(layers) < 2:
            raise AttributionError(f"drop={self.drop!r} means {len(layers)} layer(s); GradDrop averages over several")
        return [frame.point(("drop", layer, id(self)), modifiers=(GradDrop(paths),)) for layer, paths in layers.items()]


def _mean_size(parts: list[Tensor]) -> Tensor:
    # c = 1 / (L - 1) * sum_l |AtP_l|: of L runs one leaves out the node's own layer.
    return torch.stack(parts).abs().sum(0) / (len(parts) - 1)


class QKAttributionPatching(Attribution):
    """AtP* at queries and keys: the softmax is recomputed, and only what follows is linear (the QK fix).

    Gradient estimates at queries and keys fail where attention is saturated. Here a query's score is the change of its
    own row of the pattern times the pattern's gradient, ``sum_k (softmax(q' K^T) - P) * G``; a key's the change of all
    rows when that key alone is replaced (Kramár et al. 2024, arXiv:2403.00745, section 3.1).

    Scores have shape ``(batch, position, heads)``, below the paths of the query and key modules.

    Args:
        query: which modules give the queries, ``(batch, position, heads, d_head)`` or ``(batch, position, d_model)``.
        key: which give the keys, as many.
        pattern: which give the attention probabilities, ``(batch, heads, query, key)``, as many.
        heads: the number of heads.
        scale: what logits are multiplied by; ``d_head ** -0.5`` by default.
        match: how patterns are held against paths.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        query: Selector,
        key: Selector,
        pattern: Selector,
        *,
        heads: int,
        scale: float | None = None,
        match: Match = "full",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.selectors = {"query": query, "key": key, "pattern": pattern}
        self.match: Match = match
        self.heads = heads
        self.scale = scale

    def selectors_by_role(self) -> Mapping[str, tuple[Selector, Match]]:
        """The selectors of the method by role."""
        return {role: (selector, self.match) for role, selector in self.selectors.items()}

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        queries, keys, patterns = (frame.sites(role) for role in self.selectors)
        if not len(queries) == len(keys) == len(patterns):
            raise AttributionError(
                f"query=, key= and pattern= select {len(queries)}, {len(keys)} and {len(patterns)} modules; select "
                "as many of each"
            )
        corrupt = frame.counterfactual()
        other = Seen([*queries, *keys], with_grads=False)
        base = Seen([*queries, *keys, *patterns], with_grads=False)
        grads = {name: Seen(patterns, with_values=False) for name in frame.targets}
        yield [
            frame.ask(frame.base, base, values=base.places),
            frame.ask(corrupt, other, values=other.places),
            *(frame.ask(frame.base, seen, frame.targets[name], grads=patterns) for name, seen in grads.items()),
        ]
        scores: dict[tuple[Any, ...], Tensor] = {}
        for name, seen in grads.items():
            for q, k, p in zip(queries, keys, patterns, strict=True):
                layer = _Layer(
                    self._split(base.values[q]), self._split(base.values[k]), wide(base.values[p]), self.scale
                )
                grad = wide(seen.grads[p])
                scores[key_of(self.name, name, q)] = layer.query_effect(self._split(other.values[q]), grad)
                scores[key_of(self.name, name, k)] = layer.key_effect(self._split(other.values[k]), grad)
        return scores

    def _split(self, value: Tensor) -> Tensor:
        """``(batch, heads, position, d_head)``."""
        value = wide(value)
        if value.ndim == 3:
            value = value.unflatten(-1, (self.heads, -1))
        return value.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's attention in the base run."""

    query: Tensor
    key: Tensor
    pattern: Tensor
    scale: float | None

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention logits, minus infinity where the pattern is masked."""
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        found = query @ key.transpose(-1, -2) * scale
        return found.masked_fill(self.pattern == 0, -torch.inf)

    def query_effect(self, query: Tensor, grad: Tensor) -> Tensor:
        """``(batch, position, heads)``."""
        change = self.logits(query, self.key).softmax(-1) - self.pattern
        return (change * grad).sum(-1).transpose(1, 2)

    def key_effect(self, key: Tensor, grad: Tensor) -> Tensor:
        """``(batch, position, heads)``; one key is replaced at a time, in all rows."""
        logits, patched = self.logits(self.query, self.key), self.logits(self.query, key)
        effects = []
        for at in range(key.shape[-2]):
            column = logits.clone()
            column[..., at] = patched[..., at]
            effects.append(((column.softmax(-1) - self.pattern) * grad).sum((-1, -2)))
        return torch.stack(effects, dim=1)
