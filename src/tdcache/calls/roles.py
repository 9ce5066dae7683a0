"""The places of an attention call: ``q``, ``k``, ``v``, ``scores``, ``pattern`` and ``z``, whatever computes them.

Under ``scaled_dot_product_attention`` the first three and the last are arguments and result of the call; scores and
pattern are derived (:mod:`tdcache.calls.attention`). Where a forward spells attention out, they are operands: of the
product before the softmax, of the softmax, and of the product after it, and an edit exchanges that operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tdcache.calls.attach import attach_rule, refuse_recomputed
from tdcache.calls.attention import Attention, derive_attention, prove, sdpa_arguments
from tdcache.calls.mode import Call
from tdcache.calls.names import DERIVED
from tdcache.calls.sites import CallSite
from tdcache.errors import CaptureError, SelectionError
from tdcache.hooks.attach import Order
from tdcache.hooks.values import check_fits
from tdcache.paths import resolve_all
from tdcache.types import Removable

__all__ = ["AttentionHook", "Use", "attach_attention"]

Use = Literal["read", "edit", "watch"]
"""What a hook does with a derived value: read its numbers, replace it, or also follow its gradient."""

_SDPA = "scaled_dot_product_attention"
_SOFTMAX = "softmax"
# By name: position and keyword of either factor.
_PRODUCTS = {
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}
_FACTORS = {"q": 0, "k": 1}
_KEYWORDS = {"q": "query", "k": "key", "v": "value"}

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor | None]


class Derived:
    """Scores and pattern of one call of the kernel, computed when they are first asked for."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.graph = False
        self.scores: Tensor | None = None
        self.pattern: Tensor | None = None

    def compute(self, *, graph: bool) -> tuple[Tensor, Tensor]:
        """Both; ``graph`` where autograd shall record them, if it records at all."""
        if graph and not self.graph:  # what was read without one was not edited
            self.scores = self.pattern = None
            self.graph = True
        with torch.set_grad_enabled(self.graph and torch.is_grad_enabled()):
            if self.scores is None:
                self.scores = self.attention.scores()
            if self.pattern is None:
                self.pattern = self.attention.pattern(self.scores)
        return self.scores, self.pattern

    def replace(self, name: str, new: Tensor) -> None:
        """Go on with an edited value; the pattern follows from edited scores."""
        if name == "scores":
            self.scores, self.pattern = new, None
        else:
            self.pattern = new

    def output(self, like: Tensor) -> Tensor:
        """What the kernel would return for the pattern, laid out as its own result ``like``."""
        z = self.attention.z(self.compute(graph=True)[1])
        return torch.empty_like(like, requires_grad=False).copy_(z)


class Spelled:
    """How far a forward that spells its attention out has come: product, softmax, product."""

    def __init__(self) -> None:
        self.attentions = 0
        """How many attention calls are complete."""
        self.products = 0
        """How many products could be ``q k^T`` since then."""
        self.shape: tuple[int, ...] = ()
        """The shape of the last of them."""
        self.softmax: Tensor | None = None

    def role(self, call: Call) -> str | None:
        """What ``call`` is: ``"sdpa"``, ``"qk"``, ``"softmax"``, ``"av"``, or None; asked before it is made."""
        if call.name == _SDPA:
            return "sdpa"
        if call.name == _SOFTMAX:
            given = _argument(call, 0, "input")
            fits = self.products and isinstance(given, Tensor) and _rows(given.shape) == _rows(self.shape)
            return "softmax" if fits and given.shape[-1] >= self.shape[-1] else None
        left, right = (_argument(call, *place) for place in _PRODUCTS[call.name])
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


def _state(call: Call) -> Spelled:
    return call.run.notes.setdefault(Spelled, Spelled())  # type: ignore[no-any-return]


