"""What goes into the first block and what reads the last one: embeddings, final norm, unembedding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdcache.naming.resolve_blocks import BlockStack
from tdcache.naming.resolve_mlp import projection
from tdcache.naming.resolve_places import FoundNames, norm_place
from tdcache.naming.resolve_roles import stream_axes
from tdcache.naming.trace import ModuleRun, TracedOp, TracedValue
from tdcache.naming.trace_flow import ADD, PASS, SCALE, DataFlow, constant, main_operand, operands

__all__ = ["UnembeddingHead", "embedding_names", "final_names", "inputs_of"]

_CUTS = PASS | {"getitem", "narrow", "select", "index_select", "chunk"}


@dataclass(frozen=True, slots=True, eq=False)
class UnembeddingHead:
    """From the final norm to the logits.

    Attributes:
        call: the call of the module that makes the logits.
        scale: what its result is multiplied by.
        softcap: the ``c`` of ``c * tanh(x / c)``; None without one.
    """

    call: ModuleRun
    scale: float = 1.0
    softcap: float | None = None


def inputs_of(value: TracedValue, flow: DataFlow) -> frozenset[str]:
    """The names of the model's inputs that a value was computed from."""
    given = {each: name for name, each in flow.trace.given.items()}
    return frozenset(given[each] for each in flow.between(value, given)[1])


def embedding_names(found: FoundNames, stack: BlockStack) -> tuple[tuple[str, ...], str | None]:
    """Name what sums to the first block's input; gives the names and the path of the norm of their sum."""
    first, axes = stack.blocks[0].given, stream_axes(stack)
    parts, norm = _sum_of(first, found)
    note = "" if norm is None else f"the stream begins as N(sum of the embeddings), N being {norm.path}"
    names: list[str] = []
    for part in parts:
        kind = _kind_of(part, found.flow)
        name, number = stack.prefix + kind, 2
        while name in names:
            name, number = f"{stack.prefix}{kind}{number}", number + 1
        place = found.placer.output(part)
        before = len(found.places)
        found.put(name, place, axes=axes if len(part.shape) == len(axes) else axes[1:], note=note)
        if len(found.places) > before:
            names.append(name)
    if names and stack.prefix + "embed" not in names:
        found.refuse(stack.prefix + "embed", f"no tokens or patches are embedded; nearest: {names[0]}")
    if stack.prefix + "pos_embed" not in names:
        found.refuse(stack.prefix + "pos_embed", "no embedding of positions is added to the stream")
    return tuple(names), None if norm is None else norm.path


def _sum_of(value: TracedValue, found: FoundNames) -> tuple[list[TracedValue], ModuleRun | None]:
    """The terms that sum to a value, behind at most one norm, and that norm."""
    flow, inner = found.flow, value
    while True:
        normed = flow.norm_input(inner)
        if normed is not None:
            parts = _terms(normed[0], found)
            return (parts, normed[1]) if normed[1] is not None and len(parts) > 1 else ([value], None)
        given = main_operand(inner.op) if inner.op is not None and inner.op.name in PASS else None
        if given is None or given.shape != inner.shape or given.op is None:
            return _terms(value, found), None
        inner = given


def _terms(value: TracedValue, found: FoundNames) -> list[TracedValue]:
    """The terms of a sum; a sum stays one where a part of it, such as a bare parameter, can be read nowhere."""
    pair = operands(value.op) if value.op is not None and value.op.name in ADD else None
    if pair is None or found.flow.norm_input(value) is not None:
        return [value]
    parts = [part for part in pair if isinstance(part, TracedValue) and part.op is not None]
    width = value.shape[-1:]
    if len(parts) < 2 or any(part.shape[-1:] != width or found.placer.output(part) is None for part in parts):
        return [value]
    return [term for part in parts for term in _terms(part, found)]


def _kind_of(value: TracedValue, flow: DataFlow) -> str:
    """Which embedding a term is: of what the model is given, of positions, or of one type all over."""
    ops, _ = flow.between(value, ())
    lookups = [op for op in ops if op.name in ("embedding", "index_select")]
    read = {name for name in inputs_of(value, flow) if "mask" not in name and "position" not in name}
    if lookups and len(lookups) == 1:
        index = next((given for given in lookups[0].given if not given.data.is_floating_point()), None)
        return "embed" if index is None else _kind_of_index(index, flow)
    if read and any(op.name in ("conv1d", "conv2d", "conv3d", "linear", "embedding", "matmul") for op in ops):
        return "embed"
    return "pos_embed"


