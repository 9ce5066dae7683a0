"""Queries and keys as their projections give them, where something happens to them before they are multiplied.

The canonical ``attn.q`` is what goes into the product with the keys: after rotary embeddings, a norm, a factor.
TransformerLens' ``hook_q`` is what comes out of the projection, and ``hook_rot_q`` what goes into the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tdcache.function_calls.sites import CallSite, is_call
from tdcache.named_places import NamedPlace, Names
from tdcache.naming.resolve_places import Placer
from tdcache.naming.trace import ForwardTrace, TracedValue
from tdcache.naming.trace_attention import attentions
from tdcache.naming.trace_flow import LINEAR, PASS, main_operand, sources

__all__ = ["before_rotation"]

_PARTED = PASS | {"getitem", "split", "chunk", "unbind", "tensor_split", "expand", "repeat_interleave", "repeat"}
"""Calls after which a query is still what the projection gave."""
_MOST = 200


def before_rotation(names: Names, record: ForwardTrace) -> Names:
    """The table, in which ``attn.q`` and ``attn.k`` mean what the projections give; see the file.

    Where something happens to them before the product, what goes into it is ``attn.rot_q`` and ``attn.rot_k``; and
    where no module returns the projection alone, as where one makes queries, keys and values together, the name is
    refused.

    Args:
        names: the table.
        record: a forward of its model.
    """
    places, refused, spelling = dict(names), dict(names.refused), dict(names.spelling)
    for name, projected in _projections(names, record):
        head, _, role = name.rpartition(".")
        turned = f"{head}.rot_{role}"
        places[turned] = replace(places.pop(name), name=turned)
        spelling[name] = turned
        if projected is None:
            refused[name] = f"no module returns it before it is rotated, normed or scaled; nearest: {turned}"
        else:
            places[name] = projected
    return names.replaced(places=places, refused=refused, spelling=spelling)


def _projections(names: Names, record: ForwardTrace) -> Iterator[tuple[str, NamedPlace | None]]:
    """For each query and key that is changed before the product: the place of its projection, or None."""
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
