"""Options: which keywords a class takes, refusals of misspelt ones that name the nearest, and what ``device=`` may be.

Python's own message for an unknown keyword names no near miss before 3.13, and where a class hands ``**options`` on it
blames a constructor that the user did not call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import regex
import torch

from tdcache.paths import near_misses

__all__ = ["InitSignature", "as_device", "option_names", "refuse_unknown"]


class InitSignature:
    """A class's signature, for a class with a ``__new__`` that takes anything: that of its ``__init__``."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        """The signature, made when it is asked for."""
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        return inspect.Signature(parameters)


@cache
def option_names(kind: type[Any]) -> tuple[str, ...] | None:
    """The keywords that ``kind(...)`` takes, or None where they cannot be told.

    A constructor that hands ``**options`` on takes those of the next class that has a constructor, too.
    """
    names: dict[str, None] = {}
    signatures = [inspect.signature(kind)]
    signatures += [inspect.signature(vars(base)["__init__"]) for base in kind.__mro__[1:-1] if "__init__" in vars(base)]
    for signature in signatures:
        parameters = signature.parameters.values()
        names |= dict.fromkeys(each.name for each in parameters if each.kind in _BY_KEYWORD and each.name != "self")
        if all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in parameters):
            return tuple(names)
    return None


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def refuse_unknown(owner: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse keywords that ``owner`` does not take.

    Raises:
        TypeError: one of them is not among ``known``; the message names what is near, or all of them.
    """
    for name in given:
        if name not in known:
            near = near_misses(regex.escape(name), known)
            hint = f"did you mean {near[0]!r}?" if near else f"options are {', '.join(known)}"
            raise TypeError(f"{owner}() has no argument {name!r}; {hint}")


def as_device(given: torch.device | str) -> torch.device:
    """The device that is meant by ``device=``.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return torch.device(given)
    except (RuntimeError, TypeError) as error:  # torch lists twenty kinds of devices
        raise ValueError(f"device= is a torch.device or the name of one, such as 'cuda:0', got {given!r}") from error
