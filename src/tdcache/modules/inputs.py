"""A module's arguments as one value: what ``pick`` means among positional and keyword arguments."""

from __future__ import annotations

from typing import Any

from tdcache.errors import CaptureError
from tdcache.hooks.values import pick_tensor
from tdcache.types import Pick

__all__ = ["picked_input", "steps_to_input"]


def steps_to_input(pick: Pick, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Pick:
    """The pick that means in ``(args, kwargs)`` what ``pick`` means among the arguments.

    A number counts positional arguments, then keyword ones; a name is a keyword argument; a tuple goes on from there.

    Raises:
        CaptureError: there is no such argument.
    """
    if pick is None or callable(pick):
        return pick
    first, *rest = pick if isinstance(pick, tuple) else (pick,)
    names = list(kwargs)
    if first in kwargs:
        return (1, first, *rest)
    if isinstance(first, int) and -len(args) - len(names) <= first < len(args) + len(names):
        at = first % (len(args) + len(names))
        return (0, at, *rest) if at < len(args) else (1, names[at - len(args)], *rest)
    raise CaptureError(
        f"pick={pick!r} finds nothing at {path!r}: it was called with {len(args)} positional arguments and {names!r}",
        paths=(path,),
    )


def picked_input(pick: Pick, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Any:
    """The tensor that ``pick`` means among the arguments; a callable gets all of them as a tuple."""
    if callable(pick):
        return pick((*args, *kwargs.values()))
    return pick_tensor((args, kwargs), steps_to_input(pick, args, kwargs, path), path)
