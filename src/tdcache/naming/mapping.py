"""Names of one's own for a model of one's own: a small mapping becomes a table, which is checked as any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from tdcache.errors import CanonicalNameError, PathError, TdcacheError
from tdcache.named_places import NamedPlace, Names
from tdcache.named_roles import block_name
from tdcache.named_streams import ResidualStream
from tdcache.naming.resolve import names_of
from tdcache.naming.resolve_roles import ATTENTION_AXES
from tdcache.naming.trace import ForwardTrace
from tdcache.paths import resolve as module_at

__all__ = ["mapped"]

_BLOCK = "{i}"
_STREAM = ("batch", "position", "unit")


def mapped(model: nn.Module, mapping: Mapping[str, str | NamedPlace], record: ForwardTrace | None) -> Names:
    """The table of a mapping, not proved yet.

    What is known of the streams (whether a block adds before or after its norm) is found by the data flow, where that
    sees blocks; where the mapping is another model's table, it is what that says. Places are those of the mapping.

    Args:
        model: the model.
        mapping: the names.
        record: a forward of the model; None where it could not be run.

    Raises:
        CanonicalNameError: an entry for every block, ``"blocks.{i}..."``, that no path fits.
        PathError: a path that the model does not have; the message names the nearest.
    """
    places: dict[str, NamedPlace] = {}
    for name, place in Names(mapping).items():  # which refuses what is no place
        for spelled, at in _spread(model, name, place):
            places[spelled] = replace(at, name=spelled, axes=at.axes or _axes_of(spelled))
    streams = mapping.streams if isinstance(mapping, Names) else _streams(model, record, places)
    return Names(places, streams=streams, model=model)


def _axes_of(name: str) -> tuple[str, ...]:
    """The axes of a name whose place is a path alone: how many heads keys have is not known of it."""
    axes = next((axes for role, axes in ATTENTION_AXES.items() if name.endswith(f".attn.{role}")), _STREAM)
    return tuple("head" if axis == "kv_head" else axis for axis in axes)


def _spread(model: nn.Module, name: str, place: NamedPlace) -> Iterator[tuple[str, NamedPlace]]:
    """A name and its place, for each block where it speaks of all of them."""
    if _BLOCK not in name:
        _check(model, place.path)
        yield name, place
        return
    found = False
    for number in range(sum(1 for _ in model.modules())):
        path = place.path.replace(_BLOCK, str(number))
        try:
            _check(model, path)
        except PathError:
            if not found:
                raise _no_block(model, name, place.path) from None
            return
        found = True
        yield name.replace(_BLOCK, str(number)), replace(place, path=path)
        if path == place.path:  # one module runs as every block
            return


def _check(model: nn.Module, path: str) -> None:
    module = path.partition("::")[0]
    if module:
        module_at(model, module)


def _no_block(model: nn.Module, name: str, path: str) -> CanonicalNameError:
    return CanonicalNameError(
        f"{name!r} speaks of every block, and {type(model).__name__} has no module {path.replace(_BLOCK, '0')!r}; give "
        "a path that holds '{i}' where the number of the block is, such as 'layers.{i}.attn'",
        selector=name,
    )


def _streams(
    model: nn.Module, record: ForwardTrace | None, places: Mapping[str, NamedPlace]
) -> dict[str, ResidualStream]:
    try:
        found = {} if record is None else dict(names_of(record, model).streams)
    except TdcacheError:  # no blocks that the data flow sees: then what the names say
        found = {}
    blocks: dict[str, int] = {}
    for name in places:
        parsed = block_name(name)
        if parsed is not None:
            blocks[parsed.prefix] = max(blocks.get(parsed.prefix, 0), parsed.number + 1)
    return {
        prefix: _with_ends(found[prefix], places)
        if prefix in found and found[prefix].blocks == count
        else _with_ends(_unknown(prefix, count), places)
        for prefix, count in blocks.items()
    }


def _unknown(prefix: str, blocks: int) -> ResidualStream:
    none = (None,) * blocks
    return ResidualStream(prefix=prefix, layouts=("",) * blocks, out_projections=none, down_projections=none)


def _with_ends(stream: ResidualStream, places: Mapping[str, NamedPlace]) -> ResidualStream:
    """The stream with the ends that the names say, and with changes of its own only where all of them have names."""
    norm, unembed = (places.get(f"{stream.prefix}{end}") for end in ("final_norm", "unembed"))
    embeddings = tuple(name for name in (f"{stream.prefix}embed", f"{stream.prefix}pos_embed") if name in places)
    added = [each.name for block in stream.changes for each in block if each.kind == "add" and each.name]
    return replace(
        stream,
        changes=stream.changes if places.keys() >= set(added) else (),
        final_norm=stream.final_norm if norm is None else norm.path,
        unembed=stream.unembed if unembed is None else unembed.path,
        embeddings=embeddings,
    )
