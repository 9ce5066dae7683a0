"""The places of an attention call: ``q``, ``k``, ``v``, ``scores``, ``pattern`` and ``z``, whatever computes them.

Under ``scaled_dot_product_attention`` the first three and the last are arguments and result of the call; scores and
pattern are derived (:mod:`tdcache.function_calls.attention`). Where a forward spells attention out, they are operands:
of the product before the softmax, of the softmax, and of the product after it, and an edit exchanges that operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from tdcache.errors import CaptureError, SelectionError
from tdcache.function_calls.attach import attach_rules, module_of, refuse_recomputed
from tdcache.function_calls.attention import Attention, derive_attention, derive_registered, prove
from tdcache.function_calls.attention_calls import (
    PRODUCTS,
    SDPA,
    SOFTMAX,
    Product,
    argument,
    exchange,
    ordered,
    progress,
    restored,
    role_of,
)
from tdcache.function_calls.handlers import Call, CallRule, Handler, Need
from tdcache.function_calls.names import DERIVED
from tdcache.function_calls.overlay import INTERFACE, may_attend
from tdcache.function_calls.sites import CallSite
from tdcache.hooks.registrations import Order
from tdcache.hooks.values import check_fits
from tdcache.types import Removable

__all__ = ["AtInterface", "AttentionHook", "Derived", "InGraph", "Use", "attach_attention", "attention_rule"]

Use = Literal["read", "edit", "watch"]
"""What a hook does with a derived value: read its numbers, replace it, or also follow its gradient."""

_COMPUTED = ("scores", "pattern")
_POSITIONS = {"q": 0, "k": 1, "v": 2}
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
        return name in (INTERFACE, SDPA, SOFTMAX) or name in PRODUCTS

    def needs(self, names: Container[str], *, tables: bool) -> Need:
        """Where the forward takes its attention function from a table, nothing outside of that."""
        if not tables:
            return Need.EVERYTHING
        return Need.ATTENTION if self.site.name in _COMPUTED else Need.NOTHING

    def handler(self, name: str, ordinal: int) -> Handler | None:
        """Itself: which calls make up the attention is seen as they are made."""
        if name != INTERFACE:
            return self
        if ordinal != self.site.ordinal:
            return None
        return self if self.site.name in _COMPUTED else AtInterface(self)

    def traceable(self, names: Container[str], *, tables: bool) -> tuple[str, Handler] | None:
        """Where the function is taken from a table; a gradient does not come out of a graph."""
        if not tables or self.use == "watch":
            return None
        label = f"{INTERFACE}.{self.site.ordinal}" if self.site.ordinal else INTERFACE
        return label, InGraph(self) if self.site.name in _COMPUTED else AtInterface(self)

    def before(self, call: Call) -> None:
        """Offer what is an argument."""
        name = self.site.name
        if call.name == INTERFACE:
            call.notes["at"] = progress(call).attentions
            queries = argument(call, 1, "query")
            progress(call).queries = tuple(queries.shape[:-1]) if isinstance(queries, Tensor) else ()
            return
        role = role_of(call)
        if role is None or not self.concerns(call):
            return
        if role == "sdpa" and name in _KEYWORDS:
            self.at_argument(call, _POSITIONS[name])
        elif role == "qk" and name in ("q", "k"):
            self.at_product(call)
        elif role == "softmax" and name in ("q", "k"):
            self.refuse_untold(call)
        elif role == "softmax" and name == "scores":
            self.at_softmax(call)
        elif role == "av" and name in ("v", "pattern"):
            self.at_mixture(call)

    def after(self, call: Call) -> None:
        """Offer what is a result, or is derived from the arguments."""
        name = self.site.name
        if call.name == INTERFACE:
            if progress(call).attentions == call.notes["at"]:  # neither torch's kernel nor a softmax was seen inside
                self.at_result(call)
            return
        role = role_of(call)
        if "made" not in call.notes:
            call.notes["made"] = True
            progress(call).made(call, role)
        if self.concerns(call) and (role == "sdpa" or (role == "av" and name == "z")):
            self.at_result(call)

    def concerns(self, call: Call) -> bool:
        """Whether the place may be here: what goes in and out of a table's function is offered there, not inside."""
        if self.site.name not in _COMPUTED and call.run.inside:
            return False
        return call.notes["at"] == self.site.ordinal  # type: ignore[no-any-return]

    def offer(self, call: Call, value: Tensor) -> Tensor | None:
        """What the hook makes of a value; None if it keeps it."""
        new = self.hook(call.module, call.args, call.kwargs, value)
        if new is None:
            return None
        refuse_recomputed(call)
        check_fits(new, value, str(self.site))
        return new

    def through(self, call: Call, value: Tensor) -> Tensor | None:
        """As :meth:`offer`, but a value that is watched goes on itself: it may be a view of what was there."""
        new = self.offer(call, value)
        return value if new is None and self.use == "watch" else new

    def at_argument(self, call: Call, at: int) -> None:
        """Offer an argument of the function that computes the attention."""
        keyword = _KEYWORDS[self.site.name]
        new = self.through(call, argument(call, at, keyword))
        if new is not None:
            exchange(call, at, keyword, new)

    def at_result(self, call: Call) -> None:
        """Offer ``z``, or scores and pattern as they follow from the arguments."""
        if self.site.name == "z":
            product: Product | None = call.notes.get("product")
            axes = None if product is None else product.axes
            new = self.through(call, ordered(_result(call), axes))
            if new is not None:
                _set_result(call, restored(new, axes))
        elif self.site.name in _COMPUTED:
            self.derive(call)

    def derive(self, call: Call) -> None:
        """Offer scores or pattern, and let the result follow from what becomes of them."""
        where = self.site.path or type(call.module).__name__
        derived = call.notes.get(Derived)
        if derived is None:
            make = derive_registered if call.name == INTERFACE else derive_attention
            derived = call.notes[Derived] = Derived(make(call.args, call.kwargs, where=where))
        scores, pattern = derived.compute(graph=self.use != "read")
        result = _result(call)
        if not self.proved and "edited" not in call.notes and not is_dynamo_compiling():
            self.proved = prove(derived.attention, pattern, result, where=where)
        value = scores if self.site.name == "scores" else pattern
        shown = _unpacked(call, value)
        if shown is not value and self.use == "watch":
            derived.replace(self.site.name, shown.reshape(value.shape))
        new = self.offer(call, shown)
        if new is not None:
            derived.replace(self.site.name, new.reshape(value.shape))
            call.notes["edited"] = True
            _set_result(call, derived.output(result))
        elif self.use == "watch" and "edited" not in call.notes and "watched" not in call.notes:
            z = derived.output(result)
            if z.requires_grad:
                call.notes["watched"] = True
                _set_result(call, result.detach() + (z - z.detach()))

    def at_product(self, call: Call) -> None:
        """Offer a factor of the product before the softmax; the second one is ``k`` transposed."""
        if progress(call).products > 1 or not may_attend(call.module):
            progress(call).product = call.name
            return
        product: Product = call.notes["product"]
        factor = product.left if self.site.name == "q" else product.right
        new = self.through(call, factor.read(call))
        if new is not None:
            factor.write(call, new)

    def refuse_untold(self, call: Call) -> None:
        """Refuse ``q`` and ``k`` where several products may be theirs; known once there is a softmax after them.

        Raises:
            CaptureError: there are several.
        """
        if progress(call).products > 1:
            raise CaptureError(
                f"{type(call.module).__name__} at {self.site.path!r} makes several products before its softmax, so "
                f"{str(self.site)!r} cannot be told; select '{self.site.path}::{progress(call).product}' by its number "
                "instead",
                paths=(str(self.site),),
            )

    def at_softmax(self, call: Call) -> None:
        """Offer what the softmax is taken of, without columns that belong to no key (attention sinks)."""
        given, keys = argument(call, 0, "input"), progress(call).shape[-1]
        new = self.through(call, given if given.shape[-1] == keys else given[..., :keys])
        if new is not None:
            whole = new if given.shape[-1] == keys else torch.cat([new, given[..., keys:]], dim=-1)
            exchange(call, 0, "input", whole)

    def at_mixture(self, call: Call) -> None:
        """Offer a factor of the product after the softmax."""
        product: Product = call.notes["product"]
        if self.site.name == "v":
            new = self.through(call, product.right.read(call))
            if new is not None:
                product.right.write(call, new)
            return
        used, softmax = product.left.read(call), cast(Tensor, progress(call).softmax)
        if "exchanged" not in call.notes:
            self.prove_used(call, used, softmax)
        shape = (*softmax.shape[:-1], used.shape[-1])
        new = self.through(call, used if used.shape == shape else used.reshape(shape))
        if new is not None:
            product.left.write(call, new.reshape(used.shape))
            call.notes["exchanged"] = True

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


