"""Canonical names from the data flow of one forward, not yet proved."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from tdcache.errors import CanonicalNameError
from tdcache.named_places import Names
from tdcache.named_streams import ResidualStream
from tdcache.naming.copies import WorkingCopy, in_best_dtype
from tdcache.naming.inputs import own_inputs
from tdcache.naming.prove_values import read_places
from tdcache.naming.resolve_axes import fit_axes
from tdcache.naming.resolve_blocks import BlockStack
from tdcache.naming.resolve_ends import embedding_names, final_names, inputs_of
from tdcache.naming.resolve_places import FoundNames, Placer
from tdcache.naming.resolve_roles import block_names
from tdcache.naming.resolve_stacks import find_stacks
from tdcache.naming.trace import ForwardTrace, trace
from tdcache.naming.trace_flow import DataFlow

__all__ = ["names_of", "resolve", "traced", "with_axes"]


def resolve(model: nn.Module, inputs: Any = None) -> Names:
    """The canonical names of ``model``, each with its place, found by the data flow of one forward.

    Nothing is proved here (:func:`tdcache.naming.prove.prove` does), and no name of a module is looked at.

    Args:
        model: any module with a list of blocks. It is copied for the forward; nothing in it is changed.
        inputs: what to call it with: a tensor, a tuple of arguments, or a mapping of keyword arguments. By default
            made from its configuration or its embedding.

    Raises:
        CanonicalNameError: the model has no blocks, or an input for it cannot be made.
    """
    return in_best_dtype(model, lambda copy: with_axes(copy, names_of(traced(copy, inputs), model), inputs))


def traced(copy: WorkingCopy, inputs: Any) -> ForwardTrace:
    """One forward of a copy on these inputs, or on some of its own."""
    return trace(copy.model, _given(copy, inputs))


def with_axes(copy: WorkingCopy, names: Names, inputs: Any) -> Names:
    """The table with axes as they are seen in another forward; names whose place shows nothing are refused."""
    return fit_axes(names, read_places(copy.model, names, _given(copy, inputs)))


def _given(copy: WorkingCopy, inputs: Any) -> Any:
    return copy.fitted(own_inputs(copy.model, seed=0) if inputs is None else inputs)


def names_of(record: ForwardTrace, model: nn.Module) -> Names:
    """The names that one recorded forward gives."""
    flow = DataFlow(record)
    stacks = find_stacks(record, flow)
    if not stacks:
        raise CanonicalNameError(
            f"{type(model).__name__} has no blocks: no list of modules whose members run one after the other, each "
            "adding to what it is given; give the names yourself, as mapping={name: path}"
        )
    _give_prefixes(stacks, flow)
    found = FoundNames(flow, Placer(record))
    streams = {stack.prefix: _stream(found, stack) for stack in stacks}
    return Names(found.places, refused=found.refused, streams=streams, model=model)


def _stream(found: FoundNames, stack: BlockStack) -> ResidualStream:
    embeddings, embedding_norm = embedding_names(found, stack)
    rows = [block_names(found, stack, at) for at in range(len(stack.blocks))]
    norm, head = final_names(found, stack)
    return ResidualStream(
        prefix=stack.prefix,
        layouts=tuple(row.layout for row in rows),
        changes=tuple(row.changes for row in rows),
        embeddings=embeddings,
        embedding_norm=embedding_norm,
        final_norm=norm,
        unembed=None if head is None else head.call.path,
        out_projections=tuple(row.out_projection for row in rows),
        down_projections=tuple(row.down_projection for row in rows),
        logit_scale=1.0 if head is None else head.scale,
        logit_softcap=None if head is None else head.softcap,
    )


_TOWERS = {
    "pixel_values": "vision.",
    "pixel_values_videos": "vision.",
    "input_features": "audio.",
    "input_values": "audio.",
}


def _give_prefixes(stacks: list[BlockStack], flow: DataFlow) -> None:
    """Prefixes by what runs: a decoder reads an encoder by cross attention, a tower reads pixels or sound alone."""
    if len(stacks) == 1:
        return
    crossing = [stack for stack in stacks if _crosses(stack) and any(_feeds(other, stack, flow) for other in stacks)]
    for stack in stacks:
        read = inputs_of(stack.blocks[0].given, flow)
        towers = {prefix for name, prefix in _TOWERS.items() if name in read}
        if stack in crossing:
            stack.prefix = "decoder."
        elif crossing and any(_feeds(stack, other, flow) for other in crossing):
            stack.prefix = "encoder."
        elif towers and not read & {"input_ids", "inputs_embeds"}:
            stack.prefix = min(towers)
    for prefix, count in Counter(stack.prefix for stack in stacks).items():
        if count > 1:
            _tell_apart([stack for stack in stacks if stack.prefix == prefix], flow)


def _tell_apart(stacks: list[BlockStack], flow: DataFlow) -> None:
    """Prefixes for stacks of one kind: stages, where each reads the one before, else their own paths."""
    ends = [stack.blocks[-1].made for stack in stacks[:-1]]
    in_turn = all(flow.depends(after.blocks[0].given, {end}) for end, after in zip(ends, stacks[1:], strict=True))
    for number, stack in enumerate(stacks):
        own = ".".join("stages" if step == "blocks" else step for step in stack.path.split("."))
        stack.prefix = f"{stack.prefix}stages.{number}." if in_turn else f"{own}."


def _crosses(stack: BlockStack) -> bool:
    return any(term.kind == "cross_attn" for block in stack.blocks for term in block.terms)


def _feeds(stack: BlockStack, other: BlockStack, flow: DataFlow) -> bool:
    """Whether the end of a stack is read inside the blocks of another, not at its beginning."""
    end = stack.blocks[-1].made
    first = other.blocks[0]
    return stack is not other and not flow.depends(first.given, {end}) and flow.depends(first.made, {end})
