"""Stacks of blocks and the terms that each block adds to the stream, found by data flow alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from tdcache.naming.gradients import gradient_of, positions
from tdcache.naming.trace import ForwardTrace, ModuleRun, TracedValue
from tdcache.naming.trace_attention import AttentionCall
from tdcache.naming.trace_flow import ADD, DataFlow, StreamStep, operands

__all__ = ["BlockStack", "StreamTerm", "TracedBlock", "called_stack", "fill", "mixed_axes"]

Kind = Literal["attn", "cross_attn", "mlp", "mixer"]


@dataclass(slots=True, eq=False)
class StreamTerm:
    """What one sublayer adds to the stream.

    Attributes:
        value: the term itself.
        kind: ``"attn"`` and ``"mixer"`` mix positions, the second without an attention call; ``"cross_attn"`` reads
            positions of something else; ``"mlp"`` mixes none.
        step: which step of the block's stream adds it.
        reads: the value of the stream that it was computed from.
        attention: its attention call.
        axes: of the stream's axes, those along which positions are mixed.
    """

    value: TracedValue
    kind: Kind
    step: int
    reads: TracedValue
    attention: tuple[AttentionCall, ...] = ()
    axes: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class TracedBlock:
    """One call of a block."""

    call: ModuleRun
    given: TracedValue
    """The stream as the block is given it."""
    made: TracedValue
    """The stream as the block returns it."""
    steps: list[StreamStep]
    """The steps to what it returns; empty where there is no way by additions, norms and constants."""
    terms: list[StreamTerm] = field(default_factory=list)
    fault: str = ""
    """Why nothing is known of the block, if nothing is."""

    @property
    def stream(self) -> list[TracedValue]:
        """The values of the stream, from the block's input to its output."""
        return [self.given, *(step.value for step in self.steps)]


@dataclass(slots=True, eq=False)
class BlockStack:
    """Blocks that run one after the other on one stream."""

    path: str
    blocks: list[TracedBlock]
    prefix: str = ""


def called_stack(path: str, module: nn.Module, trace: ForwardTrace, flow: DataFlow) -> BlockStack | None:
    """The stack of a container whose children are called and each add something to a stream; None if they do not."""
    paths = {f"{path}.{name}" if path else name for name, _ in module.named_children()}
    calls = sorted((call for call in trace.calls if call.path in paths), key=lambda call: call.begin)
    blocks = [_block_of(call, flow) for call in calls]
    good = [block for block in blocks if block is not None and any(step.kind == "add" for step in block.steps)]
    if not good:
        return None
    missing = [call for call, block in zip(calls, blocks, strict=True) if block not in good]
    if missing and (len(good) < 2 or len(missing) >= len(good) or _nested(missing)):
        return None
    if any(one.made.shape != other.given.shape for one, other in itertools.pairwise(good)) and _nested(calls):
        return None
    kept = [block or _broken(call) for call, block in zip(calls, blocks, strict=True)]
    return BlockStack(path, [block for block in kept if block is not None])


def _nested(missing: Sequence[ModuleRun]) -> bool:
    """Whether what has no stream itself is a container of blocks."""
    inner = [each for call in missing for each in call.module.modules() if each is not call.module]
    return any(isinstance(each, nn.ModuleList) and len(each) > 1 for each in inner) and len(missing) > 1


def _block_of(call: ModuleRun, flow: DataFlow) -> TracedBlock | None:
    for _, made in call.made:
        for _, given in call.given:
            if given is not made and given.shape == made.shape and given.data.is_floating_point():
                steps = flow.stream(given, made)
                if steps:
                    return TracedBlock(call, given, made, steps)
    return None


def _broken(call: ModuleRun) -> TracedBlock | None:
    shapes = {given.shape: given for _, given in reversed(call.given) if given.data.is_floating_point()}
    for _, made in call.made:
        if made.shape in shapes:
            fault = "what the block returns does not come from its input by additions, norms and constant factors"
            return TracedBlock(call, shapes[made.shape], made, [], fault=fault)
    return None


