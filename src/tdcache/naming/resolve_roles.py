"""From the terms of a block to canonical names: each with its place, or with the reason why it is refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdcache.function_calls.names import DERIVED
from tdcache.function_calls.sites import CallSite
from tdcache.named_places import NamedPlace
from tdcache.named_streams import StreamChange
from tdcache.naming.resolve_blocks import BlockStack, StreamTerm, TracedBlock
from tdcache.naming.resolve_changes import block_changes
from tdcache.naming.resolve_mlp import activation, base_of, projection, router
from tdcache.naming.resolve_places import FoundNames
from tdcache.naming.trace import TracedValue
from tdcache.naming.trace_attention import AttentionCall
from tdcache.naming.trace_flow import PASS, main_operand

__all__ = ["ATTENTION_AXES", "NamedBlock", "block_names", "stream_axes"]

ATTENTION_AXES = {
    "q": ("batch", "head", "query", "unit"),
    "k": ("batch", "kv_head", "key", "unit"),
    "v": ("batch", "kv_head", "key", "unit"),
    "scores": ("batch", "head", "query", "key"),
    "pattern": ("batch", "head", "query", "key"),
    "z": ("batch", "head", "query", "unit"),
}
"""The axes of the values of an attention call, by what follows ``attn.`` in their names."""


def stream_axes(stack: BlockStack) -> tuple[str, ...]:
    """The axes of a stack's stream: positions are where attention mixes, units the last."""
    shape = stack.blocks[0].given.shape
    mixed = {axis for block in stack.blocks for term in block.terms for axis in term.axes}
    names = ["position" if axis in mixed else "batch" for axis in range(len(shape) - 1)]
    if names.count("batch") > 1 and names[0] == "batch":  # a further axis that nothing mixed: windows, or one position
        names[1:] = ["position"] * len(names[1:])
    return (*names, "unit")


@dataclass(frozen=True, slots=True)
class NamedBlock:
    """What is known of a block beside its names.

    Attributes:
        layout: as in :class:`tdcache.named_streams.ResidualStream`.
        changes: what happens to its stream.
        out_projection: the path of what maps ``z`` back to the stream.
        down_projection: the path of what maps ``mlp.post`` back to the stream.
    """

    layout: str
    changes: tuple[StreamChange, ...] = ()
    out_projection: str | None = None
    down_projection: str | None = None


def block_names(found: FoundNames, stack: BlockStack, at: int) -> NamedBlock:
    """Name everything in one block."""
    block, head, axes = stack.blocks[at], f"{stack.prefix}blocks.{at}.", stream_axes(stack)
    found.put(head + "resid_pre", _given(found, block), axes=axes)
    found.put(head + "resid_post", _returned(found, block), axes=axes)
    if block.fault:
        for name in ("attn.contribution", "mlp.contribution", "resid_mid"):
            found.refuse(head + name, f"{block.fault}; nearest: {head}resid_post")
        return NamedBlock("unknown")
    layout, labelled = _layout(found, block), _labelled(block.terms)
    out = {label: _sublayer(found, head, label, block, term, layout, axes) for label, term in labelled}
    changes = block_changes(found, head, block, labelled, axes, layout == "parallel")
    for kind in ("attn", "mlp"):
        if kind not in out:
            found.refuse(f"{head}{kind}.contribution", _missing(kind, out, head))
    return NamedBlock(layout, changes, out.get("attn"), out.get("mlp"))


def _missing(kind: str, labels: dict[str, str | None], head: str) -> str:
    what = "mixes positions by an attention call" if kind == "attn" else "leaves positions apart"
    near = f"; nearest: {head}{next(iter(labels))}.contribution" if labels else ""
    return f"nothing that {what} is added to the stream of this block{near}"


def _given(found: FoundNames, block: TracedBlock) -> NamedPlace | None:
    """Where the stream goes into a block; of one that is no module, where it was made."""
    return found.placer.given(block.call, block.given) or found.placer.output(block.given)


def _returned(found: FoundNames, block: TracedBlock) -> NamedPlace | None:
    steps = next((steps for steps, value in block.call.made if value is block.made), None)
    return found.placer.output(block.made) if steps is None else found.placer.returned(block.call, steps)


def _labelled(terms: list[StreamTerm]) -> list[tuple[str, StreamTerm]]:
    """Terms with their names; of two of a kind the second is ``mlp2``."""
    counts: dict[str, int] = {}
    labelled = []
    for term in sorted(terms, key=lambda term: (term.step, "acmx".find(term.kind[0]), term.kind)):
        counts[term.kind] = counts.get(term.kind, 0) + 1
        number = counts[term.kind]
        labelled.append((term.kind if number == 1 else f"{term.kind}{number}", term))
    return labelled