def _role(call: Call) -> str | None:
    if "role" not in call.notes:
        call.notes["role"] = _state(call).role(call)
        call.notes["at"] = _state(call).attentions
    return call.notes["role"]  # type: ignore[no-any-return]


class AttentionHook:
    """A hook at one place of the attention calls of one module; rule and handler in one."""

    def __init__(self, site: CallSite, hook: Hook, use: Use, order: int) -> None:
        self.site = site
        self.hook = hook
        self.use = use
        self.order = order
        self.stage = DERIVED.index(site.name) - len(DERIVED)
        self.proved = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.site)!r}, {self.hook!r}, {self.use!r})"

    def wants(self, name: str) -> bool:
        """Whether an attention call may consist of calls of this function."""
        return name == _SDPA or name == _SOFTMAX or name in _PRODUCTS

    def handler(self, name: str, ordinal: int) -> AttentionHook:
        """Itself: which calls make up the attention is seen as they are made."""
        return self

    def before(self, call: Call) -> None:
        """Offer what is an argument."""
        role = _role(call)
        if role is None or call.notes["at"] != self.site.ordinal:
            return
        name = self.site.name
        if role == "sdpa" and name in _KEYWORDS:
            self.at_kernel(call)
        elif role == "qk" and name in _FACTORS:
            self.at_product(call)
        elif role == "softmax" and name == "scores":
            self.at_softmax(call)
        elif role == "av" and name in ("v", "pattern"):
            self.at_mixture(call)

    def after(self, call: Call) -> None:
        """Offer what is a result, or is derived from the arguments."""
        role = _role(call)
        if "made" not in call.notes:
            call.notes["made"] = True
            _state(call).made(call, role)
        if role is None or call.notes["at"] != self.site.ordinal:
            return
        if self.site.name == "z" and role in ("sdpa", "av"):
            new = self.offer(call, call.output)
            if new is not None:
                call.output = new
        elif role == "sdpa" and self.site.name in ("scores", "pattern"):
            self.derive(call)

    def offer(self, call: Call, value: Tensor) -> Tensor | None:
        """What the hook makes of a value; None if it keeps it."""
        new = self.hook(call.module, call.args, call.kwargs, value)
        if new is None:
            return None
        refuse_recomputed(call)
        check_fits(new, value, str(self.site))
        return new

    def at_kernel(self, call: Call) -> None:
        """Offer an argument of the kernel."""
        keyword = _KEYWORDS[self.site.name]
        new = self.offer(call, sdpa_arguments(call.args, call.kwargs)[keyword])
        if new is not None:
            _exchange(call, list(_KEYWORDS).index(self.site.name), keyword, new)

    def derive(self, call: Call) -> None:
        """Offer scores or pattern of the kernel's call."""
        where = self.site.path or type(call.module).__name__
        derived = call.notes.get(Derived)
        if derived is None:
            derived = call.notes[Derived] = Derived(derive_attention(call.args, call.kwargs, where=where))
        scores, pattern = derived.compute(graph=self.use != "read")
        if not self.proved and "edited" not in call.notes:
            self.proved = prove(derived.attention, pattern, call.output, where=where)
        new = self.offer(call, scores if self.site.name == "scores" else pattern)
        if new is not None:
            derived.replace(self.site.name, new)
            call.notes["edited"] = True
            call.output = derived.output(call.output)
        elif self.use == "watch" and "edited" not in call.notes and "watched" not in call.notes:
            z = derived.output(call.output)
            if z.requires_grad:
                call.notes["watched"] = True
                call.output = call.output.detach() + (z - z.detach())

    def at_product(self, call: Call) -> None:
        """Offer a factor of the product before the softmax; the second one is ``k`` transposed."""
        if _state(call).products > 1:
            raise CaptureError(
                f"{type(call.module).__name__} at {self.site.path!r} makes several products before its softmax, so "
                f"{str(self.site)!r} cannot be told; select '{self.site.path}::{call.name}' by its number instead",
                paths=(str(self.site),),
            )
        place = _PRODUCTS[call.name][_FACTORS[self.site.name]]
        factor = _argument(call, *place)
        transposed = self.site.name == "k"
        new = self.offer(call, factor.transpose(-1, -2) if transposed else factor)
        if new is not None:
            _exchange(call, *place, new.transpose(-1, -2) if transposed else new)

    def at_softmax(self, call: Call) -> None:
        """Offer what the softmax is taken of, without columns that belong to no key (attention sinks)."""
        given, keys = _argument(call, 0, "input"), _state(call).shape[-1]
        new = self.offer(call, given[..., :keys])
        if new is not None:
            whole = new if given.shape[-1] == keys else torch.cat([new, given[..., keys:]], dim=-1)
            _exchange(call, 0, "input", whole)

    def at_mixture(self, call: Call) -> None:
        """Offer a factor of the product after the softmax."""
        weights, values = _PRODUCTS[call.name]
        if self.site.name == "v":
            new = self.offer(call, _argument(call, *values))
            if new is not None:
                _exchange(call, *values, new)
            return
        used, softmax = _argument(call, *weights), cast(Tensor, _state(call).softmax)
        self.prove_used(call, used, softmax)
        new = self.offer(call, used.reshape(*softmax.shape[:-1], used.shape[-1]))
        if new is not None:
            _exchange(call, *weights, new.reshape(used.shape))

    def prove_used(self, call: Call, used: Tensor, softmax: Tensor) -> None:
        """Hold the factor against the softmax: dropout, or anything else in between, is refused.

        Raises:
            CaptureError: they differ.
        """
        if self.proved and not call.module.training:
            return
        cut = softmax[..., : used.shape[-1]].reshape(used.shape).to(used.dtype)
        try:
            self.proved = torch.equal(cut, used)
        except RuntimeError:  # a value of a transform cannot be looked at
            return
        if not self.proved:
            raise CaptureError(
                f"what {type(call.module).__name__} at {self.site.path!r} mixes its values by is not what its softmax "
                "returned (dropout in training, or a step in between); call model.eval(), or select "
                f"'{self.site.path}::softmax'",
                paths=(str(self.site),),
            )