def _kind_of_index(index: TracedValue, flow: DataFlow) -> str:
    numbers = index.data
    for name, value in flow.trace.given.items():
        same = value.data.dtype == numbers.dtype and value.data.numel() == numbers.numel()
        if same and (value.data.flatten() == numbers.flatten()).all():
            return "type_embed" if "type" in name else "pos_embed" if "position" in name else "embed"
    if bool((numbers == numbers.flatten()[0]).all()) and numbers.numel() > 1:
        return "type_embed"
    rising = numbers.shape[-1] > 1 and bool((numbers.diff(dim=-1) == 1).all())
    return "pos_embed" if rising else "embed" if inputs_of(index, flow) else "type_embed"


def final_names(found: FoundNames, stack: BlockStack) -> tuple[str | None, UnembeddingHead | None]:
    """Name the norm after the last block and the unembedding; gives the norm's path and the head."""
    post, prefix, axes = stack.blocks[-1].made, stack.prefix, stream_axes(stack)
    normed = _norm_after(post, found.flow)
    call = None if normed is None else found.flow.norm_call(normed)
    if normed is None:
        layout = (
            " (post-norm: the last block ends in its own)"
            if stack.blocks[-1].steps[-1:] and stack.blocks[-1].steps[-1].kind == "norm"
            else ""
        )
        found.refuse(prefix + "final_norm", f"no norm reads the last resid_post{layout}")
    else:
        found.put(prefix + "final_norm", norm_place(found, normed), axes=axes)
    head, reason = _head(found.flow, normed or post)
    if head is None:
        found.refuse(prefix + "unembed", reason)
    else:
        found.put(prefix + "unembed", found.placer.returned(head.call, head.call.made[0][0]), axes=axes)
    return (None if call is None else call.path), head


def _norm_after(post: TracedValue, flow: DataFlow) -> TracedValue | None:
    """The norm of the stream, taken directly or of a cut of it."""
    todo, seen = [post], {post}
    while todo:
        each = todo.pop(0)
        for op in each.users:
            for made in op.made:
                normed = flow.norm_input(made)
                if normed is not None and normed[0] is each:
                    return made
                if op.name in _CUTS and main_operand(op) is each and made not in seen:
                    seen.add(made)
                    todo.append(made)
        for call, _ in each.inputs:
            for _, made in call.made:
                normed = flow.norm_input(made)
                if normed is not None and normed[0] is each:
                    return made
    return None


def _head(flow: DataFlow, stream: TracedValue) -> tuple[UnembeddingHead | None, str]:
    """The unembedding, found from the model's result back."""
    logits = next((value for steps, value in flow.trace.made.items() if steps == ("logits",)), None)
    bare = isinstance(flow.trace.result, Tensor | tuple)
    outputs = [logits] if logits is not None else list(flow.trace.made.values()) if bare else []
    for result in outputs:
        found = _back_to_linear(result)
        call = None if found is None else projection(found[0], flow.trace)
        before = None if call is None else _scale_between(stream, call.given[0][1])
        if found is None or call is None or before is None:
            continue
        plain = before == 1.0 or getattr(call.module, "bias", None) is None
        if plain:
            return UnembeddingHead(call, found[1] * before, found[2]), ""
    if not outputs:
        return None, "the model returns no logits"
    return None, "the logits are no linear map of the last norm (or resid_post): other modules lie between"


def _scale_between(stream: TracedValue, value: TracedValue) -> float | None:
    """The factor by which ``value`` is ``stream``, or a cut of it; None if something else acts in between."""
    scale = 1.0
    while value is not stream:
        op = value.op
        if op is not None and op.name in SCALE:
            factor = _factor(op)
            if factor is None:
                return None
            scale *= factor
        elif op is None or op.name not in _CUTS:
            return None
        given = _other(op)
        if given is None:
            return None
        value = given
    return scale


def _back_to_linear(value: TracedValue) -> tuple[TracedValue, float, float | None] | None:
    """The result of the linear map that a value comes from, by factors and at most one cap; its scale and the cap."""
    scale, cap, op = 1.0, None, value.op
    while op is not None:
        if op.name == "tanh":
            cap, scale = scale, 1.0
        elif op.name in SCALE:
            factor = _factor(op)
            if factor is None:
                return None
            scale *= factor
        elif op.name in ADD:
            if not any(isinstance(each, TracedValue) and each.op is None for each in op.args):
                break
        elif op.name not in PASS:
            break
        given = _other(op)
        if given is None:
            return None
        value, op = given, given.op
    return value, scale if cap is None else scale * cap, cap


def _factor(op: TracedOp) -> float | None:
    factors = [factor for each in operands(op) or () if (factor := constant(each)) is not None]
    if not factors:
        return None
    return 1 / factors[0] if op.name.startswith("div") else factors[0]


def _other(op: TracedOp) -> TracedValue | None:
    parts = [each for each in op.args if isinstance(each, TracedValue) and each.op is not None]
    return next((each for each in parts if each.data.numel() > 1), main_operand(op))
