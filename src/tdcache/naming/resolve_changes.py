"""What happens to the stream within a block, step by step, with names for its norms and for what lies between.

The proof and every decomposition follow this list, so that a stream which is normed or scaled on the way is taken for
what it is, and not for a plain sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tdcache.named_streams import StreamChange
from tdcache.naming.resolve_blocks import StreamTerm, TracedBlock
from tdcache.naming.resolve_places import FoundNames, norm_place
from tdcache.naming.trace import TracedValue
from tdcache.naming.trace_flow import StreamStep

__all__ = ["block_changes"]

_IN_STREAM = "this is the stream itself"


def block_changes(
    found: FoundNames,
    head: str,
    block: TracedBlock,
    labelled: Sequence[tuple[str, StreamTerm]],
    axes: tuple[str, ...],
    parallel: bool,
) -> tuple[StreamChange, ...]:
    """Name the norms and the middles of one block; gives what happens to its stream.

    Args:
        found: where names are noted.
        head: what the names of the block begin with.
        block: the block.
        labelled: its terms, with their names.
        axes: of the stream.
        parallel: whether attention and MLP read the same stream.
    """
    changes: list[StreamChange] = []
    reached = {0: 0}  # after so many steps, so many changes
    norms = _BlockNorms(found, head, axes)
    middles = _middles(found, head, block, labelled, axes, parallel)
    for at, step in enumerate(block.steps):
        for label, term in labelled:
            if term.step == at:
                norm, post = norms.of_term(term, block)
                reads = reached[block.stream.index(term.reads)]
                name = f"{head}{label}.contribution"
                changes.append(StreamChange(kind="add", name=name, norm=norm, post=post, reads=reads))
        if step.kind == "add" and step.weight is not None:
            changes.append(StreamChange(kind="add", path=_parameter(found, step)))
        elif step.kind == "norm":
            path = "" if step.norm is None else step.norm.path
            changes.append(StreamChange(kind="norm", name=norms.in_stream(step.value), path=path))
        elif step.kind == "scale":
            changes.append(StreamChange(kind="scale", factor=step.factor, path=_parameter(found, step)))
        reached[at + 1] = len(changes)
        if at in middles:
            changes[-1] = replace(changes[-1], after=middles[at])
    return (*changes[:-1], replace(changes[-1], after=head + "resid_post"))


def _parameter(found: FoundNames, step: StreamStep) -> str:
    """The path of the parameter that a step adds, or multiplies the stream by; empty where that is a number."""
    if step.weight is None:
        return ""
    named = found.flow.trace.model.named_parameters()
    return next((path for path, each in named if each is step.weight.tensor), "")


class _BlockNorms:
    """Numbers the norms of a block in the order in which the stream comes by them."""

    def __init__(self, found: FoundNames, head: str, axes: tuple[str, ...]) -> None:
        self._found, self._head, self._axes = found, head, axes
        self._names: dict[TracedValue, str] = {}
        self._number = 0

    def in_stream(self, value: TracedValue) -> str:
        """Name a norm of the stream itself."""
        return self._put(value, "", _IN_STREAM)

    def of_term(self, term: StreamTerm, block: TracedBlock) -> tuple[str, str]:
        """Name the norms before and after a sublayer; empty where there is none."""
        before, after = _norm_between(self._found, term, block), _norm_after(self._found, term)
        norm = "" if before is None else self._put(before, "")
        if after is None:
            return norm, ""
        if not norm and after not in self._names:
            self._number += 1
        return norm, self._put(after, "_post")

    def _put(self, value: TracedValue, ending: str, note: str = "") -> str:
        if value not in self._names:
            self._number += not ending
            name = self._names[value] = f"{self._head}ln{self._number}{ending}"
            self._found.put(name, norm_place(self._found, value), axes=self._axes, note=note)
        return self._names[value]


def _norm_between(found: FoundNames, term: StreamTerm, block: TracedBlock) -> TracedValue | None:
    """The norm through which a term reads the stream, or None."""
    ops, _ = found.flow.between(term.value, block.stream)
    for op in sorted(ops, key=lambda op: op.time):
        for value in op.made:
            normed = found.flow.norm_input(value)
            if normed is not None and normed[0] is term.reads:
                return value
    return None


def _norm_after(found: FoundNames, term: StreamTerm) -> TracedValue | None:
    """The norm that a contribution comes out of, or None."""
    befores = (each for each, _ in found.flow.before_scale(term.value))
    return next((each for each in befores if found.flow.norm_input(each) is not None), None)


def _middles(
    found: FoundNames,
    head: str,
    block: TracedBlock,
    labelled: Sequence[tuple[str, StreamTerm]],
    axes: tuple[str, ...],
    parallel: bool,
) -> dict[int, str]:
    """Name the stream between sublayers, where there is such a value: by the number of the step that leads to it."""
    first = next((term for label, term in labelled if label in ("attn", "mixer")), None)
    after = [] if first is None else [term for _, term in labelled if term.kind == "mlp" and term.step > first.step]
    if parallel or first is None or not after:
        reason = "attention and MLP read the same stream" if parallel else "one sublayer alone adds here"
        found.refuse(f"{head}resid_mid", f"{reason}, nothing lies between; nearest: {head}resid_pre, {head}resid_post")
        return {}
    cross = next((term for _, term in labelled if term.kind == "cross_attn"), None)
    middles = {_normed(block, first.step): f"{head}resid_mid"}
    if cross is not None:
        middles[_normed(block, cross.step)] = f"{head}resid_mid_cross"
    for at, name in middles.items():
        found.put(name, found.placer.output(block.steps[at].value, block.call), axes=axes)
    return middles


def _normed(block: TracedBlock, step: int) -> int:
    """The step after which the stream stands as the next sublayer reads it, norms of the stream included."""
    while step + 1 < len(block.steps) and block.steps[step + 1].kind == "norm":
        step += 1
    return step
