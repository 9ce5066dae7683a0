"""The options of every intervention in one frozen object: in which values it acts, in which part of them, and when.

One definition, so that ``positions=-1`` means the same in ablation, steering and patching.
"""

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
    """The options of :class:`EditOptions` except ``positions`` and ``units``, for classes with these as parameters."""

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
        positions: which tokens of each row, along ``position_dim``: an int, a slice, a sequence of ints; or, separately
            for each row, an integer tensor ``(batch, k)`` or a bool mask ``(batch, seq)`` of columns. Padding is not
            counted, so that 0 is the first and -1 the last token of each row, but cached tokens are; see the page on
            positions, steps and rows. None is the whole value, including padding.
        units: which features, along ``unit_dim``: an int, a slice, or a sequence of ints. All by default.
        heads: ``(n_heads, which)``: which heads, if ``unit_dim`` is the concatenation of ``n_heads`` heads, as in the
            input of an attention's output projection. An int alone gives only their number, for a sweep over heads.
        rows: which rows of the batch: an int, a slice, a sequence of ints, or a bool mask ``(batch,)``. With several
            interventions, each prompt of a batch can get its own edit in one forward. Rows are axis 0, or axis 1 if
            positions are axis 0.
        calls: which calls of a module that runs several times in one forward of the model: an int, a slice or a
            sequence of ints, from 0. All by default.
        direction: ``"fwd"`` to change outputs, ``"fwd_pre"`` to change inputs.
        pick: which tensor of a structured value: an index, a key or a path of these; the first by default. The rest of
            the value does not change. If nothing reads the picked tensor, the first run warns.
        steps: in which forwards of ``generate()``: ``"prefill"``, ``"decode"``, or a predicate of a
            :class:`tdcache.Step`.
        mask_key: the argument of the call that marks padding; by default found by its name. ``"~name"`` if 1 means
            padding, and None for no mask: positions are then columns.
        match: how the selector's patterns are compared with paths: ``"full"``, ``"prefix"`` or ``"search"``.
        position_dim: the axis of positions; 0 for the layout ``(seq, batch, features)``.
        unit_dim: the axis of units, counted from the end; -3 for the channels of images.
        names: the canonical names of the model, ``tdcache.names(model)``, to which the selector then refers. A name is
            one value, so ``direction`` stays ``"fwd"``. The table gives the axes of positions and units, and for a name
            with an axis of heads, ``heads`` just lists them: ``heads=[3, 7]``.

    Raises:
        DirectionError: the direction is neither ``"fwd"`` nor ``"fwd_pre"``.
        EditError: the region, calls, steps or pick are invalid.
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
    """The part of each value that is changed."""

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
        """Whether an edit needs the arguments of the current forward."""
        return any(each is not None for each in (self.positions, self.rows, self.steps, self.calls))


_OPTIONS = tuple(each for each in dataclasses.fields(EditOptions) if each.init)
OPTION_NAMES = tuple(each.name for each in _OPTIONS)


def _check_calls(calls: Any) -> None:
    """Refuse anything but calls counted from 0."""
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

    Help, repr and saving use it.
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
    """A value in the form used in the repr of an intervention."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, Mapping) or hasattr(value, "batch_size"):
        return f"{type(value).__name__} of {len(value.keys())}"
    return repr(value)
