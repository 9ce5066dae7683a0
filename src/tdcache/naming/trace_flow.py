"""Walks over a trace: from a value back to where it came from, and which values lie between.

The walk that matters goes from a block's output to its input through additions, constant factors, changes of shape or
dtype, and norms only. What is added on the way are the terms of the residual stream.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tdcache.naming.trace import ForwardTrace, ModuleRun, TracedOp, TracedValue

__all__ = [
    "ADD",
    "DataFlow",
    "LINEAR",
    "PASS",
    "SCALE",
    "StreamStep",
    "constant",
    "main_operand",
    "operands",
    "sources",
]

ADD = frozenset({"add", "add_", "iadd"})
SCALE = frozenset({"mul", "mul_", "div", "div_", "imul"})
LINEAR = frozenset({"linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum", "conv1d", "conv2d", "grouped_mm"})
_SHAPES = ("view", "reshape", "transpose", "permute", "contiguous", "clone", "squeeze", "unsqueeze", "flatten", "roll")
_SHAPES2 = ("unflatten", "movedim", "view_as", "reshape_as", "expand", "expand_as", "swapaxes", "get")
_DTYPES = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "dropout", "dropout1d", "dropout2d")
PASS = frozenset((*_SHAPES, *_SHAPES2, *_DTYPES))
"""Calls that change shape or dtype alone; dropout is switched off."""
_LIKE = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
"""Calls whose second argument gives a shape or dtype, and no number."""
NORM = frozenset({"layer_norm", "rms_norm"})


@dataclass(frozen=True, slots=True, eq=False)
class StreamStep:
    """One step along the stream, from a block's input on.

    Attributes:
        kind: ``"add"`` of a term, ``"norm"`` of the stream itself, or ``"scale"`` by a constant.
        value: the stream after the step.
        term: what is added.
        norm: the call of the norm's module; None for a norm that is a function.
        factor: the constant, where it is a number.
        weight: the constant, or what is added, where it is a parameter.
    """

    kind: Literal["add", "norm", "scale"]
    value: TracedValue
    term: TracedValue | None = None
    norm: ModuleRun | None = None
    factor: float = 1.0
    weight: TracedValue | None = None


def operands(op: TracedOp) -> tuple[Any, Any] | None:
    """The two sides of an addition or product; None if it has other arguments that count."""
    args = [*op.args, *(op.kwargs[name] for name in ("input", "other") if name in op.kwargs)]
    if len(args) != 2 or op.kwargs.get("alpha", 1) != 1 or op.kwargs.get("rounding_mode") is not None:
        return None
    return args[0], args[1]


def main_operand(op: TracedOp) -> TracedValue | None:
    """What a change of shape or dtype is applied to."""
    first = op.args[0] if op.args else op.kwargs.get("input")
    return first if isinstance(first, TracedValue) else None


def constant(value: Any) -> float | None:
    """A factor that is one number: a Python number, or a tensor of one element that is no result of the forward."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, TracedValue) and value.data.numel() == 1 and value.data.is_floating_point():
        return float(value.data)
    return None


def sources(value: TracedValue) -> tuple[TracedValue, ...]:
    """What a value was computed from: the arguments of its call, or of the module that made it out of sight."""
    if value.op is not None:
        return value.op.given[:1] if value.op.name in _LIKE else value.op.given
    if value.outputs and not isinstance(value.tensor, nn.Parameter):  # a bias that a module returns is made by none
        call = value.outputs[0][0]
        return () if any(given is value for _, given in call.given) else tuple(given for _, given in call.given)
    return ()


