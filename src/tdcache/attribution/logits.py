"""The outputs in terms of what was written to the residual stream: direct logit attribution and the logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex
import torch
from torch import Tensor, nn

from tdcache.attribution.base import RoleAttribution, SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of, one_backward
from tdcache.attribution.lrp.norms import FreezeNorm
from tdcache.attribution.place import Place
from tdcache.attribution.point import Point, expanded, wide
from tdcache.attribution.reductions import gradient_x_activation
from tdcache.errors import AttributionError
from tdcache.hooks.values import first_tensor
from tdcache.named_places import Names
from tdcache.named_streams import ResidualStream
from tdcache.norms import NormForm
from tdcache.paths import resolve
from tdcache.place_modules import module_behind, refuse_at_names
from tdcache.types import Match, Selector

__all__ = ["DirectLogitAttribution", "LogitLens"]


class DirectLogitAttribution(RoleAttribution):
    """What each writer adds to a logit, or a difference of logits, directly: past all later layers.

    The final norm's scale is frozen, so that the logit is linear in the stream: ``(u - mean(u)) * gamma / scale`` times
    the unembedding's direction, plus a bias term, ``data["attr", "bias"]``: the target of a stream of zeros, for which
    the model runs forward once more. The scores of everything that is written to the stream sum, with the bias, to the
    target exactly where that is linear in what the norm returns, such as
    ``lambda td: td["output"][:, -1, right] - td["output"][:, -1, wrong]``; ``data["gap", "bias"]`` holds, per row, by
    how much they miss it where it is not (a softmax, logits that are capped).

    With ``names=`` nothing else need be said: writers are the embeddings and every contribution to the stream, and the
    final norm is that of the table.

    Args:
        writers: modules whose outputs are added to the stream.
        norm: the final norm, whose input is the whole stream.
        reduce: axes of the scores that are summed; the features by default.
        match: how patterns are held against paths.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        writers: Selector | None = None,
        *,
        norm: Selector | None = None,
        reduce: int | tuple[int, ...] | None = -1,
        match: Match = "full",
        names: Names | None = None,
        **options: Any,
    ) -> None:
        refuse_at_names(names, ())
        if names is None and (writers is None or norm is None):
            raise TypeError("DirectLogitAttribution takes writers and norm=, or names=tdcache.names(model)")
        if names is not None:
            writers = _writers_of(names) if writers is None else writers
            norm = regex.escape(names[names.spelled("final_norm")].name) if norm is None else norm
        norm = "" if norm is None else norm
        modifiers = (*options.pop("modifiers", ()), FreezeNorm(norm, names))
        super().__init__(modifiers=modifiers, names=names, **options)
        self.writers: Selector = "" if writers is None else writers
        self.norm: Selector = norm
        self.select_by(match, writers=self.writers, norm=self.norm)
        self.reduce = reduce

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
        bias = NormForm.of(frame.runner.module_at(stream), path, value).bias
        return frame.point(("no stream", id(self)), replace={Place("out", path): bias.expand_as(value)})

    @staticmethod
    def _fitting(value: Tensor, grad: Tensor, place: Place) -> Tensor:
        found = expanded(wide(value), grad)  # position embeddings are written to every row
        if found is None:
            raise AttributionError(
                f"{place.name!r} gives {tuple(value.shape)}, the stream is {tuple(grad.shape)}; select modules whose "
                "outputs are added to the stream"
            )
        return found


class LogitLens(SiteAttribution):
    """The logits if the model ended at a site: its output through the final norm and the unembedding (nostalgebraist).

    The norm's scale is that of the site, unlike that of :class:`DirectLogitAttribution`. No backward is needed.

    With ``names=`` nothing else need be said: the sites are the ``resid_post`` of every block, and norm, unembedding,
    scale and softcap of the logits are those of the table.

    Args:
        selector: modules whose outputs are the residual stream, such as the blocks.
        norm: path of the final norm, or None.
        unembed: path of the unembedding.
        **options: see :class:`SiteAttribution`.
    """

    def __init__(
        self,
        selector: Selector | None = None,
        *,
        norm: str | None = None,
        unembed: str | None = None,
        names: Names | None = None,
        **options: Any,
    ) -> None:
        refuse_at_names(names, ())
        if names is None and (selector is None or unembed is None):
            raise TypeError("LogitLens takes a selector, norm= and unembed=, or names=tdcache.names(model)")
        if names is not None and selector is None:
            selector = list(map(regex.escape, names.in_blocks("resid_post")))
        super().__init__(selector, names=names, **options)
        self.norm = norm
        self.unembed = unembed

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.sites()
        seen = Seen(places, with_grads=False)
        yield [frame.ask(frame.base, seen, values=places)]
        steps, stream = self._steps(frame.model)
        scores: dict[tuple[Any, ...], Tensor] = {}
        with torch.set_grad_enabled(self.create_graph):
            for place in places:
                value: Any = seen.values[place]
                for step in steps:
                    value = first_tensor(step.forward(value))  # not called, so that no hook sees it
                value = value * stream.logit_scale if stream.logit_scale != 1 else value
                if stream.logit_softcap is not None:
                    value = stream.logit_softcap * torch.tanh(value / stream.logit_softcap)
                scores[key_of(self.name, None, place)] = value
        return scores

    def _steps(self, model: nn.Module) -> tuple[list[nn.Module], ResidualStream]:
        """What leads from the stream to the logits: modules, and what is known of scale and softcap."""
        if self.names is None:
            return [resolve(model, path) for path in (self.norm, self.unembed) if path is not None], ResidualStream()
        stream, root = self.names.reading_stream(), self.names.root_in(model)
        given = (self.norm, stream.final_norm), (self.unembed, stream.unembed)
        modules = [
            resolve(root, found or "") if name is None else module_behind(self.names[name], root)[1]
            for name, found in given
            if not (name is None and found is None)
        ]
        return modules, stream


def _writers_of(names: Names) -> list[str]:
    """The names of all that is added to the one stream that logits are made of."""
    stream = names.reading_stream()
    if {"post-norm", "mixed"} & set(stream.layouts):
        raise AttributionError(
            f"the blocks of {names.model_name or 'this model'} norm or scale the stream between additions, so its "
            "value at the end is no sum of contributions, and no part of a logit is theirs directly; give writers="
        )
    parts = ("attn", "mixer", "cross_attn", "mlp", "mlp2")
    written = names.in_blocks(*(f"{part}.contribution" for part in parts), prefix=stream.prefix)
    return [regex.escape(name) for name in (*map(names.spelled, stream.embeddings), *written)]
