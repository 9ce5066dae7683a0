"""Sweeps: each site (or site x position, site x head) patched alone, many of them in one forward.

Copies of the batch run side by side, each with one patch. A copy differs from the unpatched run only after its patch,
so the interventions are ordered by depth, and the layers before the first patch of a chunk are replayed, not run. Both
are right only for a model whose rows do not mix and whose layers hand on nothing but their output, so one trial is run
again alone and in full; where it differs, the sweep goes on in that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdcache.cache.stacking import StackBy
from tdcache.current_call import CurrentCall
from tdcache.errors import EditError, TdcacheWarning, warn_user
from tdcache.function_calls.sites import at_call
from tdcache.hooks import MultiHookHandle, port_at
from tdcache.interventions.base import with_inputs_of
from tdcache.interventions.blocks import PatchBlocks, SweepState, block_of, repeated, rows_of
from tdcache.interventions.edit_tap import EditTap, ReadTap, attach_taps
from tdcache.interventions.memory import Memory
from tdcache.interventions.random_state import SharedRandomState
from tdcache.interventions.replay import Recording
from tdcache.interventions.trials import SweepOver, SweepRecipe, Trial, chunks_of, trials_at, windows_of
from tdcache.regions import Region
from tdcache.selection import Selection, Site
from tdcache.types import CacheKey

__all__ = ["Sweep"]

Forward = Callable[[TensorDictBase], TensorDictBase]
_Found = dict[tuple[str, tuple[int, ...]], Tensor]

_ROUNDINGS = 256
"""By how many roundings of the largest value two runs may differ that sum in another order."""
_MOST_ROUNDED = 0.03
"""And the most that this may be, for formats of few digits."""


class Sweep:
    """The sweep of one bound recipe.

    Args:
        recipe: its options.
        selection: the sites.
        over: what it goes over beside sites.
    """

    def __init__(self, recipe: SweepRecipe, selection: Selection, over: tuple[SweepOver, ...]) -> None:
        self.recipe = recipe
        self.selection = selection
        self.over = over
        self.state = SweepState()
        self.memory = Memory("source")
        self.recording: Recording | None = None
        self.model: nn.Module | None = None
        self.random: SharedRandomState | None = None
        self.window = 1
        self.stack_by = None if recipe.stack_by is None else StackBy(recipe.stack_by, selection)
        self._given: dict[str, Any] = {}
        self._call: CurrentCall | None = None
        self._regions: dict[str, Region | None] = {}
        self._alone = False
        """Whether trials run one at a time and in full, because that made a difference."""

    def attach(self, model: nn.Module) -> MultiHookHandle:
        """Put the taps on; they do nothing until :meth:`run`."""
        self.model = model
        handle = MultiHookHandle()
        with handle.installing():
            paths = () if self.recipe.source is None else self.selection.paths
            given = {path: self.recipe.value_at(path) for path in paths}
            self._given = {path: value for path, value in given.items() if value is not None}
            if self.recipe.options.positions is not None:
                self._call = CurrentCall(model, self.recipe.options)
                self._call.attach(handle)
            for site in self.selection:
                self._attach_one(handle, site)
        return handle

    def _attach_one(self, handle: MultiHookHandle, site: Site) -> None:
        port = port_at(site.path, self.recipe.options.direction, self.recipe.options.pick)
        value = _ValueOf(self, site.path)
        edit = PatchBlocks(site.path, self.state, value, self.recipe.patch_fn, self.recipe.options.calls)
        attach_taps(site.module, handle, EditTap(port, edit, region=Region()), ReadTap(port, self._read))

    def _read(self, path: str, value: Tensor) -> None:
        self.memory.record(path, value)
        if self.state.assigned:
            return
        if self.recording is not None:
            self.recording.reached(path)
        if self._call is not None:
            region = self._call.region_at(path, value, self.recipe.region_at(path))
            if not _same_columns(region, self._regions.setdefault(path, region)):
                raise EditError(
                    f"positions={self.recipe.options.positions!r} are other columns in the source run than in the "
                    f"patched one at {path!r}: a sweep patches columns, so pad both alike, or patch without sweep="
                )

    def value_of(self, path: str, call: int) -> Tensor:
        """The source's value for one call of one site."""
        if self._given:
            found: Tensor = self._given[path]()
            return found
        values = self.memory.values.get(path, [])
        if call >= len(values):
            raise EditError(
                f"{path!r} ran {len(values)} times in the source run and now more often; patch it without sweep="
            )
        return values[call]

    @torch.no_grad()
    def run(
        self, data: TensorDictBase, forward: Forward, in_keys: list[CacheKey], out_keys: list[CacheKey]
    ) -> TensorDictBase:
        """Run every trial, and give the metric by site."""
        self.begin()
        try:
            if self._given:
                return self.run_on(data, data, forward, in_keys, out_keys)
            second = with_inputs_of(data, self.recipe.patch_key, in_keys, self.recipe)
            with self.memory.recording(), self.alike():
                forward(data.copy())
            return self.run_on(data, second, forward, in_keys, out_keys)
        finally:
            self.end()

    def begin(self) -> None:
        """Begin a comparison, with the random state that all its forwards share."""
        self.recording, self._regions, self.random = None, {}, SharedRandomState(cast(nn.Module, self.model))

    def end(self) -> None:
        """It is over: what it kept is let go of."""
        self.recording, self.memory.values, self.random = None, {}, None

    def alike(self) -> Any:
        """A block for one run, with the random numbers of the others."""
        return cast(SharedRandomState, self.random).run()

    def run_on(
        self,
        data: TensorDictBase,
        base: TensorDictBase,
        forward: Forward,
        in_keys: list[CacheKey],
        out_keys: list[CacheKey],
    ) -> TensorDictBase:
        """Run every trial on copies of the inputs in ``base``; the metric sees them beside the entries of ``data``."""
        self.state.rows = rows_of(base, in_keys)
        plain = self._record(base, forward)
        trials = [
            trial
            for path, sites in windows_of(self.selection.paths, self.window)
            for trial in trials_at(
                self.recipe, self.over, path, sites, self.value_of(path, 0).shape, self._region_at(path)
            )
        ]
        seen = data.copy()
        for key in in_keys:
            seen.set(key, base.get(key))
        runs = _Runs(self, base, forward, in_keys, out_keys, plain)
        return self._result(self._measured(trials, runs, seen))

    def _region_at(self, path: str) -> Region:
        whole = self.recipe.region_at(path)
        region = self._regions.get(path, whole) if self._call else whole
        if region is None:
            raise EditError(f"positions={self.recipe.options.positions!r} are none of the columns at {path!r}")
        return region

    def _record(self, base: TensorDictBase, forward: Forward) -> TensorDictBase:
        """Run once without a patch, to know what ran before what, and what it gave."""
        self.recording = recording = Recording(cast(nn.Module, self.model))
        plain = base.copy()
        with recording.recording(), self.alike():
            forward(plain)
        silent = [path for path in self.selection.paths if path not in recording.before]
        if silent:
            raise EditError(
                f"{len(silent)} of {len(self.selection)} sites did not run, so they cannot be patched: {silent[:5]!r}"
            )
        return plain

    def _measured(self, trials: list[Trial], runs: _Runs, seen: TensorDictBase) -> _Found:
        """The metric of each trial."""
        if not self._alone:
            depth_of = {trial.sites: len(self.skipped([trial])) for trial in trials}
            trials = sorted(trials, key=lambda trial: depth_of[trial.sites])
            depths = [depth_of[trial.sites] for trial in trials]
            try:
                return self._in_chunks(list(chunks_of(trials, depths, self.recipe.chunk)), runs, seen)
            except _NotAlikeError as difference:
                self._alone = True
                warn_user(
                    f"the sweep goes on one trial at a time and in full, for {difference}: rows of this model depend "
                    "on each other, or layers share more than their outputs. chunk=1, replay=False says so beforehand",
                    TdcacheWarning,
                )
        found: _Found = {}
        for trial in trials:
            (outputs,) = runs.outputs([trial], ())
            found[trial.name, trial.at] = self._metric(seen, outputs)
        return found

    def _in_chunks(self, chunks: list[Sequence[Trial]], runs: _Runs, seen: TensorDictBase) -> _Found:
        found: _Found = {}
        if not chunks:
            return found
        checked = max(range(len(chunks)), key=lambda at: (len(chunks[at]) > 1) + bool(self.skipped(chunks[at])))
        for at, chunk in enumerate(chunks):
            skipped = self.skipped(chunk)
            short = len(chunk) > 1 or bool(skipped)
            try:
                outputs = runs.outputs(chunk, skipped)
            except (IndexError, KeyError, RuntimeError, ValueError) as error:
                if not short:
                    raise
                runs.outputs(chunk[:1], ())  # an error of the trial itself is seen here
                raise _NotAlikeError(f"{len(chunk)} of them in one forward fail ({error})") from error
            if at == checked and short:
                runs.check(chunk, outputs)
            for trial, ran in zip(chunk, outputs, strict=True):
                found[trial.name, trial.at] = self._metric(seen, ran)
        return found

    def skipped(self, trials: Sequence[Trial]) -> tuple[str, ...]:
        """The layers that need not run before the first of the trials' patches."""
        sites = tuple(site for trial in trials for site in trial.sites)
        return self.recording.done_before(sites) if self.recording is not None and self.recipe.replay else ()

    def assigned(self, chunk: Sequence[Trial], skipped: tuple[str, ...]) -> ExitStack:
        """A block in which the chunk's patches act and the skipped layers do not run."""
        assigned: dict[str, list[tuple[int, Region]]] = {}
        for block, trial in enumerate(chunk):
            for site in trial.sites:
                assigned.setdefault(site, []).append((block, at_call(trial.region, site)))
        stack = ExitStack()
        self.state.assigned, self.state.calls, self.state.blocks = assigned, {}, len(chunk)
        stack.callback(setattr, self.state, "assigned", {})
        if self.recording is not None:
            stack.enter_context(self.recording.replaying(skipped, len(chunk), self.state.rows))
        stack.enter_context(self.alike())
        return stack

    def _metric(self, seen: TensorDictBase, outputs: dict[CacheKey, Tensor]) -> Tensor:
        shown = seen.copy()
        for key, value in outputs.items():
            shown.set(key, value)
        value = self.recipe.metric(shown)
        return value if isinstance(value, Tensor) else torch.tensor(value)

    def _result(self, found: _Found) -> TensorDictBase:
        grids: dict[CacheKey, Tensor] = {}
        for path in self.selection.paths:
            mine = {at: value for (name, at), value in found.items() if name == path}
            size = tuple(max(at[axis] for at in mine) + 1 for axis in range(len(self.over)))
            ordered = torch.stack([mine[at] for at in sorted(mine)])
            grids[path] = ordered.reshape((*size, *ordered.shape[1:]))
        joined = grids if self.stack_by is None else self.stack_by(grids)
        return TensorDict(dict(joined), batch_size=[])