class DataFlow:
    """The walks over one trace; norms are found by probing the modules of its model."""

    def __init__(self, trace: ForwardTrace) -> None:
        self.trace = trace
        self._norms: dict[str, bool] = {}

    def norm_call(self, value: TracedValue) -> ModuleRun | None:
        """The call of a norm's module that made ``value``, or None."""
        for call, _ in value.outputs:
            if call.given and self.is_norm(call, value):
                return call
        return None

    def is_norm(self, call: ModuleRun, value: TracedValue) -> bool:
        """Whether the module that made ``value`` forgets the scale of its input, as a norm over units does."""
        found = self._norms.get(call.path)
        if found is None:
            found = self._norms[call.path] = _forgets_scale(call, value)
        return found

    def norm_input(self, value: TracedValue) -> tuple[TracedValue, ModuleRun | None] | None:
        """What a norm was applied to, if ``value`` is what a norm returned, and the call of its module."""
        call = self.norm_call(value)
        if call is not None:
            return call.given[0][1], call
        if value.op is not None and value.op.name in NORM:
            given = main_operand(value.op)
            return None if given is None else (given, None)
        return None

    def stream(self, source: TracedValue, end: TracedValue) -> list[StreamStep] | None:
        """The steps along the stream from ``source`` to ``end``; None if there is no such way."""
        return self._stream(source, end, {})

    def _stream(
        self, source: TracedValue, end: TracedValue, seen: dict[TracedValue, list[StreamStep] | None]
    ) -> list[StreamStep] | None:
        if end is source:
            return []
        if end not in seen:
            seen[end] = None  # while it is looked for
            seen[end] = self._back(source, end, seen)
        return seen[end]

    def _back(
        self, source: TracedValue, end: TracedValue, seen: dict[TracedValue, list[StreamStep] | None]
    ) -> list[StreamStep] | None:
        if end.data.numel() != source.data.numel():
            return None
        normed = self.norm_input(end)
        if normed is not None:
            before = self._stream(source, normed[0], seen)
            return None if before is None else [*before, StreamStep("norm", end, norm=normed[1])]
        op = end.op
        if op is None:
            return None
        if op.name in PASS:
            given = main_operand(op)
            return None if given is None else self._stream(source, given, seen)
        if op.name in ADD:
            return self._through_add(source, end, op, seen)
        found = self._through_scale(source, end, op, seen) if op.name in SCALE else None
        same = next((each for each in op.given if _same(each, end)), None) if found is None else None
        return found if same is None else self._stream(source, same, seen)  # a cut that leaves all, a mask of ones

    def _through_add(
        self, source: TracedValue, end: TracedValue, op: TracedOp, seen: dict[Any, Any]
    ) -> list[StreamStep] | None:
        pair = operands(op)
        for one, other in (pair, pair[::-1]) if pair else ():
            before = self._stream(source, one, seen) if isinstance(one, TracedValue) else None
            if before is not None:
                step = StreamStep("add", end, term=other, weight=other if _is_weight(other, one) else None)
                return [*before, step] if isinstance(other, TracedValue) else None
        return None

    def _through_scale(
        self, source: TracedValue, end: TracedValue, op: TracedOp, seen: dict[Any, Any]
    ) -> list[StreamStep] | None:
        pair = operands(op)
        for one, other in (pair, pair[::-1]) if pair else ():
            weight = other if isinstance(one, TracedValue) and _is_weight(other, one) else None
            factor = constant(other)
            before = self._stream(source, one, seen) if isinstance(one, TracedValue) else None
            divided = op.name.startswith("div")
            if before is not None and weight is not None and not divided:
                return [*before, StreamStep("scale", end, weight=weight)]
            if before is not None and factor is not None and weight is None:
                return [*before, StreamStep("scale", end, factor=1 / factor if divided else factor)]
        return None

    def between(self, value: TracedValue, cuts: Collection[TracedValue]) -> tuple[list[TracedOp], set[TracedValue]]:
        """The calls that lead to ``value`` from ``cuts``, and which of these they read."""
        ops, read, seen, todo = [], set(), {value}, [value]
        while todo:
            each = todo.pop()
            if each.op is not None:
                ops.append(each.op)
            for given in sources(each):
                if given in cuts:
                    read.add(given)
                elif given not in seen:
                    seen.add(given)
                    todo.append(given)
        return ops, read

    def depends(self, value: TracedValue, on: Collection[TracedValue], cuts: Collection[TracedValue] = ()) -> bool:
        """Whether ``value`` was computed from one of ``on``, on a way that avoids ``cuts``."""
        return value in on or bool(self.between(value, {*on, *cuts})[1] & set(on))

    def before_scale(self, value: TracedValue) -> Iterator[tuple[TracedValue, bool]]:
        """``value`` and what it was before norms, factors and changes of shape, nearest first.

        With each the word whether a norm or a factor stands between it and the one before.
        """
        yield value, False
        while True:
            normed = self.norm_input(value)
            before = (normed[0], True) if normed is not None else _before(value)
            if before is None:
                return
            yield before
            value = before[0]


def _before(value: TracedValue) -> tuple[TracedValue, bool] | None:
    """What a value was before a change of shape, a bias, or a factor (then with True)."""
    op = value.op
    if op is None:
        return None
    if op.name in PASS:
        given = main_operand(op)
        return None if given is None else (given, False)
    if op.name in SCALE or op.name in ADD:
        pair = operands(op)
        for one, other in (pair, pair[::-1]) if pair else ():
            scaled = op.name in SCALE
            if isinstance(one, TracedValue) and ((scaled and constant(other) is not None) or _is_weight(other, one)):
                return one, scaled
    return None


def _same(one: TracedValue, other: TracedValue) -> bool:
    return one.shape == other.shape and one.data.dtype == other.data.dtype and torch.equal(one.data, other.data)


def _is_weight(other: Any, beside: TracedValue) -> bool:
    """Whether a factor is a parameter along the units, as a layer scale is."""
    return (
        isinstance(other, TracedValue)
        and other.op is None
        and isinstance(other.tensor, nn.Parameter)
        and other.data.numel() in (1, beside.shape[-1])
    )


def _forgets_scale(call: ModuleRun, value: TracedValue) -> bool:
    module, given = call.module, call.given[0][1]
    simple = not any(True for _ in module.children()) and all(weight.dim() <= 1 for weight in module.parameters())
    floats = [each for _, each in call.given if each.data.is_floating_point()]
    if not simple or len(floats) != 1 or given.shape != value.shape or not given.data.is_floating_point():
        return False
    if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        probe = torch.randn(given.shape, dtype=given.data.dtype, generator=torch.Generator().manual_seed(0))
        probe = probe.to(given.data.device) * 100
        try:
            small, large = module(probe), module(7 * probe)
        except (RuntimeError, TypeError, ValueError):
            return False
    if not isinstance(small, torch.Tensor) or small.shape != probe.shape:
        return False
    moved = (small - probe).abs().max() > 1e-3 * probe.abs().max()
    return bool(moved and (small - large).abs().max() <= 1e-3 * small.abs().max())
