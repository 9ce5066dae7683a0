"""Attention rollout: attention patterns, averaged over heads and multiplied from layer to layer."""

from __future__ import annotations

from typing import Any

import regex

from tdcache.attribution.base import SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of, one_backward
from tdcache.attribution.point import wide
from tdcache.attribution.reductions import attention_rollout
from tdcache.named_places import Names
from tdcache.place_modules import refuse_at_names
from tdcache.types import Pick, Selector

__all__ = ["AttentionRollout"]


class AttentionRollout(SiteAttribution):
    """How much of each input token reaches each position, over all layers: ``("attr", "rollout")``.

    See :func:`~tdcache.attribution.reductions.attention_rollout`. Hugging Face models give their attention
    probabilities with ``attn_implementation="eager"``.

    Args:
        selector: the modules that return the probabilities ``(batch, heads, query, key)``, in the order they run; with
            ``names=``, by default the ``attn.pattern`` of every block.
        gradient: weight heads by the positive part of gradient times probability; needs a target.
        residual: the share of the skip connection.
        pick: which tensor of their output; the second by default, where attention modules return it. The value of a
            name is one tensor.
        **options: see :class:`SiteAttribution`.
    """

    def __init__(
        self,
        selector: Selector | None = None,
        *,
        gradient: bool = False,
        residual: float = 0.5,
        pick: Pick = 1,
        names: Names | None = None,
        **options: Any,
    ) -> None:
        refuse_at_names(names, ())
        if selector is None and names is None:
            raise TypeError("AttentionRollout takes a selector, or names=tdcache.names(model)")
        if selector is None and names is not None:
            selector = list(map(regex.escape, names.in_blocks("attn.pattern")))
        super().__init__(selector, pick=pick if names is None else None, names=names, **options)
        self.gradient = gradient
        self.residual = residual

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.sites()
        if not self.gradient:
            seen = Seen(places, with_grads=False)
            yield [frame.ask(frame.base, seen, values=places)]
            patterns = [wide(seen.values[place]) for place in places]
            return {key_of(self.name, None, "rollout"): attention_rollout(patterns, residual=self.residual)}
        each, asks = one_backward(frame, places)
        yield asks
        return {
            key_of(self.name, name, "rollout"): attention_rollout(
                [wide(seen.values[place]) for place in places],
                [wide(seen.grads[place]) for place in places],
                residual=self.residual,
            )
            for name, seen in each.items()
        }
