"""The selected places, each module once."""

from __future__ import annotations

from tdcache.selection import Selection, Site

__all__ = ["distinct_sites"]


def distinct_sites(selection: Selection) -> list[Site]:
    """The sites of a selection without further names of the same module: an edit must not run twice."""
    first: dict[int, Site] = {}
    for site in selection:
        first.setdefault(id(site.module), site)
    return list(first.values())