def fill(block: TracedBlock, flow: DataFlow, everything: Sequence[AttentionCall]) -> None:
    """Find the terms of a block."""
    if block.fault:
        return
    mine = [each for each in everything if block.call.begin < each.op.time < block.call.end]
    for at, step in enumerate(block.steps):
        if step.term is None:
            continue
        cuts = block.stream[: at + 1]
        block.terms += [
            term for value in _split(step.term, cuts, flow, mine) if (term := _term(value, at, cuts, flow, mine))
        ]


def _split(
    value: TracedValue, cuts: list[TracedValue], flow: DataFlow, mine: Sequence[AttentionCall]
) -> list[TracedValue]:
    """The parts of a term that is a sum of an attention and something that is none; else the term."""
    for each, scaled in flow.before_scale(value):
        if scaled or each.op is None or flow.norm_input(each) is not None:
            break
        if each.op.name in ADD and each.data.numel() == value.data.numel():
            pair = operands(each.op)
            parts = [part for part in pair or () if isinstance(part, TracedValue) and part.shape == each.shape]
            if len(parts) == 2 and all(flow.depends(part, cuts) for part in parts):
                mixing = [_reads_attention(part, cuts, flow, mine) for part in parts]
                if mixing[0] != mixing[1]:
                    return [split for part in parts for split in _split(part, cuts, flow, mine)]
            break
    return [value]


def _reads_attention(
    value: TracedValue, cuts: list[TracedValue], flow: DataFlow, mine: Sequence[AttentionCall]
) -> bool:
    ops = set(flow.between(value, cuts)[0])
    return any(each.op in ops for each in mine)


def _term(
    value: TracedValue, at: int, cuts: list[TracedValue], flow: DataFlow, mine: Sequence[AttentionCall]
) -> StreamTerm | None:
    ops, read = flow.between(value, cuts)
    if not read:
        return None
    latest = max(read, key=cuts.index)
    made = set(ops)
    attention = tuple(each for each in mine if each.op in made)
    axes = mixed_axes(value, latest)
    own = [each for each in attention if each.key is None or flow.depends(each.key, cuts)]
    kind: Kind = "mlp"
    if attention and not own and not axes:
        kind = "cross_attn"
    elif attention and axes:
        kind = "attn"
    elif axes:
        kind = "mixer"
    return StreamTerm(value, kind, at, latest, attention, axes)


def mixed_axes(value: TracedValue, source: TracedValue) -> frozenset[int]:
    """The axes of ``source`` along which a position of ``value`` depends on others, by gradient."""
    axes: set[int] = set()
    for at in positions(source.shape[:-1]):
        if axes == set(range(1, len(source.shape) - 1)):  # all but the rows: no other position can tell more
            break
        touched = _reached(at, value, source)
        if touched is None:
            continue
        for axis, index in enumerate(at):
            others = torch.arange(touched.shape[axis]) != index
            if touched.index_select(axis, others.nonzero()[:, 0]).any():
                axes.add(axis)
    return frozenset(axes)


def _reached(at: tuple[int, ...], value: TracedValue, source: TracedValue) -> Tensor | None:
    """Which positions of ``source`` the gradient of one of ``value`` reaches; None if there is no graph.

    Positions are all axes but the last.
    """
    if value.edge is None or source.edge is None or value.data.numel() != source.data.numel():
        return None
    start = torch.zeros_like(value.data).reshape(source.shape)
    random = torch.Generator().manual_seed(0)
    start[at] = torch.randn(source.shape[-1], generator=random, dtype=torch.float64).to(start)
    gradient = gradient_of(value.edge, source.edge, start.reshape(value.shape))
    if gradient is None:
        return None
    size = gradient.abs().amax(-1)
    return (size > 1e-9 * size.max()).cpu()
