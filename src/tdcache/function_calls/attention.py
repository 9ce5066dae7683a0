"""Scores and pattern of an attention call, derived from the call's own arguments; no kernel gives them away.

Everything here is arithmetic on the arguments of ``scaled_dot_product_attention``, in its own conventions: what cannot
be derived exactly is refused by name, and :func:`prove` holds the result against what the kernel returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import CaptureError

__all__ = ["Attention", "derive_attention", "derive_registered", "prove", "sdpa_arguments"]

_NOTHING = nullcontext()
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
# A softmax of twenty orders of magnitude in half precision, and the order of summation in the kernel.
_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_NAMES = {"query": "q", "key": "k", "value": "v", "attn_mask": "the mask"}


def sdpa_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``scaled_dot_product_attention`` by name."""
    return {**dict(zip(_PARAMETERS, args, strict=False)), **kwargs}


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention call by its parts; shapes ``(..., heads, positions, width)``, grouped key heads as they are."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    """Boolean (True takes part) or added to the scores."""
    causal: bool
    scale: float

    def scores(self) -> Tensor:
        """``q k^T scale``, masked: what the softmax is taken of, ``(..., heads, queries, keys)``, at least float32."""
        with _plain(self.q):
            q, k = _wide(self.q), _per_head(_wide(self.k), self.q)
            scores = (q * self.scale) @ k.transpose(-1, -2)
            if self.causal:
                scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu_(1)
            if self.mask is None:
                return scores
            if self.mask.dtype == torch.bool:
                return scores.masked_fill(~self.mask, -math.inf)
            return scores + self.mask

    def pattern(self, scores: Tensor) -> Tensor:
        """The softmax of ``scores``, in the dtype of ``q``; zero in a row that is masked throughout, as kernels do."""
        with _plain(self.q):
            pattern = scores.softmax(-1)
            if self.mask is not None:
                pattern = pattern.masked_fill(scores.detach().amax(-1, keepdim=True) == -math.inf, 0.0)
            return pattern.to(self.q.dtype)

    def z(self, pattern: Tensor) -> Tensor:
        """``pattern @ v``, per head."""
        with _plain(self.v):
            return _wide(pattern) @ _per_head(_wide(self.v), self.q)


def _plain(like: Tensor) -> AbstractContextManager[object]:
    """Without autocast: it casts below the mode, so that the kernel's own arguments are still wide here."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _per_head(grouped: Tensor, q: Tensor) -> Tensor:
    if grouped.dim() < 3 or grouped.shape[-3] == q.shape[-3]:
        return grouped
    return grouped.repeat_interleave(q.shape[-3] // grouped.shape[-3], -3)


def derive_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, where: str) -> Attention:
    """The parts of a call ``scaled_dot_product_attention(*args, **kwargs)``.

    Raises:
        CaptureError: dropout, nested tensors or tensor subclasses; the message names ``where`` and the reason.
    """
    given = sdpa_arguments(args, kwargs)
    for name in ("query", "key", "value", "attn_mask"):
        value = given.get(name)
        if value is None:
            continue
        if getattr(value, "is_nested", False):
            raise _refused(where, f"{_NAMES[name]} is a nested tensor", "pad it to a dense one")
        if type(value) is not Tensor and type(value) is not nn.Parameter:
            kind = type(value).__name__
            raise _refused(
                where, f"{_NAMES[name]} is a {kind}, which may mean more than its values", "use a torch.Tensor"
            )
    if given.get("dropout_p", 0.0) > 0.0:
        raise _refused(where, "the call drops entries at random (dropout_p > 0)", "call model.eval() first")
    q, scale = given["query"], given.get("scale")
    return Attention(
        q=q,
        k=given["key"],
        v=given["value"],
        mask=given.get("attn_mask"),
        causal=bool(given.get("is_causal", False)),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )


def derive_registered(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, where: str) -> Attention:
    """The parts of a call of a registered function, ``function(module, query, key, value, attention_mask, ...)``.

    Raises:
        CaptureError: as :func:`derive_attention`; or the mask is not one that is added to the scores.
    """
    given = {**dict(zip(("module", "query", "key", "value", "attention_mask"), args, strict=False)), **kwargs}
    q, mask, causal = given["query"], given.get("attention_mask"), given.get("is_causal")
    if isinstance(mask, Tensor) and mask.dim() != q.dim():
        raise _refused(where, f"its mask has {mask.dim()} dimensions, and scores have {q.dim()}", "use eager attention")
    if causal is None:
        causal = getattr(given["module"], "is_causal", True)
    names = {"query": q, "key": given["key"], "value": given["value"], "attn_mask": mask, "scale": given.get("scaling")}
    alone = bool(causal) and mask is None and q.shape[-2] > 1
    return derive_attention((), {**names, "dropout_p": given.get("dropout") or 0.0, "is_causal": alone}, where=where)


def _refused(where: str, reason: str, remedy: str) -> CaptureError:
    return CaptureError(
        f"the attention of {where!r} cannot be derived exactly: {reason}; {remedy}, or select the function itself",
        paths=(where,),
    )


def prove(attention: Attention, pattern: Tensor, z: Tensor, *, where: str) -> bool:
    """Hold ``pattern @ v`` against ``z``, what the kernel returned; says whether it could be told.

    Inside ``torch.func`` transforms nothing can be said about values.

    Raises:
        CaptureError: they differ by more than rounding.
    """
    with torch.no_grad():
        mine, its = attention.z(pattern).double(), z.double()
        limit = _RELATIVE.get(z.dtype, 1e-3)
        try:
            if mine.shape != its.shape:
                gap = math.inf
            else:
                gap = float((mine - its).abs().max() / its.abs().max().clamp_min(1e-30)) if its.numel() else 0.0
        except RuntimeError:  # a value of a transform cannot be looked at
            return False
    if not gap <= limit:
        raise _refused(where, f"pattern @ v differs from what the kernel returned by {gap:.1e}", "use eager attention")
    return True
