"""Which calls of a forward make up its attention: the kernel, or product, softmax and product in plain sight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tdcache.function_calls.handlers import Call

__all__ = [
    "Factor",
    "PRODUCTS",
    "Product",
    "SDPA",
    "SOFTMAX",
    "Spelled",
    "argument",
    "exchange",
    "ordered",
    "progress",
    "restored",
    "role_of",
]

SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax"
# By name: position and keyword of either factor.
PRODUCTS = {
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "einsum": ((1, ""), (2, "")),
}


@dataclass(frozen=True, slots=True)
class Factor:
    """An argument of a product with its axes in the order of a place of attention: heads, positions, width."""

    at: int
    keyword: str
    axes: tuple[int, ...] | None = None
    """None for the order that it has."""

    def read(self, call: Call) -> Tensor:
        """The argument in that order, as a view."""
        return ordered(argument(call, self.at, self.keyword), self.axes)

    def write(self, call: Call, new: Tensor) -> None:
        """Give the call another argument, which has that order."""
        exchange(call, self.at, self.keyword, restored(new, self.axes))


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two tensors: ``q k^T`` if it comes before the softmax, ``pattern v`` if it comes after."""

    left: Factor
    """``q``, or the pattern, as it is."""
    right: Factor
    """``k`` or ``v``, positions before width."""
    shape: tuple[int, ...]
    """Of the result."""
    axes: tuple[int, ...] | None = None
    """Those of the result, in the order of ``z``; None for the order that they have."""

    @classmethod
    def of(cls, call: Call, *, mixes: bool) -> Product | None:
        """The product that ``call`` makes, after the softmax (``mixes``) or before it; None if it could be neither."""
        if call.name == "einsum":
            return _einsum(call, mixes=mixes)
        factors = [argument(call, *place) for place in PRODUCTS[call.name]]
        if any(not isinstance(factor, Tensor) or factor.dim() < 3 for factor in factors):
            return None
        (left, right), (first, second) = factors, PRODUCTS[call.name]
        turned = None if mixes else (*range(right.dim() - 2), -1, -2)
        return cls(Factor(*first), Factor(*second, turned), (*left.shape[:-1], right.shape[-1]))


def _einsum(call: Call, *, mixes: bool) -> Product | None:
    """``torch.einsum`` with two operands that share one letter which the result lacks."""
    if len(call.args) == 2 and isinstance(call.args[1], list | tuple):
        call.args = (call.args[0], *call.args[1])
    equation, *operands = call.args
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    terms, arrow, result = equation.replace(" ", "").partition("->")
    named = [_spelled_out(term, operand.dim()) for term, operand in zip(terms.split(","), operands, strict=False)]
    if not arrow or len(named) != 2:
        return None
    free = max((len(term) - len(text.replace("...", "")) for term, text in zip(named, terms.split(","), strict=True)))
    result = _spelled_out(result, free + len(result.replace("...", "")))
    if len(result) < 3 or (result[-1] in named[0]) == (result[-1] in named[1]):
        return None
    first, second = (1, 0) if result[-1] in named[0] else (0, 1)
    left, right = named[first], named[second]
    shared = [letter for letter in left if letter in right and letter not in result]
    if not mixes and result[0] not in right:
        return None  # a table of relative positions, which is no key: it has no rows of the batch
    if len(shared) != 1 or set(left + right) != {*result, *shared} or (mixes and left[-1] != shared[0]):
        return None
    order = left.replace(shared[0], "") if mixes else result[:-1]
    sizes = dict(zip(left + right, (*operands[first].shape, *operands[second].shape), strict=True))
    own, rows = result[-1], "".join(letter for letter in order if letter in right)
    width = shared[0] + own if mixes else own + shared[0]
    return Product(
        Factor(1 + first, "", tuple(map(left.index, order + shared[0]))),
        Factor(1 + second, "", tuple(map(right.index, rows + width))),
        tuple(sizes[letter] for letter in result),
        tuple(map(result.index, order + own)),
    )


def _spelled_out(term: str, dims: int) -> str:
    """A term of an equation with letters of their own, the same in every term, for its ``...``."""
    free = dims - len(term.replace("...", ""))
    return term.replace("...", "ZYXWVUTS"[8 - free :] if free else "")


def ordered(value: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """A view of a value with its axes in this order; None for the order that it has."""
    return value if axes is None else value.permute(axes)


def restored(value: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """The view that undoes :func:`ordered`."""
    return value if axes is None else value.permute(sorted(range(len(axes)), key=lambda at: axes[at] % len(axes)))


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
        self.queries: tuple[int, ...] = ()
        """Rows, heads and positions of what a function from a table of attention functions was given."""

    def role(self, call: Call) -> str | None:
        """What ``call`` is: ``"sdpa"``, ``"qk"``, ``"softmax"``, ``"av"``, or None; asked before it is made."""
        if call.name == SDPA:
            return "sdpa"
        if call.name == SOFTMAX:
            given = argument(call, 0, "input")
            fits = self.products and isinstance(given, Tensor) and _rows(given.shape) == _rows(self.shape)
            return "softmax" if fits and given.shape[-1] >= self.shape[-1] else None
        product = call.notes["product"] = Product.of(call, mixes=self.softmax is not None)
        if product is None:
            return None
        if self.softmax is not None:
            left = product.left.read(call).shape
            return "av" if _rows(left) == _rows(self.shape) and left[-1] == self.shape[-1] else None
        self.products += 1
        self.shape = product.shape
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