def _same_columns(one: Region | None, other: Region | None) -> bool:
    """Whether two regions of one recipe are the same part of a value."""
    if one is None or other is None:
        return one is other
    first, second = one.positions, other.positions
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return not isinstance(first, Tensor) and not isinstance(second, Tensor)


class _NotAlikeError(Exception):
    """A trial gives something else alone than among others."""


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of the model with some trials' patches."""

    sweep: Sweep
    base: TensorDictBase
    forward: Forward
    in_keys: list[CacheKey]
    out_keys: list[CacheKey]
    plain: TensorDictBase
    """What the run without a patch gave."""

    def outputs(self, chunk: Sequence[Trial], skipped: tuple[str, ...]) -> list[dict[CacheKey, Tensor]]:
        """The model's outputs in each trial of a chunk."""
        state = self.sweep.state
        single = len(chunk) == 1
        inputs = self.base.copy() if single else repeated(self.base, self.in_keys, len(chunk), state.rows)
        with self.sweep.assigned(chunk, skipped):
            self.forward(inputs)
        keys = [key for key in self.out_keys if key != "_"]
        return [{key: block_of(inputs.get(key), at, state, str(key)) for key in keys} for at in range(len(chunk))]

    def check(self, chunk: Sequence[Trial], outputs: list[dict[CacheKey, Tensor]]) -> None:
        """Run one of the trials again, alone and in full: the first that changes much, with most layers after it."""
        changes = [max((_distance(ran[key], self.plain.get(key))[0] for key in ran), default=0.0) for ran in outputs]
        at = next(at for at, change in enumerate(changes) if change >= max(changes) / 10)
        (alone,) = self.outputs([chunk[at]], ())
        for key, value in alone.items():
            off, size = _distance(outputs[at][key], value)
            eps = max(torch.finfo(value.dtype).eps, torch.finfo(torch.float32).eps) if value.is_floating_point() else 0
            if not off <= size * min(_ROUNDINGS * eps, _MOST_ROUNDED):
                raise _NotAlikeError(
                    f"the trial at {chunk[at].name!r} gives another {key!r} alone than among {len(chunk)} in one "
                    f"forward (off by {off:.3g}, where values reach {size:.3g})"
                )


def _distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """By how much two tensors differ at most, and how large the second one is."""
    if one.shape != other.shape:
        return float("inf"), 0.0
    if one.numel() == 0 or torch.equal(one, other):
        return 0.0, 0.0
    wide = torch.complex128 if other.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    same = (one == other) | (one.isnan() & other.isnan())
    off = torch.where(same, 0.0, (one - other).abs()).max()
    size = other.abs()
    return float(off.nan_to_num(nan=float("inf"))), float(size[size.isfinite()].max()) if size.isfinite().any() else 0.0


@dataclass(frozen=True, slots=True)
class _ValueOf:
    """The source's value for one site of a sweep."""

    sweep: Sweep
    path: str

    def __call__(self, call: int) -> Tensor:
        return self.sweep.value_of(self.path, call)

    def __repr__(self) -> str:
        return f"source of {self.path!r}"
