"""The type names used in signatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import regex
from torch import nn

__all__ = [
    "CacheKey",
    "Check",
    "Hold",
    "HookDirection",
    "Index",
    "Match",
    "Pick",
    "Removable",
    "Selector",
]

HookDirection = Literal["fwd", "bwd", "fwd_pre", "bwd_pre", "grad_in", "fwd_kwargs", "fwd_pre_kwargs"]
"""Which value at a path: see :data:`tdcache.hooks.directions.DIRECTIONS` for what each one means."""

Match = Literal["full", "prefix", "search"]
"""How a pattern is held against a path: the whole of it (default), its beginning, or anywhere in it."""

Hold = Literal["detached", "live", "snapshot"]
"""How a captured tensor is kept: an alias without graph, the tensor with its graph, or a detached copy."""

Check = Literal["versions", "values"]
"""How it is found that a kept alias was overwritten: by torch's version counter, or by checksums as well."""

CacheKey: TypeAlias = str | tuple[str, ...]
"""A key of a TensorDict: the dotted path is ONE string; tuples are nested."""

Selector: TypeAlias = "str | regex.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence[Any]"
"""A regex on the path, a compiled pattern, a module class, a predicate, or a sequence of these (their union)."""

Pick: TypeAlias = "int | str | tuple[int | str, ...] | Callable[[Any], Any] | None"
"""Which tensor of a structured value: an index, a key, a path of these, a callable, ``"all"``, or the first (None)."""

Index: TypeAlias = Any
"""Anything that may stand in ``tensor[...]``."""


class Removable(Protocol):
    """What a hook registration returns."""

    def remove(self) -> None:
        """Undo the registration; a second call does nothing."""
