"""Resolves a filter to the hook points that it selects.

A filter that selects nothing, for instance because of a typo, would silently cache or edit nothing; here it is an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import regex

from tdcache.errors import SelectionError, listed
from tdcache.paths import near_misses
from tdcache.selection import PathPattern, as_matcher

__all__ = ["NamesFilter", "choose"]

NamesFilter: TypeAlias = "str | regex.Pattern[str] | Callable[[str], bool] | Iterable[str | regex.Pattern[str]] | None"
"""All points (None), one by name, those whose whole name matches a regex, those accepted by a predicate, or several."""


def choose(names: Sequence[str], wanted: NamesFilter, model_name: str) -> list[str]:
    """The names that ``wanted`` selects, in the order of ``names``.

    A string that equals a name selects that point only; any other string is a regex that must match the whole name.

    Raises:
        SelectionError: a name, pattern or predicate matches nothing, or the filter has another type.
    """
    if not names:
        raise SelectionError(
            f"{model_name} has no hook points; write them into the model, or put some in with insert_hook_point()",
            selector=wanted,
        )
    if wanted is None:
        return list(names)
    if isinstance(wanted, str) and wanted in names:
        return [wanted]
    if isinstance(wanted, str) or hasattr(wanted, "fullmatch"):
        return _matching(names, wanted, model_name)
    if callable(wanted):
        chosen = [name for name in names if wanted(name)]
        if not chosen:
            raise SelectionError(
                f"the predicate {wanted!r} says no to each of the {len(names)} hook points of {model_name}: "
                f"{listed(names)}",
                selector=wanted,
            )
        return chosen
    if isinstance(wanted, Iterable):
        union = {name for each in wanted for name in choose(names, each, model_name)}
        if union:
            return [name for name in names if name in union]
    raise SelectionError(
        f"names_filter is a name, a regex, a predicate (name) -> bool, or several names, got {wanted!r}",
        selector=wanted,
    )


def _matching(names: Sequence[str], wanted: Any, model_name: str) -> list[str]:
    matcher = as_matcher(wanted)
    find = matcher.finder() if isinstance(matcher, PathPattern) else None
    chosen = [name for name in names if find is not None and find(name)]
    if chosen:
        return chosen
    pattern = wanted if isinstance(wanted, str) else wanted.pattern
    near = near_misses(pattern, names)
    hint = f"did you mean {listed(near, 3)}?" if near else f"they are {listed(names)}"
    raise SelectionError(
        f"{pattern!r} is the name of none of the {len(names)} hook points of {model_name}, and as a regex on the whole "
        f"name it matches none; {hint}",
        selector=wanted,
        near=near,
    )
