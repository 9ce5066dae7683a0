"""Inside a sublayer: its output projection, the activation of an MLP, and the router of experts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tdcache.naming.trace import ForwardTrace, ModuleRun, TracedOp, TracedValue
from tdcache.naming.trace_flow import ADD, LINEAR, PASS, SCALE, DataFlow, main_operand, operands

__all__ = ["HiddenLayer", "activation", "base_of", "projection", "router"]

_PRODUCT = SCALE | ADD | PASS
_CHOICE = frozenset({"topk", "sort", "argmax"})


@dataclass(frozen=True, slots=True, eq=False)
class HiddenLayer:
    """The hidden layer of an MLP.

    Attributes:
        pre: what goes into the nonlinearity, as the first linear map gives it.
        post: what goes into the last linear map.
        down: the call of that map's module.
    """

    pre: TracedValue | None
    post: TracedValue
    down: ModuleRun


def base_of(value: TracedValue, flow: DataFlow) -> tuple[TracedValue, TracedValue]:
    """What a sublayer computed before norms and factors were put on it, and the first value behind its last map."""
    out = base = value
    for each, scaled in flow.before_scale(value):
        base = each
        if scaled:
            out = each
    return out, base


def projection(base: TracedValue, trace: ForwardTrace) -> ModuleRun | None:
    """The call of the module that made ``base`` by one linear map, or by several added up, as adapters do; or None."""
    op = base.op
    if op is None or op.name not in LINEAR:
        return next((call for call, _ in base.outputs if call.given and _is_affine(base, call.given[0][1])), None)
    for call in trace.of_path(op.path):
        simple = not any(True for _ in call.module.children()) and any(True for _ in call.module.parameters())
        if simple and call.ordinal == op.call and call.given:
            return call
    return None


def _is_affine(made: TracedValue, given: TracedValue) -> bool:
    """Whether only linear maps, factors and sums lead from one value to the other, a linear map among them."""
    todo, seen, linear, reached = [made], {made}, False, False
    while todo:
        value = todo.pop()
        op = value.op
        if value is given:
            reached = True
            continue
        if op is None:
            continue
        before = [each for each in op.given if each.op is not None or each is given]
        product = op.name in LINEAR | SCALE
        if not (product or op.name in ADD | PASS) or (product and len(before) > 1):
            return False
        linear = linear or op.name in LINEAR
        todo += [each for each in before if each not in seen]
        seen.update(before)
    return linear and reached


def activation(base: TracedValue, flow: DataFlow, cuts: Collection[TracedValue]) -> HiddenLayer | None:
    """The hidden layer before the last linear map of an MLP; None if that map is not a module's."""
    down = projection(base, flow.trace)
    if down is None:
        return None
    post = down.given[0][1]
    ends = _linear_ends(post, cuts)
    if len(ends) == 1:
        return HiddenLayer(ends[0][0], post, down)
    curved = [end for end, nonlinear in ends if nonlinear]
    return HiddenLayer(curved[0] if len(curved) == 1 else None, post, down)


def _linear_ends(post: TracedValue, cuts: Collection[TracedValue]) -> list[tuple[TracedValue, bool]]:
    """Where the elementwise calls that lead to ``post`` begin, and whether one of them is a nonlinearity."""
    found: dict[TracedValue, bool] = {}
    todo: list[tuple[TracedValue, bool]] = [(post, False)]
    seen: set[tuple[TracedValue, bool]] = set()
    while todo:
        value, nonlinear = todo.pop()
        if (value, nonlinear) in seen:
            continue
        seen.add((value, nonlinear))
        before = _elementwise(value, cuts)
        if not before:
            found[value] = found.get(value, False) or nonlinear
            continue
        bent = nonlinear or (value.op is not None and value.op.name not in _PRODUCT)
        todo += [(each, bent) for each in before]
    return list(found.items())


def _elementwise(value: TracedValue, cuts: Collection[TracedValue]) -> list[TracedValue]:
    """The operands of an elementwise call, results of the forward only; nothing where another kind of call made it."""
    op = value.op
    if op is None or op.name in LINEAR or _reshapes_linear(value) or value in cuts:
        return []
    return [each for each in op.given if each.shape == value.shape and each.op is not None]


def _reshapes_linear(value: TracedValue) -> bool:
    """Whether a value is nothing but the result of a linear map in another shape."""
    while value.op is not None and value.op.name in PASS:
        given = main_operand(value.op)
        if given is None:
            return False
        value = given
    return value.op is not None and value.op.name in LINEAR


def router(ops: Collection[TracedOp], flow: DataFlow) -> TracedValue | None:
    """The logits that choose experts: what leads, by a linear map, to the choice among ``ops``."""
    for op in sorted(ops, key=lambda op: op.time):
        value = main_operand(op) if op.name in _CHOICE else None
        for _ in range(12):
            if value is None or value.op is None:
                break
            if value.op.name in LINEAR:
                return value
            pair = operands(value.op) if value.op.name in ADD | SCALE else None
            given = main_operand(value.op)
            if pair is not None and isinstance(pair[0], TracedValue):
                given = pair[0]
            value = given
    return None
