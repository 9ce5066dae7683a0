"""The outputs in terms of what was written to the residual stream: direct logit attribution and the logit lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.attribution.base import Attribution, SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of, one_backward
from tdcache.attribution.lrp.norms import FreezeNorm
from tdcache.attribution.norms import NormForm
from tdcache.attribution.place import Place
from tdcache.attribution.point import Point, wide
from tdcache.attribution.reductions import gradient_x_activation
from tdcache.errors import AttributionError
from tdcache.hooks.values import first_tensor
from tdcache.paths import resolve
from tdcache.types import Match, Selector

__all__ = ["DirectLogitAttribution", "LogitLens"]


class DirectLogitAttribution(Attribution):
    """What each writer adds to a logit, or a difference of logits, directly: past all later layers.

    The final norm's scale is frozen, so that the logit is linear in the stream: ``(u - mean(u)) * gamma / scale`` times
    the unembedding's direction, plus a bias term, ``data["attr", "bias"]``: the target of a stream of zeros, for which
    the model runs forward once more. The scores of everything that is written to the stream sum, with the bias, to the
    target exactly where that is linear in what the norm returns, such as
    ``lambda td: td["output"][:, -1, right] - td["output"][:, -1, wrong]``; ``data["gap", "bias"]`` holds, per row, by
    how much they miss it where it is not (a softmax, logits that are capped).

    Args:
        writers: modules whose outputs are added to the stream.
        norm: the final norm, whose input is the whole stream.
        reduce: axes of the scores that are summed; the features by default.
        match: how patterns are held against paths.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        writers: Selector,
        *,
        norm: Selector,
        reduce: int | tuple[int, ...] | None = -1,
        match: Match = "full",
        **options: Any,
    ) -> None:
        modifiers = (*options.pop("modifiers", ()), FreezeNorm(norm))
        super().__init__(modifiers=modifiers, **options)
        self.writers = writers
        self.norm = norm
        self.reduce = reduce
        self.match: Match = match

    def selectors_by_role(self) -> Mapping[str, tuple[Selector, Match]]:
        """The selectors of the method by role."""
        return {"writers": (self.writers, self.match), "norm": (self.norm, self.match)}

    def places(self, role: str, paths: Sequence[str]) -> list[Place]:
        """What writers return, and what the norm reads."""
        return [Place("in" if role == "norm" else "out", path) for path in paths]

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        writers, norm = frame.sites("writers"), frame.sites("norm")
        if len(norm) != 1:
            raise AttributionError(f"norm={self.norm!r} means {len(norm)} modules; give the final norm alone")
        stream = norm[0]
        outputs = Seen(writers, with_grads=False)
        seen, asks = one_backward(frame, [stream])
        yield [frame.ask(frame.base, outputs, values=writers), *asks]
        start = {name: Seen((), with_values=False, with_grads=False) for name in frame.targets}
        at_zero = self._without_stream(frame, stream, next(iter(seen.values())).values[stream])
        yield [frame.ask(at_zero, each, frame.targets[name]) for name, each in start.items()]
        scores: dict[tuple[Any, ...], Tensor] = {}
        for name, each in seen.items():
            grad = wide(each.grads[stream])
            for place in writers:
                product = gradient_x_activation(self._fitting(outputs.values[place], grad, place), grad)
                scores[key_of(self.name, name, place)] = self._summed(product)
            bias = wide(start[name].needed_target())
            whole = gradient_x_activation(wide(each.values[stream]), grad)
            key = key_of(self.name, name, "bias")
            scores[key] = bias
            scores["gap", *key[1:]] = frame.completeness_gap({stream: whole}, wide(each.needed_target()) - bias)
        return scores

    def _without_stream(self, frame: Frame, stream: Place, value: Tensor) -> Point:
        """The point where the norm returns what it adds to a stream of zeros."""
        path = str(stream.name)
        bias = NormForm.of(resolve(frame.model, path), path, value).bias
        return frame.point(("no stream", id(self)), replace={Place("out", path): bias.expand_as(value)})

    @staticmethod
    def _fitting(value: Tensor, grad: Tensor, place: Place) -> Tensor:
        if torch.broadcast_shapes(value.shape, grad.shape) != grad.shape:
            raise AttributionError(
                f"{place.name!r} gives {tuple(value.shape)}, the stream is {tuple(grad.shape)}; select modules whose "
                "outputs are added to the stream"
            )
        return wide(value).expand_as(grad)  # position embeddings are written to every row


class LogitLens(SiteAttribution):
    """The logits if the model ended at a site: its output through the final norm and the unembedding (nostalgebraist).

    The norm's scale is that of the site, unlike that of :class:`DirectLogitAttribution`. No backward is needed.

    Args:
        selector: modules whose outputs are the residual stream, such as the blocks.
        norm: path of the final norm, or None.
        unembed: path of the unembedding.
        **options: see :class:`SiteAttribution`.
    """

    def __init__(self, selector: Selector, *, norm: str | None, unembed: str, **options: Any) -> None:
        super().__init__(selector, **options)
        self.norm = norm
        self.unembed = unembed

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.sites()
        seen = Seen(places, with_grads=False)
        yield [frame.ask(frame.base, seen, values=places)]
        steps: list[nn.Module] = [resolve(frame.model, path) for path in (self.norm, self.unembed) if path is not None]
        scores: dict[tuple[Any, ...], Tensor] = {}
        with torch.set_grad_enabled(self.create_graph):
            for place in places:
                value: Any = seen.values[place]
                for step in steps:
                    value = first_tensor(step.forward(value))  # not called, so that no hook sees it
                scores[key_of(self.name, None, place)] = value
        return scores