class AtInterface:
    """The handler of ``q``, ``k``, ``v`` or ``z`` at a function that was taken from a table."""

    def __init__(self, hook: AttentionHook) -> None:
        self.hook = hook
        self.at = 1 + _POSITIONS.get(hook.site.name, -1)
        """The position of the argument; 0, that of the module, for the result."""
        self.stage = hook.stage
        self.order = hook.order

    def before(self, call: Call) -> None:
        """Give the argument to the hook if it is the value meant."""
        if self.at:
            self.hook.at_argument(call, self.at)

    def after(self, call: Call) -> None:
        """Give the result to the hook if it is the value meant."""
        if not self.at:
            self.hook.at_result(call)


class InGraph:
    """The handler of ``scores`` or ``pattern`` where dynamo traces: a graph cannot be compared with its own result."""

    def __init__(self, hook: AttentionHook) -> None:
        self.hook = hook
        self.stage = hook.stage
        self.order = hook.order

    def before(self, call: Any) -> None:
        """Do nothing: the value is derived after the call."""

    def after(self, call: Any) -> None:
        """Derive the value from the arguments, as it was proved for this one function; break the graph for others."""
        if call.function.__name__ != "sdpa_attention_forward" or call.kwargs.get("position_bias") is not None:
            torch._dynamo.graph_break()  # noqa: SLF001
        self.hook.derive(call)


