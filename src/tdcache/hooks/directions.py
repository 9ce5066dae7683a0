"""The table of directions: for each, the parameters of a hook, the captured value, and what a return value replaces.

All code that depends on a direction reads this table, so that adding one or reading its meaning needs no search for
``if direction == ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from tdcache.errors import DirectionError
from tdcache.types import HookDirection

__all__ = ["DIRECTIONS", "Direction", "direction_row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """One row of the table."""

    name: HookDirection
    params: tuple[str, ...]
    """The parameters of a hook, in order; a callback gets them by name."""
    value: str
    """The parameter that is captured."""
    returns: str
    """The parameter that a returned value replaces."""
    noun: str
    """The name of the value in cache keys such as ``"run.linear2_output"``."""
    gradient: bool = False
    """Whether the hook is called in the backward."""

    @property
    def value_index(self) -> int:
        """Position of the captured value among the parameters."""
        return self.params.index(self.value)

    @property
    def returns_index(self) -> int:
        """Position of the replaced value among the parameters."""
        return self.params.index(self.returns)


_OUTPUT = ("module", "args", "output")
_BACKWARD = ("module", "grad_input", "grad_output")

DIRECTIONS: Mapping[str, Direction] = {
    row.name: row
    for row in (
        Direction(name="fwd", params=_OUTPUT, value="output", returns="output", noun="output"),
        Direction(name="fwd_pre", params=("module", "args"), value="args", returns="args", noun="input"),
        Direction(
            name="bwd", params=_BACKWARD, value="grad_output", returns="grad_input", noun="grad_output", gradient=True
        ),
        Direction(
            name="bwd_pre",
            params=("module", "grad_output"),
            value="grad_output",
            returns="grad_output",
            noun="grad_output",
            gradient=True,
        ),
        Direction(
            name="grad_in", params=_BACKWARD, value="grad_input", returns="grad_input", noun="grad_input", gradient=True
        ),
        Direction(
            name="fwd_kwargs",
            params=("module", "args", "kwargs", "output"),
            value="output",
            returns="output",
            noun="output",
        ),
        Direction(
            name="fwd_pre_kwargs", params=("module", "args", "kwargs"), value="args", returns="args", noun="input"
        ),
    )
}
"""The table of directions, by name: what a hook is called with, what is taken, and what a return replaces."""


def direction_row(direction: object) -> Direction:
    """The row of a direction.

    Raises:
        DirectionError: there is no direction of this name.
    """
    row = DIRECTIONS.get(direction) if isinstance(direction, str) else None
    if row is None:
        names = ", ".join(map(repr, get_args(HookDirection)))
        raise DirectionError(f"unknown direction {direction!r}; use one of {names}")
    return row
