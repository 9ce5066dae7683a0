"""Attribution patching at queries and keys, where the softmax that follows is recomputed instead of linearised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tdcache.attribution.base import RoleAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.place import Place
from tdcache.attribution.point import expanded, wide
from tdcache.errors import AttributionError
from tdcache.function_calls.sites import is_call
from tdcache.place_modules import axis_of
from tdcache.types import Match, Pick, Selector

__all__ = ["Mask", "QKAttributionPatching"]

Mask: TypeAlias = "Literal['causal'] | Tensor | None"
"""Which keys a query sees."""

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By how much a recomputed probability may differ: rounded logits, and softmaxes in float32 inside of float64."""


class QKAttributionPatching(RoleAttribution):
    """AtP* at queries and keys: the softmax is recomputed, and only what follows is linear (the QK fix).

    Gradient estimates at queries and keys fail where attention is saturated. Here a query's score is the change of its
    own row of the pattern times the pattern's gradient, ``sum_k (softmax(q' K^T) - P) * G``; a key's the change of all
    rows when that key alone is replaced (Kramár et al. 2024, arXiv:2403.00745, section 3.1).

    Scores have shape ``(batch, position, heads)``, below the paths of the query and key modules; those of a key that
    several queries share (grouped heads) are for all of these together. The pattern is recomputed from the base run's
    queries and keys as well, and has to come out as it was: modules whose outputs are changed before they are
    multiplied, such as by rotary embeddings, are refused.

    Args:
        query: which modules give the queries, ``(batch, position, heads, d_head)`` or ``(batch, position, d_model)``.
        key: which give the keys, as many; they may have fewer heads.
        pattern: which give the attention probabilities, ``(batch, heads, query, key)``, as many.
        heads: the number of query heads; with ``names=`` that of the values.
        scale: what logits are multiplied by; ``d_head ** -0.5`` by default.
        mask: ``"causal"``, or a boolean tensor that expands to ``(batch, heads, query, key)`` and is True where a query
            sees a key. None tells it from the pattern's zeros, and refuses where some may have come from underflow.
        pick: which tensor of what the modules of ``pattern`` return, such as 1 for those of Hugging Face.
        match: how patterns are held against paths.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        query: Selector,
        key: Selector,
        pattern: Selector,
        *,
        heads: int | None = None,
        scale: float | None = None,
        mask: Mask = None,
        pick: Pick = None,
        match: Match = "full",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.select_by(match, query=query, key=key, pattern=pattern)
        if heads is None and self.names is None:
            raise TypeError("QKAttributionPatching takes heads=, the number of query heads, or names=")
        self.heads = heads
        self.scale = scale
        self.mask = mask
        self.pick = pick

    def places(self, role: str, paths: Sequence[str]) -> list[Place]:
        """What the modules of a role return."""
        return [Place("out", path, self.pick if role == "pattern" else None) for path in paths]

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
        for q, k, p in zip(queries, keys, patterns, strict=True):
            query, width = self._split(base.values[q], None, str(q.name))
            key, _ = self._split(base.values[k], width, str(k.name))
            scale = width**-0.5 if self.scale is None else self.scale
            layer = _Layer.of(query, key, base.values[p], scale, self.mask, str(p.name))
            new_query = self._split(other.beside(q, base.values[q]), None, str(q.name))[0]
            new_key = self._split(other.beside(k, base.values[k]), width, str(k.name))[0]
            for name, seen in grads.items():
                grad = wide(seen.grads[p])
                scores[key_of(self.name, name, q)] = layer.query_effect(new_query, grad)
                scores[key_of(self.name, name, k)] = layer.key_effect(new_key, grad)
        return scores

    def _split(self, value: Tensor, width: int | None, path: str) -> tuple[Tensor, int]:
        """``(batch, heads, position, d_head)``, and ``d_head``, which for keys is that of the queries."""
        value = wide(value)
        if self.names is not None and axis_of(self.names[path], "head", "kv_head") == 1:
            value = value.transpose(1, 2)
        heads = self.heads or (value.shape[-2] if value.ndim == 4 else 0)
        if value.ndim == 3:
            parts = heads if width is None else value.shape[-1] // width
            if parts == 0 or value.shape[-1] % parts:
                raise AttributionError(f"{path!r} gives {value.shape[-1]} features, not those of {heads} heads")
            value = value.unflatten(-1, (parts, -1))
        if not is_call(path):  # as attention sees them, heads come before positions
            value = value.transpose(1, 2)
        fits = value.shape[1] == heads if width is None else heads % value.shape[1] == 0
        if not fits or value.shape[-1] != (width or value.shape[-1]):
            raise AttributionError(
                f"{path!r} gives {value.shape[1]} heads of {value.shape[-1]} features, which do not fit {heads} "
                f"query heads{'' if width is None else f' of {width}'}; give heads= of the queries"
            )
        return value, value.shape[-1]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's attention in the base run; keys are those of their groups."""

    query: Tensor
    key: Tensor
    pattern: Tensor
    visible: Tensor
    frozen: Tensor
    """Rows that see no key, whose pattern depends on no query: ``(batch, heads, query, 1)``."""
    scale: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, pattern: Tensor, scale: float, mask: Mask, path: str) -> _Layer:
        """Tell the mask, and check that the pattern is what queries and keys give.

        Raises:
            AttributionError: it is not, or the mask cannot be told.
        """
        wanted = (*query.shape[:-1], key.shape[-2])
        if pattern.shape != wanted:
            raise AttributionError(
                f"{path!r} gives {tuple(pattern.shape)}; probabilities of these queries and keys are {wanted}, "
                "(batch, heads, query, key)"
            )
        blank = _Layer(query, key, wide(pattern), torch.ones_like(pattern, dtype=torch.bool), query.new_zeros(1), scale)
        logits = blank.logits(query, key)
        visible = _visible(logits, pattern, mask, path)
        values = wide(pattern)
        off = (logits.masked_fill(~visible, -torch.inf).softmax(-1) - values).abs().amax(-1, keepdim=True).nan_to_num(1)
        tolerance = _TOLERANCES.get(pattern.dtype, 1e-4)
        uniform = (values.amax(-1, keepdim=True) == values.amin(-1, keepdim=True)) & (off > tolerance)
        if bool(((off > tolerance) & ~uniform).any()):
            raise AttributionError(
                f"{path!r} is not softmax(scale * q k^T) of the selected queries and keys: it differs by up to "
                f"{off.max().item():.2g}. What they return is changed before it is multiplied (rotary embeddings, a "
                "norm), or something is added to the logits (a bias, a softcap), or scale= is another; select modules "
                "that return what is multiplied"
            )
        return cls(query, key, values, visible, uniform, scale)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention logits, minus infinity where a key is not seen."""
        found = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2) * self.scale
        return found.masked_fill(~self.visible, -torch.inf)

    def change(self, logits: Tensor, grad: Tensor) -> Tensor:
        """The change of the pattern times its gradient, summed over keys: ``(batch, heads, query)``."""
        moved = (logits.softmax(-1) - self.pattern).masked_fill(self.frozen, 0)
        return (moved * grad).sum(-1)

    def query_effect(self, query: Tensor, grad: Tensor) -> Tensor:
        """Return the effect of changed queries, of shape ``(batch, position, heads)``."""
        return self.change(self.logits(query, self.key), grad).transpose(1, 2)

    def key_effect(self, key: Tensor, grad: Tensor) -> Tensor:
        """``(batch, position, key heads)``; one key is replaced at a time, in all rows of all its queries."""
        logits, patched = self.logits(self.query, self.key), self.logits(self.query, key)
        effects = []
        for at in range(key.shape[-2]):
            column = logits.clone()
            column[..., at] = patched[..., at]
            effects.append(self.change(column, grad).sum(-1).unflatten(1, (key.shape[1], -1)).sum(-1))
        return torch.stack(effects, dim=1)


def _visible(logits: Tensor, pattern: Tensor, mask: Mask, path: str) -> Tensor:
    """Which keys a query sees: as given, or told from the pattern's zeros."""
    seen = pattern > 0
    if mask is not None:
        lengths = pattern.shape[-2:]
        given = torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]) if mask == "causal" else mask
        visible = _expanded(given, pattern, path)
        # A row that sees no key is left uniform by masks of large numbers.
        if bool((seen & ~visible & visible.any(-1, keepdim=True)).any()):
            raise AttributionError(f"{path!r} is positive where mask= hides the key; give True where a key is seen")
        return visible
    # A zero is a mask where the logits alone would have given more than rounding takes away.
    top, at = wide(pattern).max(-1, keepdim=True)
    expected = (logits - logits.gather(-1, at)).exp() * top
    hidden = ~seen & (expected > _underflow(pattern.dtype))
    # Heads share a mask, so that what one of them tells holds for the others, unless they tell differently.
    somewhere = seen.any(1, keepdim=True)
    hidden |= ~seen & hidden.any(1, keepdim=True) & ~somewhere
    unclear = ~seen & ~hidden & (~somewhere | hidden.any(1, keepdim=True))
    if bool(unclear.any()):
        raise AttributionError(
            f"{path!r} has {int(unclear.sum())} zeros that may be masked or may have come from underflow (its logits "
            f"differ by more than {pattern.dtype} can show); say which with mask='causal' or a boolean tensor"
        )
    return ~hidden


def _expanded(mask: Any, pattern: Tensor, path: str) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        raise AttributionError(f"mask= is 'causal' or a boolean tensor, True where a query sees a key; got {kind}")
    found = expanded(mask.to(pattern.device), pattern)
    if found is None:
        raise AttributionError(
            f"mask= has shape {tuple(mask.shape)}, which does not expand to that of {path!r}, {tuple(pattern.shape)}"
        )
    return found


def _underflow(dtype: torch.dtype) -> float:
    """Below it a probability may be rounded to zero; 8 for the rounding of logits."""
    info = torch.finfo(dtype)
    return 8 * info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