def _argument(call: Call, at: int, keyword: str) -> Any:
    return call.args[at] if at < len(call.args) else call.kwargs.get(keyword)


def _exchange(call: Call, at: int, keyword: str, new: Tensor) -> None:
    if at < len(call.args):
        call.args = (*call.args[:at], new, *call.args[at + 1 :])
    else:
        call.kwargs = {**call.kwargs, keyword: new}


def attach_attention(root: nn.Module, site: CallSite, hook: Hook, *, use: Use = "edit", order: int = Order.EDIT) -> Removable:
    """Register ``hook`` at a place of an attention call, such as ``layers.3.attn::pattern``.

    Args:
        root: the model that ``site.path`` is relative to.
        site: the place; ``::pattern.1`` is that of the second attention call of one forward.
        hook: called as a forward hook with keyword arguments is, ``hook(module, args, kwargs, value)``; ``args`` and
            ``kwargs`` are those of the call that the value belongs to. It returns None or the value to go on with.
        use: ``"read"`` gives values without a graph, at the lowest price. ``"edit"`` gives values with their graph
            where autograd records one. ``"watch"`` also makes the output depend on the value, so that gradients reach
            it; the output's numbers stay those of the kernel, to the last bit.
        order: hooks run by place (q, k, v, scores, pattern, z), then by order.

    Raises:
        SelectionError: ``site`` is no place of an attention call.
    """
    if not site.derived:
        raise SelectionError(
            f"{str(site)!r} is no place of an attention call; those are {', '.join('::' + name for name in DERIVED)}",
            selector=str(site),
        )
    _, module = resolve_all(root, site.path) if site.path else ("", root)
    return attach_rule(root, module, AttentionHook(site, hook, use, order))
