"""Where a value of a trace can be read: the outermost module that returns it, else the call that makes it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from tdcache.function_calls.sites import CallSite
from tdcache.named_places import NamedPlace
from tdcache.naming.trace import ForwardTrace, ModuleRun, TracedValue
from tdcache.naming.trace_flow import PASS, DataFlow, main_operand
from tdcache.types import Pick

__all__ = ["FoundNames", "Placer", "norm_place"]

_UNREADABLE = frozenset({"get", "setitem"})


class Placer:
    """Finds the places of values."""

    def __init__(self, trace: ForwardTrace) -> None:
        self.runs: dict[str, int] = {}
        """How often each module ran."""
        for call in trace.calls:
            self.runs[call.path] = self.runs.get(call.path, 0) + 1
        self.ports: dict[str, str] = {}

    def output(self, value: TracedValue, within: ModuleRun | None = None) -> NamedPlace | None:
        """The outermost module inside ``within`` that makes ``value``; else the call that makes it.

        Modules that only hand the value on (a dropout that is switched off) do not count: others may read it before.
        """
        return self.module_output(value, within) or self._earlier(value, within) or self.call_output(value)

    def module_output(self, value: TracedValue, within: ModuleRun | None = None) -> NamedPlace | None:
        """The outermost module inside ``within`` that makes ``value``; of two side by side, the later."""
        found = [
            (call, steps)
            for call, steps in value.outputs
            if (within is None or within.holds(call)) and all(given is not value for _, given in call.given)
        ]
        if not found:
            return None
        depth = min(call.depth for call, _ in found)
        call, steps = [each for each in found if each[0].depth == depth][-1]
        return self.returned(call, steps)

    def returned(self, call: ModuleRun, steps: tuple[int | str, ...]) -> NamedPlace:
        """The place of one tensor among what a module returned."""
        first = bool(call.made) and call.made[0][0] == steps
        return NamedPlace(path=call.path, pick=None if first else _pick(steps), call=self.ordinal(call))

    def given(self, call: ModuleRun, value: TracedValue) -> NamedPlace | None:
        """The place of a value among the arguments of a module."""
        for steps, each in call.given:
            if each is value:
                pick = None if steps == (0,) else _pick(steps)
                return NamedPlace(path=call.path, side="fwd_pre", pick=pick, call=self.ordinal(call))
        return None

    def call_output(self, value: TracedValue) -> NamedPlace | None:
        """The call of a function that makes ``value``, as a place."""
        op = value.op
        if op is None or op.name in _UNREADABLE or not op.steps:
            return None
        at = [made is value for made in op.made]
        steps = op.steps[at.index(True)] if True in at[: len(op.steps)] else None
        if steps is None:
            return None
        call = op.call if self.runs.get(op.path, 1) > 1 else None
        return NamedPlace(path=str(CallSite(op.path, op.name, op.ordinal)), pick=_pick(steps), call=call)

    def ordinal(self, call: ModuleRun) -> int | None:
        """Which call of its module this is; None where it is the only one."""
        return call.ordinal if self.runs[call.path] > 1 else None

    def _earlier(self, value: TracedValue, within: ModuleRun | None) -> NamedPlace | None:
        """The module that returns the same numbers in another tensor, as a copy or a view that was shaped back."""
        given: TracedValue | None = value
        while given is not None and given.op is not None and given.op.name in PASS:
            given = main_operand(given.op)
            if given is not None and given.shape == value.shape and torch.equal(given.data, value.data):
                found = self.module_output(given, within)
                if found is not None:
                    return found
        return None


def _pick(steps: tuple[int | str, ...]) -> Pick:
    if not steps:
        return None
    return steps[0] if len(steps) == 1 else steps


@dataclass(slots=True)
class FoundNames:
    """What was found so far: places by name, reasons by name, and what the streams are made of."""

    flow: DataFlow
    placer: Placer
    places: dict[str, NamedPlace] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, place: NamedPlace | None, *, axes: tuple[str, ...] = (), note: str = "") -> None:
        """Note a place, or that the value cannot be read anywhere."""
        if place is None:
            self.refuse(name, "no module returns this value and no call that can be named makes it")
        else:
            self.places[name] = replace(place, name=name, axes=axes, note=note or place.note)
            self.refused.pop(name, None)

    def refuse(self, name: str, reason: str) -> None:
        """Note why a name is not given, unless it is."""
        if name not in self.places:
            self.refused[name] = reason


def norm_place(found: FoundNames, value: TracedValue) -> NamedPlace | None:
    """The output of the norm's own module, also where that of a module around it is the same tensor."""
    call = found.flow.norm_call(value)
    return found.placer.output(value) if call is None else found.placer.returned(call, call.made[0][0])
