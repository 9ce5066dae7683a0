"""Timing variants side by side in one process, and the tables that come of it.

These machines drift between clock speeds, so no figure stands alone: in every round each variant runs once, in random
order, and what is compared are the times of one round. Rounds that another process disturbed are dropped as a whole.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]
# Builds a variant's own model and whatever stays open while it is measured; gives what is called and timed.
Maker = Callable[[ExitStack], Call]

NOISY = 1.2  # a round that takes this many times the tenth-percentile round is dropped
FLIPPED = 1.6  # and so is one in which a single variant takes this many times its own tenth percentile
MOST = 3  # where many are dropped, up to this many times the rounds are run


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    quick: bool = False

    @property
    def rounds(self) -> int:
        return 12 if self.quick else 90

    @property
    def sample(self) -> float:
        """Seconds of calls per variant and round."""
        return 0.002 if self.quick else 0.004

    @property
    def sizes(self) -> tuple[int, ...]:
        return (12, 48) if self.quick else (12, 48, 192)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2 or math.isnan(values[0]):
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Samples:
    """Seconds per call, by variant; the same index is the same round."""

    seconds: Mapping[str, list[float]]
    rounds: int
    dropped: int

    def __contains__(self, name: str) -> bool:
        return name in self.seconds

    def time(self, name: str) -> Spread:
        return Spread.of(self._of(name))

    def _of(self, name: str) -> list[float]:
        missing = [math.nan] * (self.rounds - self.dropped)
        return self.seconds.get(name, missing)

    def overhead(self, name: str, base: str) -> list[float]:
        """Seconds over ``base``, round by round."""
        return [mine - idle for mine, idle in zip(self._of(name), self._of(base), strict=True)]

    def over(self, name: str, base: str, count: int = 1) -> Spread:
        """Microseconds over ``base`` per captured tensor."""
        return Spread.of([seconds * 1e6 / count for seconds in self.overhead(name, base)])

    def ratio(self, name: str, floor: str, base: str, floor_base: str | None = None) -> Spread:
        """The overhead of ``name`` over the overhead of ``floor``, round by round."""
        mine, least = self.overhead(name, base), self.overhead(floor, floor_base or base)
        return Spread.of([one / other for one, other in zip(mine, least, strict=True) if other > 0] or [math.nan])

    def share(self, name: str, base: str) -> Spread:
        """Percent over ``base``."""
        pairs = zip(self._of(name), self._of(base), strict=True)
        return Spread.of([100 * (mine / idle - 1) for mine, idle in pairs])


@dataclass
class Goal:
    """A number that the project must live up to; ``limit`` is the most, or with ``at_least`` the least.

    What could not be measured is not a number, and not met.
    """

    what: str
    measured: float
    limit: float
    unit: str = "x"
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}".replace(" x", "x").replace(" %", " %")

    def found(self) -> str:
        if math.isnan(self.measured):
            return "not measured"
        return f"{self.measured:.3g} {self.unit}".replace(" x", "x")


@dataclass
class Table:
    """One table of the page."""

    title: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Table:
        return cls(**{**data, "goals": [Goal(**goal) for goal in data["goals"]]})


def settle_process() -> None:
    """One torch thread on one core, where the system allows it."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def build(makers: Mapping[str, Maker], stack: ExitStack, skipped: dict[str, str]) -> dict[str, Call]:
    """The calls of the variants that can be had here; the others are noted by name with the reason."""
    calls: dict[str, Call] = {}
    for name, maker in makers.items():
        if name in skipped:
            continue
        try:
            call = maker(stack)
            call()  # a variant that cannot run, or does not capture what it should, is not timed
        except ImportError as error:
            skipped[name] = f"not measured: {error.name or error} is not installed"
        except Exception as error:  # noqa: BLE001 - a peer may break in any way; the others are still measured
            skipped[name] = f"not measured: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            calls[name] = call
    return calls


def measure(*copies: Mapping[str, Call], plan: Plan, rounds: int | None = None) -> Samples:
    """Run every variant once a round, in random order.

    Where a model happens to lie in memory moves its times by some percent. With several copies of each variant the
    rounds go through them in turn, so that this shows in the quartiles and not in the median alone.
    """
    names = [name for name in copies[0] if all(name in calls for calls in copies)]
    counts = {name: _calls_per_sample(copies[0][name], plan.sample) for name in names}
    shuffle = random.Random(0).shuffle
    wanted = rounds or plan.rounds
    taken: list[dict[str, float]] = []
    calm: list[dict[str, float]] = []
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        while len(taken) < wanted or (len(calm) < wanted // 2 and len(taken) < MOST * wanted):
            shuffle(names)
            calls = copies[len(taken) % len(copies)]
            taken.append({name: _sample(calls[name], counts[name]) for name in names})
            calm = _undisturbed(taken, counts)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    seconds = {name: [one[name] for one in calm] for name in copies[0] if name in counts}
    return Samples(seconds, len(taken), len(taken) - len(calm))


def _undisturbed(taken: list[dict[str, float]], counts: Mapping[str, int]) -> list[dict[str, float]]:
    """The rounds in which nothing else ran and the clock did not change."""
    totals = [sum(seconds * counts[name] for name, seconds in one.items()) for one in taken]
    limit = NOISY * _tenth(totals)
    limits = {name: FLIPPED * _tenth([one[name] for one in taken]) for name in counts}
    return [
        one
        for one, total in zip(taken, totals, strict=True)
        if total <= limit and all(seconds <= limits[name] for name, seconds in one.items())
    ] or taken


def _tenth(values: list[float]) -> float:
    return sorted(values)[len(values) // 10]


def measure_makers(
    makers: Mapping[str, Maker], plan: Plan, skipped: dict[str, str], *, copies: int = 3, rounds: int | None = None
) -> Samples:
    """Build each variant ``copies`` times, measure them, and close what they opened."""
    with ExitStack() as stack:
        return measure(*(build(makers, stack, skipped) for _ in range(copies)), plan=plan, rounds=rounds)


def _calls_per_sample(call: Call, wanted: float) -> int:
    call()
    once = min(_sample(call, 1) for _ in range(3))
    return max(1, round(wanted / once))


def _sample(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def overhead_table(
    title: str, by_size: Mapping[int, Samples], floor: str, bases: Mapping[str, str], skipped: Mapping[str, str]
) -> Table:
    """A table of microseconds per tensor and of ratios to the floor, with one pair of columns a size.

    Args:
        title: the heading.
        by_size: samples by number of captured tensors.
        floor: the variant that has ratio 1.
        bases: for a variant that runs another model, the name of that model without hooks; else ``"no hook"``.
        skipped: variants that could not be had, with the reason.
    """
    head = ["variant"]
    for size in by_size:
        head += [f"{size}: us/tensor", f"{size}: x floor"]
    table = Table(title, head)
    idle = {"no hook", *bases.values()}
    for name in dict.fromkeys(name for samples in by_size.values() for name in samples.seconds):
        if name in idle:
            continue
        cells = [f"**{name}**" if name == floor else name]
        for size, samples in by_size.items():
            base = bases.get(name, "no hook")
            if name not in samples or base not in samples:
                cells += ["-", "-"]
                continue
            cells += [
                samples.over(name, base, size).show(),
                samples.ratio(name, floor, base, "no hook").show(),
            ]
        table.rows.append(cells)
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append(rounds_note(by_size.values()))
    return table


def rounds_note(samples: Any) -> str:
    """How many rounds were kept."""
    return "rounds kept: " + ", ".join(f"{one.rounds - one.dropped} of {one.rounds}" for one in samples)
