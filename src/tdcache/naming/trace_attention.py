"""The attention calls of a trace: the kernel, or product, softmax and product in plain sight."""

from __future__ import annotations

from dataclasses import dataclass

from tdcache.function_calls.attention_calls import PRODUCTS, SDPA, SOFTMAX
from tdcache.naming.trace import ForwardTrace, TracedOp, TracedValue
from tdcache.naming.trace_flow import PASS, main_operand

__all__ = ["AttentionCall", "FUSED", "attentions"]

FUSED = "multi_head_attention_forward"
"""torch's own attention: one call from input to output, with no place inside that could be read."""

_ON_THE_WAY = PASS | {"getitem", "softmax", "mul", "masked_fill", "nan_to_num", "add", "div", "where", "sub", "cat"}


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One attention call.

    Attributes:
        path: the module whose forward makes it.
        call: which call of that module.
        ordinal: which attention call of that forward: the number in ``path::pattern.1``.
        op: the call that makes ``z``.
        query, key, value: what goes in, as the call sees them.
        z: what comes out.
        visible: False for torch's fused one, whose inside has no places.
    """

    path: str
    call: int
    ordinal: int
    op: TracedOp
    query: TracedValue | None
    key: TracedValue | None
    value: TracedValue | None
    z: TracedValue
    visible: bool = True


def attentions(trace: ForwardTrace) -> list[AttentionCall]:
    """Every attention call of a forward, in order."""
    found: list[AttentionCall] = []
    counts: dict[tuple[str, int], int] = {}
    for op in trace.ops:
        parts = _parts(op)
        if parts is None or not op.made:
            continue
        at = (op.path, op.call)
        ordinal = counts.get(at, 0)
        counts[at] = ordinal + 1
        found.append(AttentionCall(*at, ordinal, op, *parts, op.made[0], visible=op.name != FUSED))
    return found


def _parts(op: TracedOp) -> tuple[TracedValue | None, TracedValue | None, TracedValue | None] | None:
    """Query, key and value of the attention that ``op`` completes; None if it completes none."""
    if op.name == SDPA:
        named = [*op.args[:3], *(op.kwargs[name] for name in ("query", "key", "value") if name in op.kwargs)]
        return (named[0], named[1], named[2]) if len(named) == 3 else None
    if op.name == FUSED:
        return op.args[0], op.args[1], op.args[2]
    factors = _factors(op)
    if factors is None:
        return None
    softmax = _back_to(factors[0], SOFTMAX)
    given = None if softmax is None else main_operand(softmax)
    product = None if given is None else _product_before(given)
    query = None if product is None else _factors(product)
    return None if query is None else (*query, factors[1])


def _factors(op: TracedOp) -> tuple[TracedValue, TracedValue] | None:
    """The two factors of a product over at least three axes."""
    if op.name == "einsum":
        factors = [each for each in op.given if each.data.dim() >= 3]
    elif op.name in PRODUCTS:
        places = PRODUCTS[op.name]
        given = [op.args[at] if at < len(op.args) else op.kwargs.get(keyword) for at, keyword in places]
        factors = [each for each in given if isinstance(each, TracedValue) and each.data.dim() >= 3]
    else:
        return None
    return (factors[0], factors[1]) if len(factors) == 2 else None


def _back_to(value: TracedValue, name: str) -> TracedOp | None:
    """The call of ``name`` that ``value`` comes from by changes of shape and dtype, dropout, cuts and masks."""
    for _ in range(12):
        op = value.op
        if op is None or op.name == name:
            return op
        given = main_operand(op)
        if op.name not in _ON_THE_WAY or given is None:
            return None
        value = given
    return None


def _product_before(value: TracedValue) -> TracedOp | None:
    """The product that scores come from, behind scale, mask, bias and cap."""
    todo, seen = [value], {value}
    for _ in range(80):
        if not todo:
            return None
        op = todo.pop(0).op
        if op is None:
            continue
        if _factors(op) is not None:
            return op
        if op.name in ("linear", "embedding", "layer_norm"):
            continue
        new = [given for given in op.given if given not in seen and given.data.dim() >= 3]
        seen.update(new)
        todo.extend(new)
    return None
