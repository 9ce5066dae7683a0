"""Which canonical names a selector means: as for modules, but over the names of a table."""

from __future__ import annotations

from torch import nn

from tdcache.errors import CanonicalNameError, listed
from tdcache.named_places import Names
from tdcache.paths import near_misses
from tdcache.selection import Matcher, PathPattern, Selection, Site, as_matcher, patterns_of, walk
from tdcache.types import Match, Selector

__all__ = ["select_names"]

_NO_MODULE = nn.Module()


def select_names(
    names: Names, root: nn.Module, matcher: Matcher, selector: Selector, *, match: Match, allow_empty: bool
) -> Selection:
    """The names that a selector means, as sites: their path is the name, their module the one at the place.

    Args:
        names: the table.
        root: what its paths are relative to.
        matcher: what was made of ``selector``; a predicate gets the name and the module at the place.
        selector: for messages.
        match: how patterns are held against names, for messages.
        allow_empty: a selector that means no name is no error.

    Raises:
        CanonicalNameError: a pattern means no name, or only refused ones, whose reasons are in the message.
    """
    modules = {"": root, **dict(walk(root))}
    find = matcher.finder() if isinstance(matcher, PathPattern) and not matcher.pattern.groupindex else None
    sites = []
    for name, place in names.items():
        if find is not None and find(name) is None:
            continue
        module = modules[place.path.partition("::")[0]]
        groups = {} if find is not None else matcher(name, module)
        if groups is not None:
            sites.append(Site(name, module, groups))
    if not allow_empty:
        _refuse_unmatched(names, sites, selector, match)
    return Selection(sites, selector=selector, model_name=type(root).__name__)


def _refuse_unmatched(names: Names, sites: list[Site], selector: Selector, match: Match) -> None:
    found = [site.path for site in sites]
    for pattern in patterns_of(selector):
        matcher = as_matcher(pattern, match)
        refused = [name for name in names.refused if matcher(name, _NO_MODULE) is not None]
        if refused and not any(matcher(name, _NO_MODULE) is not None for name in found):
            raise names.error(refused[0])
    if not found:
        patterns = patterns_of(selector)
        near = tuple(dict.fromkeys(name for pattern in patterns for name in near_misses(pattern, list(names))))
        what = f"pattern {patterns[0]!r}" if len(patterns) == 1 else f"selector {selector!r}"
        hint = f"; did you mean {listed(near, 3)}?" if near else "; print(table) shows the names that there are"
        if any("hook_" in pattern for pattern in patterns) and names.style is None:
            hint += ", and tdcache.names(model, style='transformer_lens') has those with 'hook_'"
        raise CanonicalNameError(
            f"{what} matches none of the {len(names)} names of {names.model_name or 'this model'}{hint}",
            selector=selector,
            near=near,
        )
