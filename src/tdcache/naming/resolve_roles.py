"""From the terms of a block to canonical names: each with its place, or with the reason why it is refused."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tdcache.function_calls.names import DERIVED
from tdcache.function_calls.sites import CallSite
from tdcache.named_places import NamedPlace
from tdcache.naming.resolve_blocks import BlockStack, StreamTerm, TracedBlock
from tdcache.naming.resolve_mlp import activation, base_of, projection, router
from tdcache.naming.resolve_places import Placer
from tdcache.naming.trace import TracedValue
from tdcache.naming.trace_attention import AttentionCall
from tdcache.naming.trace_flow import PASS, DataFlow, main_operand

__all__ = ["ATTENTION_AXES", "FoundNames", "block_names", "norm_place", "stream_axes"]

ATTENTION_AXES = {
    "q": ("batch", "head", "query", "unit"),
    "k": ("batch", "kv_head", "key", "unit"),
    "v": ("batch", "kv_head", "key", "unit"),
    "scores": ("batch", "head", "query", "key"),
    "pattern": ("batch", "head", "query", "key"),
    "z": ("batch", "head", "query", "unit"),
}
"""The axes of the values of an attention call, by what follows ``attn.`` in their names."""


@dataclass(slots=True)
class FoundNames:
    """What was found so far: places by name, reasons by name, and what the streams are made of."""

    flow: DataFlow
    placer: Placer
    places: dict[str, NamedPlace] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, place: NamedPlace | None, *, axes: tuple[str, ...] = (), note: str = "") -> None:
        """Note a place, or that the value cannot be read anywhere."""
        if place is None:
            self.refuse(name, "no module returns this value and no call that can be named makes it")
        else:
            self.places[name] = replace(place, name=name, axes=axes, note=note or place.note)

    def refuse(self, name: str, reason: str) -> None:
        """Note why a name is not given."""
        self.refused[name] = reason


def stream_axes(stack: BlockStack) -> tuple[str, ...]:
    """The axes of a stack's stream: positions are where attention mixes, units the last."""
    shape = stack.blocks[0].given.shape
    mixed = {axis for block in stack.blocks for term in block.terms for axis in term.axes}
    names = ["position" if axis in mixed else "batch" for axis in range(len(shape) - 1)]
    if names.count("batch") > 1 and names[0] == "batch":  # a further axis that nothing mixed: windows, or one position
        names[1:] = ["position"] * len(names[1:])
    return (*names, "unit")


def block_names(found: FoundNames, stack: BlockStack, at: int) -> tuple[str, str | None, str | None]:
    """Name everything in one block; gives its layout and the paths of its two output projections."""
    block, head, axes = stack.blocks[at], f"{stack.prefix}blocks.{at}.", stream_axes(stack)
    found.put(head + "resid_pre", found.placer.given(block.call, block.given), axes=axes)
    found.put(head + "resid_post", _returned(found, block), axes=axes)
    if block.fault:
        return _refused(found, head, block)
    layout = _layout(found, block)
    if layout == "unknown":
        block.fault = f"the stream itself is changed between its sums ({', '.join(s.kind for s in block.steps)})"
        return _refused(found, head, block)
    out: dict[str, str | None] = {}
    for label, term in _labelled(block.terms):
        out[label] = _sublayer(found, head, label, block, term, layout, axes)
    _norms(found, head, block, axes)
    _middles(found, head, block, layout, axes)
    for kind in ("attn", "mlp"):
        if kind not in out:
            found.refuse(f"{head}{kind}.contribution", _missing(kind, out, head))
    return layout, out.get("attn"), out.get("mlp")


def _refused(found: FoundNames, head: str, block: TracedBlock) -> tuple[str, None, None]:
    """Refuse what a block that is not understood would have."""
    for name in ("attn.contribution", "mlp.contribution", "resid_mid"):
        found.refuse(head + name, f"{block.fault}; nearest: {head}resid_post")
    return "unknown", None, None


