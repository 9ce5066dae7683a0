"""The region of an edit, under the name that interventions import it by; it is shared with the verbs of runs."""

from __future__ import annotations

from dataclasses import replace

from tdcache.function_calls.sites import has_heads_first
from tdcache.regions import Along, Heads, Region, as_index

__all__ = ["Along", "Heads", "Region", "as_index", "at_call"]


def at_call(region: Region, path: str) -> Region:
    """The same part of a value at a call: in one of an attention call, heads and positions are axes of their own.

    Queries, keys, values, scores and patterns are ``(batch, heads, positions, ...)``; so is what their softmax returns.
    """
    if not has_heads_first(path):
        return region
    unit_dim = -3 if region.heads is not None and region.unit_dim == -1 else region.unit_dim
    return replace(region, unit_dim=unit_dim, position_dim=-2 if region.position_dim == 1 else region.position_dim)
