"""Resolves a selector to modules: pure, printable, and testable without a forward.

Everything that acts on modules goes through here, so that a pattern means the same everywhere, and one that matches
nothing is an error with near misses rather than an empty result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from time import monotonic
from typing import Any, NamedTuple, Protocol, TypeGuard, overload

import regex
from torch import Tensor, nn

from tdcache.errors import SelectionError, listed
from tdcache.paths import near_misses, walk, wrapped
from tdcache.tables import html_table, shorten, text_table
from tdcache.types import Match, Selector

__all__ = [
    "AnyOf",
    "Groups",
    "IsInstance",
    "Matcher",
    "PathPattern",
    "Selection",
    "Site",
    "Where",
    "as_matcher",
    "depends_on_names_only",
    "distinct_sites",
    "patterns_of",
    "select",
    "select_matching",
    "walk",
]

_NO_GROUPS: Mapping[str, str] = {}
_MATCH_SECONDS = 1.0
# A quantified group, a back reference, many quantifiers or many alternations can backtrack without end. What is simpler
# is at worst polynomial in the length of a path, and regex's own timeout costs five times the match.
_RISKY = regex.compile(r"(?s)\)[*+{]|\\[1-9]|\(\?[P&R<0-9]*[>=(]|(?:[*+{].*){4,}|(?:\|[^()]*\).*){6,}")
# TransformerLens' names, and ours: their users write them where paths are meant.
_CANONICAL = regex.compile(r".*\bhook_|\^?blocks\b")


class Groups(dict[str, str]):
    """The named groups of a pattern at one path, and where in the path each of them stands.

    Args:
        found: the match.
    """

    __slots__ = ("spans",)

    def __init__(self, found: regex.Match[str]) -> None:
        super().__init__(found.groupdict())
        self.spans: dict[str, tuple[int, int]] = {name: found.span(name) for name in self}
        """First and one past the last character of each group; ``(-1, -1)`` for one that took no part."""


class Site(NamedTuple):
    """One selected place: a module, under one of its names."""

    path: str
    """The name in ``named_modules(remove_duplicate=False)``, relative to the user's own model."""
    module: nn.Module
    groups: Mapping[str, str] = _NO_GROUPS
    """The named groups of the pattern at this path, for instance ``{"layer": "3", "kind": "mlp"}``."""


class Matcher(Protocol):
    """What every selector becomes: ``None`` for no, the named groups (often empty) for yes."""

    def __call__(self, path: str, module: nn.Module, /) -> Mapping[str, str] | None:
        """Say whether this module, under this name, is meant."""


@dataclass(frozen=True, slots=True)
class PathPattern:
    """Selects by regex on the path; ``match`` says how much of the path it must cover."""

    pattern: regex.Pattern[str]
    match: Match = "full"
    simple: bool = field(init=False, repr=False)
    """Whether matching needs no time limit."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "simple", _RISKY.search(self.pattern.pattern) is None)

    def __call__(self, path: str, module: nn.Module) -> Mapping[str, str] | None:
        """Hold the pattern against the path."""
        found = self.finder()(path)
        if found is None:
            return None
        return Groups(found) if self.pattern.groupindex else _NO_GROUPS

    def finder(self) -> Callable[[str], regex.Match[str] | None]:
        """The matching function: bounded in time where the pattern could backtrack without end."""
        pattern = self.pattern
        method = {"full": pattern.fullmatch, "prefix": pattern.match, "search": pattern.search}[self.match]
        if self.simple:
            return method

        deadline = monotonic() + _MATCH_SECONDS  # for all paths together

        def bounded(path: str) -> regex.Match[str] | None:
            try:
                return method(path, timeout=max(deadline - monotonic(), 1e-3))
            except TimeoutError:
                raise SelectionError(
                    f"pattern {self.pattern.pattern!r} backtracks for more than {_MATCH_SECONDS:g} s on path {path!r}; "
                    "make the repeated group possessive or atomic, e.g. '(?>...)+' for '(...)+'",
                    selector=self.pattern.pattern,
                ) from None

        return bounded


@dataclass(frozen=True, slots=True)
class IsInstance:
    """Selects the modules of a class, subclasses included."""

    kind: type[nn.Module]

    def __call__(self, path: str, module: nn.Module) -> Mapping[str, str] | None:
        """Test the module's class."""
        return _NO_GROUPS if isinstance(module, self.kind) else None