def _unpacked(call: Call, value: Tensor) -> Tensor:
    """A value with the heads and queries that a table's function was given: for one token it may pack them by group."""
    if call.name != SDPA or not call.run.inside:
        return value
    shape = (*progress(call).queries, value.shape[-1])
    return value if value.shape == shape or value.numel() != math.prod(shape) else value.reshape(shape)


def _result(call: Call) -> Tensor:
    """``z``, heads before positions; functions of a table return ``(batch, positions, heads, width)`` and weights."""
    return call.output[0].transpose(1, 2) if call.name == INTERFACE else call.output  # type: ignore[no-any-return]


def _set_result(call: Call, new: Tensor) -> None:
    call.output = (new.transpose(1, 2).contiguous(), *call.output[1:]) if call.name == INTERFACE else new


def attach_attention(
    root: nn.Module, site: CallSite, hook: Hook, *, use: Use = "edit", order: int = Order.EDIT
) -> Removable:
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
    return attach_rules(root, [attention_rule(root, site, hook, use=use, order=order)])


def attention_rule(
    root: nn.Module, site: CallSite, hook: Hook, *, use: Use = "edit", order: int = Order.EDIT
) -> tuple[nn.Module, CallRule]:
    """What :func:`attach_attention` attaches, for :func:`tdcache.function_calls.attach.attach_rules`."""
    if not site.derived:
        raise SelectionError(
            f"{str(site)!r} is no place of an attention call; those are {', '.join('::' + name for name in DERIVED)}",
            selector=str(site),
        )
    return module_of(root, site), AttentionHook(site, hook, use, order)