def _missing(kind: str, labels: dict[str, str | None], head: str) -> str:
    what = "mixes positions by an attention call" if kind == "attn" else "leaves positions apart"
    near = f"; nearest: {head}{next(iter(labels))}.contribution" if labels else ""
    return f"nothing that {what} is added to the stream of this block{near}"


def _returned(found: FoundNames, block: TracedBlock) -> NamedPlace | None:
    steps = next((steps for steps, value in block.call.made if value is block.made), None)
    return None if steps is None else found.placer.returned(block.call, steps)


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
    kinds_of_steps = [step.kind for step in block.steps]
    if "norm" in kinds_of_steps:
        return "post-norm" if kinds_of_steps == ["add", "norm"] * (len(kinds_of_steps) // 2) else "unknown"
    if "scale" in kinds_of_steps:
        return "unknown"
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


def _norms(found: FoundNames, head: str, block: TracedBlock, axes: tuple[str, ...]) -> None:
    """Name the norms by the order in which sublayers use them."""
    number = 0
    named: set[TracedValue] = set()
    for _, term in _labelled(block.terms):
        before = _norm_between(found, term, block)
        after = _norm_after(found, term, block)
        if before is not None and before not in named:
            number += 1
            named.add(before)
            found.put(f"{head}ln{number}", norm_place(found, before), axes=axes)
        elif before is None and after is not None:
            number += 1
        if after is not None and after not in named:
            named.add(after)
            post_norm = after in block.stream
            name = f"{head}ln{number}" if post_norm and before is None else f"{head}ln{number}_post"
            note = "post-norm: this is the stream itself" if post_norm else ""
            found.put(name, norm_place(found, after), axes=axes, note=note)


def norm_place(found: FoundNames, value: TracedValue) -> NamedPlace | None:
    """The output of the norm's own module, also where that of a module around it is the same tensor."""
    call = found.flow.norm_call(value)
    return found.placer.output(value) if call is None else found.placer.returned(call, call.made[0][0])


def _norm_between(found: FoundNames, term: StreamTerm, block: TracedBlock) -> TracedValue | None:
    """The norm through which a term reads the stream, or None."""
    ops, _ = found.flow.between(term.value, block.stream)
    for op in sorted(ops, key=lambda op: op.time):
        for value in op.made:
            normed = found.flow.norm_input(value)
            if normed is not None and normed[0] is term.reads:
                return value
    return None


def _norm_after(found: FoundNames, term: StreamTerm, block: TracedBlock) -> TracedValue | None:
    """The norm of a contribution, or of the stream after it in a post-norm block."""
    if term.step + 1 < len(block.steps) and block.steps[term.step + 1].kind == "norm":
        return block.steps[term.step + 1].value
    for each, _ in found.flow.before_scale(term.value):
        if found.flow.norm_input(each) is not None:
            return each
    return None


def _middles(found: FoundNames, head: str, block: TracedBlock, layout: str, axes: tuple[str, ...]) -> None:
    """Name the stream between sublayers, where there is such a value."""
    labelled = _labelled(block.terms)
    last = next((term for label, term in labelled if label == "mlp"), None)
    first = next((term for label, term in labelled if label in ("attn", "mixer")), None)
    if layout == "parallel" or first is None or last is None or first.step >= last.step:
        reason = "attention and MLP read the same stream" if layout == "parallel" else "one sublayer alone adds here"
        found.refuse(f"{head}resid_mid", f"{reason}, nothing lies between; nearest: {head}resid_pre, {head}resid_post")
        return
    cross = next((term for _, term in labelled if term.kind == "cross_attn"), None)
    found.put(f"{head}resid_mid", _stream_place(found, block, first.step), axes=axes)
    if cross is not None:
        found.put(f"{head}resid_mid_cross", _stream_place(found, block, cross.step), axes=axes)


def _stream_place(found: FoundNames, block: TracedBlock, step: int) -> NamedPlace | None:
    """Where the stream stands after the step that adds a term, norms and factors after it included."""
    while step + 1 < len(block.steps) and block.steps[step + 1].kind != "add":
        step += 1
    return found.placer.output(block.steps[step].value, block.call)
