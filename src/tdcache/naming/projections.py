"""Queries and keys as their projections give them, where something happens to them before they are multiplied.

The canonical ``attn.q`` is what goes into the product with the keys: after rotary embeddings, a norm, a factor.
TransformerLens' ``hook_q`` is what comes out of the projection, and ``hook_rot_q`` what goes into the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from tdcache.function_calls.sites import CallSite, is_call
from tdcache.named_places import NamedPlace, Names
from tdcache.naming.copies import in_best_dtype
from tdcache.naming.inputs import own_inputs
from tdcache.naming.resolve_places import Placer
from tdcache.naming.trace import TracedValue, trace
from tdcache.naming.trace_attention import attentions
from tdcache.naming.trace_flow import LINEAR, PASS, main_operand, sources

__all__ = ["before_rotation"]

_PARTED = PASS | {"getitem", "split", "chunk", "unbind", "tensor_split", "expand", "repeat_interleave", "repeat"}
"""Calls after which a query is still what the projection gave."""
_MOST = 200


def before_rotation(model: nn.Module, names: Names, inputs: Any = None) -> Names:
    """The table, in which ``attn.q`` and ``attn.k`` mean what the projections give; see the file.

    Where something happens to them before the product, what goes into it is ``attn.rot_q`` and ``attn.rot_k``; and
    where no module returns the projection alone, as where one makes queries, keys and values together, the name is
    refused.
    """
    found = dict(_projections(model, names, inputs))
    if not found:
        return names
    places, refused, spelling = dict(names), dict(names.refused), dict(names.spelling)
    for name, projected in found.items():
        head, _, role = name.rpartition(".")
        turned = f"{head}.rot_{role}"
        places[turned] = replace(places.pop(name), name=turned)
        spelling[name] = turned
        if projected is None:
            refused[name] = f"no module returns it before it is rotated, normed or scaled; nearest: {turned}"
        else:
            places[name] = projected
    return names.replaced(places=places, refused=refused, spelling=spelling)


def _projections(model: nn.Module, names: Names, inputs: Any) -> Iterator[tuple[str, NamedPlace | None]]:
    """For each query and key that is changed before the product: the place of its projection, or None."""
    record = in_best_dtype(
        model,
        0.0,
        lambda copy: trace(copy.model, copy.fitted(own_inputs(copy.model, seed=0) if inputs is None else inputs)),
    )
    placer = Placer(record)
    calls = {(each.path, each.ordinal, each.call): each for each in attentions(record)}
    for name, place in names.items():
        role = name.rpartition(".")[2]
        if role not in ("q", "k") or not is_call(place.path):
            continue
        site = CallSite.parse(place.path)
        call = calls.get((site.path, site.ordinal, place.call or 0))
        value = None if call is None else call.query if role == "q" else call.key
        if call is not None and call.query is not None and value is not None and not _is_projection(value):
            yield name, _projection(value, call.query, place, placer)


def _is_projection(value: TracedValue) -> bool:
    """Whether nothing but changes of shape lies between a value and the projection it comes from."""
    for _ in range(_MOST):
        op = value.op
        if op is None or op.name in LINEAR:
            return True
        given = main_operand(op)
        if op.name not in _PARTED or given is None:
            return False
        value = given
    return False


def _projection(value: TracedValue, query: TracedValue, place: NamedPlace, placer: Placer) -> NamedPlace | None:
    """The nearest module before a query or key whose output has its heads side by side."""
    _, most, _, width = (1, *query.data.shape)[-4:]  # keys may stand transposed in the product
    todo, seen = [value], {value}
    for _ in range(_MOST):
        if not todo:
            return None
        each = todo.pop(0)
        if each.op is not None and each.op.name in LINEAR:
            heads, rest = divmod(each.data.shape[-1], width)
            where = placer.module_output(each) if heads and not rest and most % heads == 0 else None
            if where is not None and each.data.dim() == 3:
                axes = ("batch", "position", place.axes[1], "unit")
                return replace(where, heads=(heads, 2), axes=axes, note="before it is rotated, normed or scaled")
            continue
        new = [given for given in sources(each) if given not in seen]
        seen.update(new)
        todo += new
    return None
