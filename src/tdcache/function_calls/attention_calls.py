"""Which calls of a forward make up its attention: the kernel, or product, softmax and product in plain sight."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tdcache.function_calls.handlers import Call

__all__ = ["PRODUCTS", "SDPA", "SOFTMAX", "Spelled", "argument", "exchange", "progress", "role_of"]

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"
# By name: position and keyword of either factor.
PRODUCTS = {
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}


class Spelled:
    """How far a forward that spells its attention out has come: product, softmax, product."""

    def __init__(self) -> None:
        self.attentions = 0
        """How many attention calls are complete."""
        self.products = 0
        """How many products could be ``q k^T`` since then."""
        self.product = ""
        """What the last product is called that is not the first."""
        self.shape: tuple[int, ...] = ()
        """The shape of the last of them."""
        self.softmax: Tensor | None = None

    def role(self, call: Call) -> str | None:
        """What ``call`` is: ``"sdpa"``, ``"qk"``, ``"softmax"``, ``"av"``, or None; asked before it is made."""
        if call.name == SDPA:
            return "sdpa"
        if call.name == SOFTMAX:
            given = argument(call, 0, "input")
            fits = self.products and isinstance(given, Tensor) and _rows(given.shape) == _rows(self.shape)
            return "softmax" if fits and given.shape[-1] >= self.shape[-1] else None
        left, right = (argument(call, *place) for place in PRODUCTS[call.name])
        if any(not isinstance(factor, Tensor) or factor.dim() < 3 for factor in (left, right)):
            return None
        if self.softmax is not None:
            return "av" if _rows(left.shape) == _rows(self.shape) and left.shape[-1] == self.shape[-1] else None
        self.products += 1
        self.shape = (*left.shape[:-1], right.shape[-1])
        return "qk"

    def made(self, call: Call, role: str | None) -> None:
        """Note that ``call`` was made."""
        if role == "softmax":
            self.softmax = call.output
        elif role in ("sdpa", "av"):
            self.attentions += 1
            self.products, self.softmax = 0, None


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def progress(call: Call) -> Spelled:
    """How far the forward that makes ``call`` has come."""
    notes = call.run.notes
    state = notes.get(Spelled)
    if state is None:
        state = notes[Spelled] = Spelled()
    return state


def role_of(call: Call) -> str | None:
    """What ``call`` is to the attention of its forward; the first handler to ask decides."""
    if "role" not in call.notes:
        call.notes["role"] = progress(call).role(call)
        call.notes["at"] = progress(call).attentions
    return call.notes["role"]  # type: ignore[no-any-return]


def argument(call: Call, at: int, keyword: str) -> Any:
    """An argument, given by position or by keyword."""
    return call.args[at] if at < len(call.args) else call.kwargs.get(keyword)


def exchange(call: Call, at: int, keyword: str, new: Tensor) -> None:
    """Give the call another argument."""
    if at < len(call.args):
        call.args = (*call.args[:at], new, *call.args[at + 1 :])
    else:
        call.kwargs = {**call.kwargs, keyword: new}