def _layout(found: FoundNames, block: TracedBlock) -> str:
    steps = [step.kind for step in block.steps]
    if {"norm", "scale"} & set(steps):
        return "post-norm" if steps == ["add", "norm"] * (len(steps) // 2) else "mixed"
    kinds = {term.kind: term for term in block.terms}
    first, last = kinds.get("attn") or kinds.get("mixer"), kinds.get("mlp")
    if first is not None and last is not None and block.stream.index(last.reads) <= first.step:
        return "parallel"
    normed = [any(found.flow.norm_input(each) for each, _ in found.flow.before_scale(t.value)) for t in block.terms]
    return "sandwich" if any(normed) else "pre-norm"


def _sublayer(
    found: FoundNames, head: str, label: str, block: TracedBlock, term: StreamTerm, layout: str, axes: tuple[str, ...]
) -> str | None:
    """Name what belongs to one term; gives the path of its output projection."""
    name, placer, flow = f"{head}{label}", found.placer, found.flow
    note = ""
    if layout == "post-norm":
        note = "post-norm: the stream goes on as N(stream + contribution)"
    elif flow.norm_input(term.value) is not None:
        note = "what the norm after the sublayer returns"
    found.put(name + ".contribution", placer.output(term.value, block.call), axes=axes, note=note)
    out, base = base_of(term.value, flow)
    found.put(name + ".out", placer.output(out, block.call), axes=axes)
    if term.kind in ("attn", "cross_attn"):
        return _attention(found, name, term, base, out)
    if term.kind == "mixer":
        found.refuse(head + "attn.pattern", f"{name} mixes positions without an attention call; nearest: {name}.out")
        return None
    path = _mlp(found, name, term, base, block)
    return path if _in_order(base, out) else None


def _attention(found: FoundNames, name: str, term: StreamTerm, base: TracedValue, out: TracedValue) -> str | None:
    one = term.attention[-1] if len(term.attention) == 1 else None
    reason = f"{len(term.attention)} attention calls lead to {name}.contribution, and it is no single one's"
    if one is not None and not one.visible:
        one, reason = None, f"torch's fused attention shows no value inside; nearest: {name}.out"
    for place in DERIVED:
        if one is None:
            found.refuse(f"{name}.{place}", reason)
        else:
            found.put(f"{name}.{place}", _at_attention(found, one, place), axes=ATTENTION_AXES[place])
    call = projection(base, found.flow.trace)
    plain = call is not None and one is not None and _is_z(call.given[0][1], one) and _in_order(base, out)
    return call.path if plain and call is not None else None


def _in_order(one: TracedValue, other: TracedValue) -> bool:
    """Whether two values hold the same numbers in the same order: windows, for instance, are put back in another."""
    return torch.equal(one.data.flatten(), other.data.flatten())


def _is_z(value: TracedValue, attention: AttentionCall) -> bool:
    """Whether a value is ``z`` with its heads side by side: nothing, such as a gate, acts on it in between."""
    z = attention.z.data
    if z.dim() == 3 and value.data.dim() == 3 and z.shape[0] % value.shape[0] == 0:
        z = z.unflatten(0, (value.shape[0], -1))
    if z.dim() != 4 or not torch.equal(z.transpose(1, 2).flatten(), value.data.flatten()):
        return False
    while value is not attention.z:
        given = main_operand(value.op) if value.op is not None and value.op.name in PASS else None
        if given is None:
            return False
        value = given
    return True


def _at_attention(found: FoundNames, attention: AttentionCall, place: str) -> NamedPlace:
    several = found.placer.runs.get(attention.path, 1) > 1
    path = str(CallSite(attention.path, place, attention.ordinal))
    return NamedPlace(path=path, call=attention.call if several else None)


def _mlp(found: FoundNames, name: str, term: StreamTerm, base: TracedValue, block: TracedBlock) -> str | None:
    ops, _ = found.flow.between(term.value, block.stream)
    logits = router(ops, found.flow)
    if logits is not None:
        place = found.placer.output(logits, block.call)
        found.put(name + ".router", place, axes=("position", "expert"))
        for part in ("pre", "post"):
            found.refuse(f"{name}.{part}", f"its experts have one each; nearest: {name}.router and {name}.out")
        return None
    hidden = activation(base, found.flow, block.stream)
    units = ("batch", "position", "unit")
    if hidden is None or hidden.pre is None:
        why = "no single linear module makes its output" if hidden is None else "two linear maps lead to it alike"
        found.refuse(f"{name}.pre", f"{why}; nearest: {name}.out")
    else:
        found.put(f"{name}.pre", found.placer.output(hidden.pre, block.call), axes=units)
    if hidden is None:
        found.refuse(f"{name}.post", f"no single linear module makes its output; nearest: {name}.out")
        return None
    found.put(f"{name}.post", found.placer.given(hidden.down, hidden.post), axes=units)
    return hidden.down.path