@dataclass(frozen=True, slots=True)
class Where:
    """Selects by a predicate of path and module."""

    predicate: Callable[[str, nn.Module], bool]

    def __call__(self, path: str, module: nn.Module) -> Mapping[str, str] | None:
        """Return no groups if the predicate holds for the module, else None."""
        return _NO_GROUPS if self.predicate(path, module) else None


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Selects what any of its members selects; the groups are those of the first that does."""

    members: tuple[Matcher, ...]

    def __call__(self, path: str, module: nn.Module) -> Mapping[str, str] | None:
        """Ask the members in order."""
        for member in self.members:
            groups = member(path, module)
            if groups is not None:
                return groups
        return None


def as_matcher(selector: Selector, match: Match = "full") -> Matcher:
    """Turn any selector into a matcher, once; applying it is cheap.

    Raises:
        SelectionError: not a selector, or not a valid regex.
    """
    if match not in ("full", "prefix", "search"):
        raise SelectionError(f"match is 'full', 'prefix' or 'search', got {match!r}", selector=selector)
    if "::" in (selector if isinstance(selector, str) else getattr(selector, "pattern", "")):
        raise SelectionError(
            f"{selector!r} means calls inside a forward, and only modules can be selected here; where calls can be, "
            "they are selected by strings",
            selector=selector,
        )
    if isinstance(selector, str):
        return PathPattern(_compile(selector), match if selector else "full")  # "" means the root, and no other path
    if isinstance(selector, type) and issubclass(selector, nn.Module):
        return IsInstance(selector)
    if _is_compiled(selector):
        return PathPattern(_recompile(selector), match)
    if isinstance(selector, Sequence) and not isinstance(selector, bytes):
        return AnyOf(tuple(as_matcher(member, match) for member in selector))
    if callable(selector) and not isinstance(selector, type | nn.Module):
        return Where(selector)
    raise SelectionError(
        "a selector is a regex string, a compiled pattern, a module class, a predicate (path, module) -> bool, "
        f"or a sequence of these; got {_described(selector)}",
        selector=selector,
    )


def _described(stranger: Any) -> str:
    """What is no selector, in a line: a model or a tensor would print as many."""
    kind = type(stranger).__name__
    if isinstance(stranger, nn.Module):
        advice = "write its path or its class; factories get the model from prepare(), functions before the pattern"
        return f"the module {kind} itself: {advice}"
    shape = f"a {kind} of shape {tuple(stranger.shape)}" if isinstance(stranger, Tensor) else ""
    return shape or f"{shorten(repr(stranger), 120)} ({kind})"


def _compile(pattern: str, flags: int = 0) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        glob = "; in a regex, '.*' is what '*' is in a glob" if str(error).startswith("nothing to repeat") else ""
        raise SelectionError(f"pattern {pattern!r} is not a valid regex: {error}{glob}", selector=pattern) from None


def _is_compiled(selector: Any) -> TypeGuard[regex.Pattern[str]]:
    return hasattr(selector, "fullmatch") and isinstance(selector.pattern, str)


def _recompile(pattern: Any) -> regex.Pattern[str]:
    if isinstance(pattern, regex.Pattern):
        return pattern
    # Compiled by re, which has no timeout. These bits mean the same in both, re.ASCII (256) has another in regex.
    flags = pattern.flags & (regex.IGNORECASE | regex.MULTILINE | regex.DOTALL | regex.VERBOSE)
    return _compile(pattern.pattern, flags | (regex.ASCII if pattern.flags & re.ASCII else 0))


class Selection(Sequence[Site]):
    """The sites that a selector means in one model, in the order of ``named_modules()``.

    A sequence of :class:`Site`, also as ``paths`` and ``modules``; printed, a table with parameters and named groups.
    """

    __slots__ = ("_columns", "model_name", "modules", "paths", "selector")

    def __init__(self, sites: Sequence[tuple[Any, ...]], *, selector: Selector, model_name: str) -> None:
        # Sites are made when they are asked for: most contexts need only paths and modules.
        self._columns: tuple[Any, ...] = tuple(zip(*sites, strict=True)) or ((), ())
        self.paths: tuple[str, ...] = self._columns[0]
        self.modules: tuple[nn.Module, ...] = self._columns[1]
        self.selector = selector
        self.model_name = model_name

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...
    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        if isinstance(index, slice):
            return tuple(self)[index]
        return Site(*[column[index] for column in self._columns])

    def __iter__(self) -> Iterator[Site]:
        return map(Site, *self._columns)

    def __repr__(self) -> str:
        head, rows = self._cells()
        return "\n".join([self._title, *text_table(head, rows, right=_RIGHT)])

    def _repr_html_(self) -> str:
        return html_table(self._title, *self._cells(), right=_RIGHT)

    @property
    def _title(self) -> str:
        return f"{len(self)} sites of {self.model_name} selected by {self.selector!r}"

    def _cells(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        columns = 4 if any(site.groups for site in self) else 3
        return _HEAD[:columns], [_row(site)[:columns] for site in self]


_HEAD, _RIGHT = ("path", "class", "parameters", "groups"), ("parameters",)


def _row(site: Site) -> tuple[str, ...]:
    return site.path or "(root)", type(site.module).__name__, f"{_parameter_count(site.module):,}", _spell(site.groups)


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _spell(groups: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name}={value}" for name, value in groups.items() if value is not None)


def select(model: nn.Module, selector: Selector, *, match: Match = "full", allow_empty: bool = False) -> Selection:
    r"""The sites of ``model`` that ``selector`` means; nothing is hooked and nothing runs.

    A module that is registered under several names is a site under each of them. The root is selected only by an
    explicit ``""``. Where ``model`` is a wrapper of torch's (``torch.compile``, ``DistributedDataParallel``,
    ``DataParallel``) and no full name matches, the names below the wrapped model are tried.

    Args:
        model: any ``nn.Module``.
        selector: a regex on the path, a compiled pattern, a module class, a predicate ``(path, module) -> bool``, or
            a sequence of these (their union, in which every string must match something).
        match: ``"full"`` (the pattern covers the whole path), ``"prefix"`` or ``"search"``.
        allow_empty: return an empty selection where nothing matches.

    Raises:
        SelectionError: nothing matches (the nearest names are in the message), the selector is not one, or its
            pattern backtracks for more than a second.

    Example:
        >>> from torch import nn
        >>> select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), r"\d+").paths
        ('0', '1')
    """
    return select_matching(model, as_matcher(selector, match), selector, match=match, allow_empty=allow_empty)


def select_matching(
    model: nn.Module,
    matcher: Matcher,
    selector: Selector,
    *,
    match: Match = "full",
    allow_empty: bool = False,
    tree: list[tuple[str, nn.Module]] | None = None,
) -> Selection:
    """:func:`select` with a matcher made from ``selector`` before and, if given, what ``walk(model)`` returned."""
    sites = _matches(walk(model) if tree is None else tree, matcher)
    inner: nn.Module | None = model
    while not sites and inner is not None and (inner := wrapped(inner)) is not None:
        sites = _matches(walk(inner), matcher)
    if not (selector and type(selector) is str) and _wants_root(selector):
        sites.insert(0, Site("", model))
    if not sites and not allow_empty:
        raise _nothing_matches(model, selector, match)
    for member in selector if isinstance(selector, list | tuple) and not allow_empty else ():
        if member and isinstance(member, str | list | tuple):  # a string that matches nothing is misspelt
            select_matching(model, as_matcher(member, match), member, match=match)
    return Selection(sites, selector=selector, model_name=type(model).__name__)


def depends_on_names_only(matcher: Matcher) -> bool:
    """Whether the same modules under the same names always give the same selection; a predicate may change its mind."""
    if isinstance(matcher, AnyOf):
        return all(map(depends_on_names_only, matcher.members))
    return type(matcher) in (PathPattern, IsInstance)


def distinct_sites(selection: Selection) -> list[Site]:
    """The sites of a selection without further names of the same module: an edit must not run twice."""
    first: dict[int, Site] = {}
    for site in selection:
        first.setdefault(id(site.module), site)
    return list(first.values())


def _matches(tree: list[tuple[str, nn.Module]], matcher: Matcher) -> list[Any]:
    """The sites that are meant; without their groups, as in ``tree``, where these are known to be empty."""
    if not isinstance(matcher, PathPattern):
        return [Site(path, module, groups) for path, module in tree if (groups := matcher(path, module)) is not None]
    if matcher.pattern.groupindex:
        find = matcher.finder()  # the common case, without a Python call per module
        return [Site(path, module, Groups(hit)) for path, module in tree if (hit := find(path)) is not None]
    return [tree[at] for at in _hits(matcher.pattern, matcher.match, next(zip(*tree, strict=True), ()))]


@lru_cache(maxsize=16)
def _hits(pattern: regex.Pattern[str], match: Match, paths: tuple[str, ...]) -> tuple[int, ...]:
    """Which of these names a pattern matches; recipes are used again and again on models of one structure."""
    find = PathPattern(pattern, match).finder()
    return tuple([at for at, path in enumerate(paths) if find(path) is not None])


def _wants_root(selector: Selector) -> bool:
    return selector == "" or (isinstance(selector, list | tuple) and any(map(_wants_root, selector)))


def _nothing_matches(model: nn.Module, selector: Selector, match: Match) -> SelectionError:
    names = [path for path, _ in walk(model)]
    patterns = patterns_of(selector)
    near = tuple(dict.fromkeys(name for pattern in patterns for name in near_misses(pattern, names)))
    what = f"pattern {patterns[0]!r}" if len(patterns) == 1 else f"selector {selector!r}"
    hint = f"; did you mean {listed(near, 3)}?" if near else f"; the paths are {listed(names)}" if names else ""
    if any(_CANONICAL.match(pattern) for pattern in patterns):
        hint += "; canonical names need names=tdcache.names(model), those with 'hook_' style='transformer_lens' in it"
    whole = match == "full" and bool(patterns)
    how = " (patterns match the whole path; match='search' finds them anywhere in it)" if whole else ""
    return SelectionError(
        f"{what} matches none of the {len(names)} modules of {type(model).__name__}{hint}{how}",
        selector=selector,
        near=near,
    )


def patterns_of(selector: Selector) -> list[str]:
    """The patterns in a selector, as text."""
    if isinstance(selector, str):
        return [selector]
    if _is_compiled(selector):
        return [selector.pattern]
    members = selector if isinstance(selector, Sequence) else ()
    return [pattern for member in members for pattern in patterns_of(member)]
