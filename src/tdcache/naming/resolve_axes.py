"""The axes of a place, corrected by the shapes that were seen there."""

from __future__ import annotations

from dataclasses import replace

from tdcache.named_places import NamedPlace, Names
from tdcache.named_roles import block_name
from tdcache.naming.prove_values import Readings

__all__ = ["fit_axes"]

_TOGETHER = "the model holds rows and heads in one axis"


def fit_axes(names: Names, readings: Readings) -> Names:
    """The table with axes that fit what was seen; names whose place showed nothing are refused."""
    places = {name: _fitted(name, place, readings) for name, place in names.items() if name in readings}
    refused = {**names.refused, **readings.missing}
    return names.replaced(places=places, refused=refused)


def _fitted(name: str, place: NamedPlace, readings: Readings) -> NamedPlace:
    shape, axes = readings[name].shape, place.axes
    if "head" in axes or "kv_head" in axes:
        return _fitted_heads(name, place, readings)
    if len(shape) == len(axes):
        return place
    stream = _stream_of(name, readings)
    if len(shape) == 2 and stream is not None and axes[:2] == ("batch", "position"):
        if shape[0] == stream[0] * stream[1]:
            return replace(place, axes=("position", *axes[2:]), note=place.note or "batch and position are one axis")
        if shape[0] == stream[0]:
            return replace(place, axes=("batch", *axes[2:]), note=place.note or "of one position")
    return replace(place, axes=("position",) * (len(shape) - 1) + axes[-1:])


def _stream_of(name: str, readings: Readings) -> tuple[int, ...] | None:
    """The shape of the stream that a name belongs to."""
    parsed, head = block_name(name), name.rpartition(".")[0]
    first = (f"{head}." if head else "") if parsed is None else parsed.prefix
    first += "blocks.0.resid_pre"
    return tuple(readings[first].shape) if first in readings else None


def _fitted_heads(name: str, place: NamedPlace, readings: Readings) -> NamedPlace:
    shape, axes = readings[name].shape, place.axes
    stream, query = _stream_of(name, readings), f"{name.rpartition('.')[0]}.q"
    at = len(shape) - 3  # the axis with the heads, or with rows and heads
    if "kv_head" in axes and query in readings and readings[query].shape[at : at + 1] == shape[at : at + 1]:
        axes = ("batch", "head", *axes[2:])
    if len(shape) == 3 and stream is not None and shape[0] % stream[0] == 0:
        return replace(place, axes=axes, heads=(shape[0] // stream[0], 0), note=_TOGETHER)
    return replace(place, axes=axes)
