"""Prints a table of canonical names, with one row for names that differ only in the number of the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import regex

__all__ = ["place_rows", "refusal_rows"]

_NUMBER = regex.compile(r"(?<=\.)\d+(?=\.|$)")
_I = "\0"  # stands for the number of a block where rows are merged; no name holds it


class _ShownPlace(Protocol):
    """What is printed of a place."""

    @property
    def where(self) -> str:
        """The place in words."""

    @property
    def heads(self) -> tuple[int, int] | None:
        """How many heads are split off, and along which axis."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the value."""

    @property
    def note(self) -> str:
        """What is to be said of it."""


def place_rows(places: Mapping[str, _ShownPlace]) -> list[tuple[str, ...]]:
    """A row per place; those that are equal but for the number of their block are one."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for name, place in places.items():
        template, number = _without_number(name)
        heads = "" if place.heads is None else f", {place.heads[0]} heads"
        where = place.where + heads if number is None else _put_aside(place.where + heads, number)
        merged.setdefault((template, where, ", ".join(place.axes), place.note), []).append(number or "")
    return [tuple(cell.replace(_I, _spread(numbers)) for cell in cells) for cells, numbers in merged.items()]


def refusal_rows(refused: Mapping[str, str]) -> list[str]:
    """A line per refused name with its reason, merged in the same way."""
    merged: dict[tuple[str, str], list[str]] = {}
    for name, reason in refused.items():
        template, number = _without_number(name)
        merged.setdefault((template, reason if number is None else _put_aside(reason, number)), []).append(number or "")
    return [f"  {name}: {reason}".replace(_I, _spread(numbers)) for (name, reason), numbers in merged.items()]


def _without_number(name: str) -> tuple[str, str | None]:
    """A name with its first number put aside, and that number."""
    found = _NUMBER.search(name)
    return (name, None) if found is None else (_NUMBER.sub(_I, name, count=1), found[0])


def _put_aside(text: str, number: str) -> str:
    return regex.sub(rf"(?<=[.\s]){number}(?=[.:,\s\[]|$)", _I, text)


def _spread(numbers: Sequence[str]) -> str:
    """Which blocks a row speaks of: ``3``, ``{0..11}`` or ``{0,3,7}``."""
    if len(numbers) == 1:
        return numbers[0]
    first, last = int(numbers[0]), int(numbers[-1])
    return f"{{{first}..{last}}}" if last - first == len(numbers) - 1 else f"{{{','.join(numbers)}}}"
