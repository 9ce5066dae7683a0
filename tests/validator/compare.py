"""One library's answer beside that of the hooks by hand: the same bits, the same up to rounding, or by how much not."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from validator.answers import Answer
from validator.subjects import score

TOLERANCE = 1e-5
"""Of the largest magnitude. Float32 carries 6e-8; where a library computes attention anew some hundred of such errors
add up in these models. A wrong position, side or tensor is off by 1e-3 and more."""

SCORE_TOLERANCE = 1e-4
"""The same for scores, which are the difference of two numbers and lose digits where these are close."""

SIGNS = {"same": "=", "close": "≈", "differs": "≠", "failed": "✗", "not offered": "·", "not asked": " "}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How an answer compares: ``by`` is the largest difference over the largest magnitude, ``text`` says why."""

    sign: str
    by: float = 0.0
    text: str = ""


def verdict(answer: Answer, by_hand: Answer) -> Verdict:
    """Compare one answer; what a library returns as scores is compared with the score of the hooks' logits."""
    if answer.kind in ("failed", "not offered"):
        return Verdict(sign=answer.kind, text=answer.text)
    wanted = score(by_hand.value) if answer.kind == "score" else by_hand.value
    if answer.value.shape != wanted.shape:
        shapes = f"shape {tuple(answer.value.shape)}, not {tuple(wanted.shape)}"
        return Verdict(sign="differs", by=float("inf"), text=shapes)
    if torch.equal(answer.value, wanted):
        return Verdict(sign="same")
    by = ((answer.value - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()
    tolerance = SCORE_TOLERANCE if answer.kind == "score" else TOLERANCE
    return Verdict(sign="close" if by <= tolerance else "differs", by=by)
