"""Blocks that are no modules: sublayers in lists, whose results a model's own forward adds to the stream.

Many hand-written transformers have no class for a block: ``for attn, ff in self.layers: x = attn(x) + x; ...``, or keep
all attentions in one list and all MLPs in another. What runs for one number of such a list is the block of that number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from tdcache.naming.resolve_blocks import BlockStack, TracedBlock
from tdcache.naming.trace import ForwardTrace, ModuleRun, TracedValue
from tdcache.naming.trace_flow import DataFlow, StreamStep

__all__ = ["nested_lists", "sibling_lists"]


def nested_lists(path: str, module: nn.Module, trace: ForwardTrace, flow: DataFlow) -> BlockStack | None:
    """The stack of a container whose children hold sublayers; None if these make no stream."""
    head = f"{path}." if path else ""
    return _stack_of(path, [f"{head}{name}" for name, _ in module.named_children()], trace, flow)


def sibling_lists(trace: ForwardTrace, flow: DataFlow) -> Iterator[BlockStack]:
    """The stacks of models that keep sublayers of one kind in one list, all lists of one length."""
    for path, module in trace.model.named_modules():
        lists = [(name, len(each)) for name, each in module.named_children() if isinstance(each, nn.ModuleList)]
        for length in dict.fromkeys(size for _, size in lists):
            head = f"{path}." if path else ""
            names = [f"{head}{name}" for name, size in lists if size == length]
            members = [f"{name}.{at}" for name in names for at in range(length)]
            stack = _stack_of(path, members, trace, flow)
            if stack is not None:
                yield stack


def _stack_of(path: str, members: Sequence[str], trace: ForwardTrace, flow: DataFlow) -> BlockStack | None:
    """The stack of what runs inside the members of lists; those with the same last number are one block."""
    runs = list(_outermost(trace.calls, members))
    groups = [list(group) for _, group in itertools.groupby(runs, key=lambda run: _number(run, members))]
    if not groups or any(run.parent is None for run in runs) or _are_blocks(runs, flow):
        return None
    blocks: list[TracedBlock] = []
    for at, group in enumerate(groups):
        ends = list(_read(groups[at + 1][0], flow)) if at + 1 < len(groups) else _after(group, trace)
        block = _block(group, list(_read(group[0], flow)), ends, flow, blocks[-1:])
        if block is None:
            return None
        blocks.append(block)
    return BlockStack(path, blocks) if sum(_adds(block.steps) for block in blocks) > 1 else None


def _outermost(calls: Iterable[ModuleRun], members: Sequence[str]) -> Iterator[ModuleRun]:
    """The calls of members and of what is inside of them, without those that run during another of these."""
    last: ModuleRun | None = None
    for call in sorted(calls, key=lambda call: call.begin):
        if _member(call, members) is not None and not (last is not None and last.holds(call)):
            last = call
            yield call


def _member(run: ModuleRun, members: Sequence[str]) -> str | None:
    return next((each for each in members if f"{run.path}.".startswith(f"{each}.")), None)


def _number(run: ModuleRun, members: Sequence[str]) -> str:
    return (_member(run, members) or "").rpartition(".")[2]


def _are_blocks(runs: Sequence[ModuleRun], flow: DataFlow) -> bool:
    """Whether these modules are blocks themselves, with several sums each."""
    return any(
        _adds(flow.stream(given, made) or ()) > 1
        for run in runs
        for _, made in run.made
        for _, given in run.given
        if given is not made and given.shape == made.shape
    )


def _adds(steps: Sequence[StreamStep]) -> int:
    return sum(step.kind == "add" for step in steps)


def _read(run: ModuleRun, flow: DataFlow) -> Iterator[TracedValue]:
    """What may be the stream that a module reads: what it is given, or what that was before a norm."""
    for _, given in run.given:
        if given.data.is_floating_point():
            yield given
            normed = flow.norm_input(given)
            if normed is not None:
                yield normed[0]


def _after(group: Sequence[ModuleRun], trace: ForwardTrace) -> list[TracedValue]:
    """Every value that is made after the first sublayer of the last block."""
    return [value for op in trace.ops if op.time > group[0].begin for value in op.made]


def _block(
    group: Sequence[ModuleRun],
    starts: Sequence[TracedValue],
    ends: Sequence[TracedValue],
    flow: DataFlow,
    before: Sequence[TracedBlock],
) -> TracedBlock | None:
    """The block from one of ``starts`` to one of ``ends``: in steps like those of the one before, else of most sums."""
    known = [[step.kind for step in block.steps] for block in before]
    best: tuple[int, TracedValue, TracedValue, list[StreamStep]] | None = None
    for start, end in itertools.product(starts, dict.fromkeys(ends)):
        steps = flow.stream(start, end) if end.shape == start.shape and end is not start else None
        if not steps or not _adds(steps):
            continue
        if [step.kind for step in steps] in known:
            return _made(group, start, end, steps)
        if best is None or _adds(steps) > best[0]:
            best = (_adds(steps), start, end, steps)
    return None if best is None else _made(group, *best[1:])


def _made(group: Sequence[ModuleRun], start: TracedValue, end: TracedValue, steps: list[StreamStep]) -> TracedBlock:
    """A block whose call is a part of that of the module whose forward runs it."""
    outer = group[0].parent or group[0]
    begin = min(group[0].begin - 1, start.op.time) if start.op is not None else group[0].begin - 1
    stop = min([run.end for run, _ in end.outputs] or [0 if end.op is None else end.op.time])
    call = ModuleRun(outer.path, outer.module, outer.ordinal, outer.parent, begin, stop)
    return TracedBlock(call, start, end, steps)
