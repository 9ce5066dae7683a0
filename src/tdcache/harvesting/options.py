"""The options of a harvest as one object, so that each is spelled here and in the signature of ``harvest`` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import torch

from tdcache.errors import SelectionError, listed
from tdcache.harvesting.row_rule import RowKind
from tdcache.named_places import Names
from tdcache.types import Match, Pick, Selector

__all__ = ["HarvestOptions", "SHARD_BYTES"]

SHARD_BYTES = 1 << 26
_NOT_ASKED_FOR = ("select", "held_on")


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestOptions:
    """What is stored of which sites, as the user has given it; :func:`tdcache.harvest` explains each option.

    Raises:
        SelectionError: ``overflow`` is neither ``"raise"`` nor ``"count"``.
    """

    select: Selector
    match: Match = "full"
    direction: Literal["fwd", "fwd_pre"] = "fwd"
    pick: Pick = None
    dtype: torch.dtype | str | None = None
    drop: str | Sequence[str] | None = "pad"
    positions: slice | int | Sequence[int] | None = None
    rows: RowKind | None = None
    max_rows: int | None = None
    max_bytes: int | str | None = None
    overflow: Literal["raise", "count"] = "raise"
    stop_early: bool = True
    batch_size: int = 32
    collate: Callable[[list[Any]], Any] | None = None
    forward: Callable[[Any, Any], Any] | None = None
    device: torch.device | str | None = None
    shard_bytes: int = SHARD_BYTES
    tag: str | None = None
    in_keys: Sequence[Any] | None = None
    columns: Sequence[str] | Mapping[str, Any] | None = None
    tokenizer: Any = None
    names: Names | None = None
    held_on: torch.device | str = "cpu"
    """Where rows are kept until they are used; files are written from the CPU."""

    def __post_init__(self) -> None:
        if self.overflow not in ("raise", "count"):
            raise SelectionError(f"overflow is 'raise' or 'count', got {self.overflow!r}", selector=self.overflow)

    @classmethod
    def among(cls, given: Mapping[str, Any]) -> Self:
        """The options among the arguments of a function that spells them all, ``locals()`` in its first line."""
        return cls(**{each.name: given[each.name] for each in fields(cls) if each.name in given})

    @classmethod
    def of(cls, caller: str, given: Mapping[str, Any]) -> Self:
        """The options that a function takes as ``**options``.

        Raises:
            TypeError: one of them is none; the message names the caller and the options that there are.
        """
        known = [each.name for each in fields(cls)]
        unknown = sorted(given.keys() - set(known))
        if unknown:
            told = [name for name in known if name not in _NOT_ASKED_FOR]
            raise TypeError(f"{caller} has no option {unknown[0]!r}; there are {listed(told, 20)}")
        return cls(**given)
