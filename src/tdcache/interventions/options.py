"""The options that every intervention takes, in one frozen object: where in a value it acts, in which values, when."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

from torch import Tensor

from tdcache.errors import DirectionError, EditError
from tdcache.hooks import direction_row
from tdcache.named_places import Names
from tdcache.place_modules import refuse_at_names
from tdcache.regions import Along, Heads, Region
from tdcache.steps import Steps, check_steps
from tdcache.types import CacheKey, Match, Pick

__all__ = [
    "Calls",
    "EditKeywords",
    "EditOptions",
    "OPTION_NAMES",
    "Side",
    "WhereKeywords",
    "brief",
    "signature_with_options",
]

Side = Literal["fwd", "fwd_pre"]
"""Whether an intervention acts on outputs or on inputs."""

Calls = int | slice | Sequence[int] | None
"""Which calls of a module within one forward, counted from 0."""


class WhereKeywords(TypedDict, total=False):
    """The options of :class:`EditOptions` except ``positions`` and ``units``, for classes that take these by place."""

    heads: int | Heads | Sequence[int] | None
    rows: Along
    calls: Calls
    direction: Side
    pick: Pick
    steps: Steps
    mask_key: CacheKey | None
    match: Match
    position_dim: int
    unit_dim: int
    names: Names | None


class EditKeywords(WhereKeywords, total=False):
    """The options of :class:`EditOptions` as keyword arguments."""

    positions: Along
    units: Along


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """Where and when an intervention acts; every intervention takes these as keyword arguments.

    Args:
        positions: which tokens of each row, along ``position_dim``: an int, a slice, a sequence of ints; or, with a
            choice of its own for each row, an integer tensor ``(batch, k)`` or a bool mask ``(batch, seq)`` of columns.
            Padding does not count, so that 0 is the first and -1 the last token of each row, and tokens that are
            cached do; see the page on positions, steps and rows. None is all of the value, padding included.
        units: which features, along ``unit_dim``: an int, a slice, or a sequence of ints. All by default.
        heads: ``(n_heads, which)``: which heads where ``unit_dim`` holds ``n_heads`` heads side by side, as the input
            of an attention's output projection does. An int alone says only how many there are, which is what a sweep
            over heads needs.
        rows: which rows of the batch: an int, a slice, a sequence of ints, or a bool mask ``(batch,)``. Several
            interventions with ``rows`` of their own give each prompt of a batch an edit of its own in one forward.
            Rows are axis 0, or axis 1 where positions are axis 0.
        calls: which calls of a module that runs several times in one forward of the model: an int, a slice or a
            sequence of ints, from 0. All by default.
        direction: ``"fwd"`` to change outputs, ``"fwd_pre"`` to change inputs.
        pick: which tensor of a structured value: an index, a key or a path of these; the first by default. The rest of
            the value is kept. The first run in which nothing reads the tensor that was picked warns.
        steps: in which forwards of ``generate()``: ``"prefill"``, ``"decode"``, or a predicate of a
            :class:`tdcache.Step`.
        mask_key: which argument of the call says what is padding; found by its name by default. ``"~name"`` for one
            in which 1 is padding, and None for no mask: then positions are columns.
        match: how the selector's patterns are held against paths: ``"full"``, ``"prefix"`` or ``"search"``.
        position_dim: the axis of positions; 0 in a model of the layout ``(seq, batch, features)``.
        unit_dim: the axis of units, counted from the end; -3 for the channels of images.
        names: the canonical names of the model, ``tdcache.names(model)``, which the selector then means. A name is one
            value, so ``direction`` stays ``"fwd"``. Positions and units are along the axes that the table says they
            are, and of a name with an axis of heads ``heads`` just says which: ``heads=[3, 7]``.

    Raises:
        DirectionError: another direction.
        EditError: a region, calls, steps or pick that cannot be used.
    """

    positions: Along = None
    units: Along = None
    heads: int | Heads | Sequence[int] | None = None
    rows: Along = None
    calls: Calls = None
    direction: Side = "fwd"
    pick: Pick = None
    steps: Steps = None
    mask_key: CacheKey | None = "auto"
    match: Match = "full"
    position_dim: int = 1
    unit_dim: int = -1
    names: Names | None = None
    region: Region = field(init=False, repr=False, compare=False)
    """The part of each value that is meant."""

    def __post_init__(self) -> None:
        refuse_at_names(self.names, [self.direction])
        if self.direction not in get_args(Side):
            direction_row(self.direction)
            raise DirectionError(
                f"an intervention changes outputs ('fwd') or inputs ('fwd_pre'), got {self.direction!r}"
            )
        if callable(self.pick) or self.pick == "all":
            raise EditError(f"pick={self.pick!r} cannot say where to put a new value; use an index or a key")
        if self.steps is not None:
            check_steps(self.steps)
        _check_calls(self.calls)
        region = Region(
            positions=self.positions, units=self.units, rows=self.rows, position_dim=self.position_dim,
            heads=None if isinstance(self.heads, int) or self.names is not None else self.heads,
            unit_dim=self.unit_dim,
        )  # fmt: skip
        object.__setattr__(self, "region", region)

    @property
    def asks_for_call(self) -> bool:
        """Whether an edit has to know the forward that it takes part in."""
        return self.positions is not None or self.steps is not None or self.calls is not None


_OPTIONS = tuple(each for each in dataclasses.fields(EditOptions) if each.init)
OPTION_NAMES = tuple(each.name for each in _OPTIONS)


def _check_calls(calls: Any) -> None:
    """Refuse what does not name calls from 0."""
    if calls is None or (type(calls) is int and calls >= 0):
        return
    if isinstance(calls, slice):
        bounds = (calls.start or 0, calls.stop or 0, 1 if calls.step is None else calls.step)
        if all(type(each) is int and each >= 0 for each in bounds) and bounds[2]:
            return
    elif isinstance(calls, list | tuple | range) and calls and all(type(each) is int and each >= 0 for each in calls):
        return
    raise EditError(
        f"calls= is an int, a slice or a sequence of ints from 0, for how often a module runs is not known before it "
        f"has; got {calls!r}"
    )


def signature_with_options(kind: type) -> inspect.Signature:
    """The signature of a class whose ``__init__`` ends with ``**options``, with every option spelled out.

    Help, repr and saving go by it.
    """
    inner = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]  # without self
    if not inner or inner[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return inspect.Signature(inner)
    named = {each.name for each in inner}
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in _OPTIONS
        if each.name not in named
    ]
    return inspect.Signature([*inner[:-1], *options])


def brief(value: Any) -> str:
    """A value as the repr of an intervention shows it."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping) or hasattr(value, "batch_size"):
        return f"{type(value).__name__} of {len(value.keys())}"
    return repr(value)
