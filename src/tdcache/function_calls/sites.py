"""Names of calls, ``path::function.1``, and the selectors that mean several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import regex

from tdcache.errors import SelectionError
from tdcache.function_calls.names import DERIVED
from tdcache.regions import Region
from tdcache.selection import Selection
from tdcache.types import Match, Selector

__all__ = ["CallPattern", "CallSite", "FindModules", "at_call", "has_heads_first", "is_call", "split_selector"]

_MARK = "::"
_LABEL = regex.compile(r"(?P<name>[A-Za-z_]\w*)(?:\.(?P<ordinal>0|[1-9]\d*))?")
# No function is called this: a pattern that takes it takes everything, and does not ask for derived places.
_NO_NAME = "0 is no function"
_PLACE = "(?:" + "|".join(DERIVED) + ")"
_PLACES = regex.compile(rf"\(?(?:\?:)?{_PLACE}(?:\|{_PLACE})*\)?")


def is_call(text: object) -> bool:
    """Whether a selector or key speaks of calls: it holds ``::``."""
    return isinstance(text, str) and _MARK in text


def has_heads_first(path: str) -> bool:
    """Whether the values of a call are ``(batch, heads, positions, ...)``, as attention and its softmax have them."""
    return is_call(path) and CallSite.parse(path).name in (*DERIVED, "softmax")


@dataclass(frozen=True, slots=True)
class CallSite:
    """One call in the forward of one module: the ``ordinal``-th (from 0) call of ``name`` there.

    ``str(site)`` is ``"path::name"`` for the first call, ``"path::name.1"`` for the second; :meth:`parse` reads both.
    """

    path: str
    """The module's name in ``named_modules()``; ``""`` for the root."""
    name: str
    ordinal: int = 0

    def __str__(self) -> str:
        return f"{self.path}{_MARK}{self.label}"

    @property
    def label(self) -> str:
        """The part after ``::``."""
        return self.name if self.ordinal == 0 else f"{self.name}.{self.ordinal}"

    @property
    def derived(self) -> bool:
        """Whether this is a place of an attention call (``::pattern``) and no function."""
        return self.name in DERIVED

    @classmethod
    def parse(cls, text: str) -> CallSite:
        """The site that ``text`` names.

        Raises:
            SelectionError: ``text`` is not of the form ``path::function`` or ``path::function.1``.

        Example:
            >>> CallSite.parse("layers.3.attn::softmax.1")
            CallSite(path='layers.3.attn', name='softmax', ordinal=1)
        """
        path, mark, label = text.partition(_MARK)
        parsed = _LABEL.fullmatch(label) if mark else None
        if parsed is None:
            raise SelectionError(
                f"{text!r} names no call inside a forward; write 'path::function', or 'path::function.1' for the "
                "second call of it",
                selector=text,
            )
        return cls(path, parsed["name"], int(parsed["ordinal"] or 0))


@dataclass(frozen=True, slots=True)
class CallPattern:
    r"""A selector ``"A::B"``: regex A on the paths of modules, regex B on the labels inside, both full matches.

    Attributes:
        path: the text of A, for :func:`tdcache.selection.select`.
        inside: B, compiled.
    """

    path: str
    inside: regex.Pattern[str]
    everything: bool = field(init=False, repr=False)
    """Whether B takes any name at all; it then means the functions, and not the derived places of attention."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "everything", self.inside.fullmatch(_NO_NAME) is not None)

    @classmethod
    def parse(cls, selector: str) -> CallPattern:
        """Split and compile a selector.

        Raises:
            SelectionError: no ``::`` in it, nothing after it, or no regex there.
        """
        path, mark, inside = selector.partition(_MARK)
        if not mark or not inside:
            raise SelectionError(
                f"selector {selector!r} selects no calls; write 'modules::functions', two regular expressions, "
                r"for instance r'.*\.attn::softmax'",
                selector=selector,
            )
        try:
            return cls(path, regex.compile(inside))
        except regex.error as error:
            raise SelectionError(f"pattern {inside!r} is not a valid regex: {error}", selector=selector) from None

    def takes(self, label: str) -> bool:
        """Whether a label, such as ``softmax.1``, is meant."""
        return self.inside.fullmatch(label) is not None

    def may_take(self, name: str) -> bool:
        """Whether any call of ``name`` could be meant, the first or a later one."""
        return self.takes(name) or self.inside.fullmatch(f"{name}.", partial=True) is not None

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The labels that are meant, if B spells them out: one, or several between bars; None if it does not."""
        text = self.inside.pattern.replace("\\.", ".")
        for opening in ("(?:", "("):
            if text.startswith(opening) and text.endswith(")"):
                text = text[len(opening) : -1]
        found = tuple(dict.fromkeys(text.split("|")))
        return found if all(map(_LABEL.fullmatch, found)) else None

    @property
    def attention_only(self) -> bool:
        """Whether nothing but places of attention calls is meant, so that no other call need be seen."""
        labels = self.labels
        if labels is not None:
            return len(self.attention()) == len(labels)
        return _PLACES.fullmatch(self.inside.pattern) is not None

    def attention(self) -> tuple[str, ...]:
        """The labels of the places of attention calls that are meant: of the first call, or those spelled out."""
        labels = self.labels
        if labels is None:
            return self.derived()
        return tuple(label for label in labels if CallSite.parse(f"::{label}").derived)

    def derived(self) -> tuple[str, ...]:
        """The places of an attention call that are meant."""
        return () if self.everything else tuple(name for name in DERIVED if self.takes(name))


def at_call(region: Region, path: str) -> Region:
    """The same part of a value at a call: in one of an attention call, heads and positions are axes of their own.

    Queries, keys, values, scores and patterns are ``(batch, heads, positions, ...)``; so is what their softmax returns.
    """
    if not has_heads_first(path):
        return region
    head_dim = -3 if region.heads is not None and region.unit_dim == -1 else region.head_dim
    return replace(region, head_dim=head_dim, position_dim=-2 if region.position_dim == 1 else region.position_dim)


class FindModules(Protocol):
    """What finds modules in one model, as :func:`tdcache.selection.select` does."""

    def __call__(self, selector: Selector, *, match: Match, allow_empty: bool) -> Selection:
        """The sites that ``selector`` means."""


def split_selector(selector: Selector) -> tuple[Selector | None, tuple[str, ...]]:
    """The part of a selector that speaks of modules (None if there is none), and the selectors of calls in it.

    Raises:
        SelectionError: a selector of calls is not well formed.
    """
    if isinstance(selector, str):
        if not is_call(selector):
            return selector, ()
        CallPattern.parse(selector)
        return None, (selector,)
    if not isinstance(selector, Sequence) or isinstance(selector, bytes):
        return selector, ()
    parts = [split_selector(member) for member in selector]
    calls = tuple(call for _, found in parts for call in found)
    return ([part for part, _ in parts if part is not None] or None) if calls else selector, calls
