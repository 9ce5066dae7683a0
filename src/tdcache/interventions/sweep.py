"""Sweeps: each site (or site x position, site x head) patched alone, many of them in one forward.

Copies of the batch run side by side, each with one patch. A copy differs from the unpatched run only behind its patch,
so the interventions are ordered by depth, and the layers before the first patch of a chunk are replayed, not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdcache.cache.stacking import StackBy
from tdcache.errors import ContextError, EditError
from tdcache.hooks import MultiHookHandle, attach, port_at
from tdcache.hooks.values import check_fits
from tdcache.interventions.base import with_inputs_of
from tdcache.interventions.edits import Edit, EditTap, ReadTap
from tdcache.interventions.memory import Memory
from tdcache.interventions.regions import Region
from tdcache.interventions.replay import Recording, expanded, instead_of_forward
from tdcache.interventions.trials import SweepOver, SweepRecipe, Trial, chunks_of, trials_at, windows_of
from tdcache.selection import Selection
from tdcache.types import CacheKey

__all__ = ["PatchBlocks", "Sweep", "SweepState", "block_of", "repeated", "rows_of"]

Forward = Callable[[TensorDictBase], TensorDictBase]


@dataclass(slots=True)
class SweepState:
    """What the taps of a sweep look at while the chunks run."""

    rows: int = 0
    blocks: int = 1
    assigned: dict[str, list[tuple[int, Region]]] = field(default_factory=dict)
    """By site: which blocks of the batch are patched there, and where."""
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PatchBlocks:
    """Patches, at one site, the blocks of the batch that are due there."""

    path: str
    state: SweepState
    value: Callable[[int], Tensor]
    patch_fn: Callable[..., Tensor | None] | None

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The value with every due block patched; None where there is none."""
        due = self.state.assigned.get(self.path)
        if not due:
            return None
        call = self.state.calls.get(self.path, 0)
        self.state.calls[self.path] = call + 1
        source, new = self.value(call), full.clone()
        for block, region in due:
            mine = block_of(new, block, self.state, self.path)
            if source.shape != mine.shape or source.dtype != mine.dtype or source.device != mine.device:
                raise _misfit(self.path, source, mine)
            given = region.take(source, self.path)
            if self.patch_fn is not None:
                old, given = region.take(mine, self.path).clone(), given.clone()
                made = self.patch_fn(module_key=self.path, output=old, output_to_patch=given)
                given = given if made is None else made
                check_fits(given, old, self.path)
            region.write(mine, given, self.path)
        return new


def block_of(stacked: Tensor, block: int, state: SweepState, what: str) -> Tensor:
    """The rows of one intervention among those that run side by side.

    Raises:
        EditError: the tensor has no row for each.
    """
    if state.blocks == 1:
        return stacked
    if stacked.ndim == 0 or stacked.shape[0] != state.blocks * state.rows:
        raise EditError(
            f"{what!r} has shape {tuple(stacked.shape)}, not {state.blocks} x {state.rows} rows along "
            "its first axis, so "
            "interventions cannot be stacked along the batch; run them one by one with chunk=1"
        )
    return stacked[block * state.rows : (block + 1) * state.rows]


def _misfit(path: str, source: Tensor, value: Tensor) -> EditError:
    return EditError(
        f"the source at {path!r} does not fit:\n"
        f"  there: shape {tuple(value.shape)}, {value.dtype}, {value.device}\n"
        f"  source: shape {tuple(source.shape)}, {source.dtype}, {source.device}\n"
        "a sweep patches rows of the same shape; run the source on as many rows of the same length"
    )


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
        self.window = 1
        self.stack_by = None if recipe.stack_by is None else StackBy(recipe.stack_by, selection)
        self._given: dict[str, Any] = {}

    def attach(self, model: nn.Module) -> MultiHookHandle:
        """Put the taps on; they do nothing until :meth:`run`."""
        self.model = model
        handle = MultiHookHandle()
        with handle.installing():
            paths = () if self.recipe.source is None else self.selection.paths
            given = {path: self.recipe.value_at(path) for path in paths}
            self._given = {path: value for path, value in given.items() if value is not None}
            edits: list[tuple[Any, Edit]] = [
                (site, PatchBlocks(site.path, self.state, _ValueOf(self, site.path), self.recipe.patch_fn))
                for site in self.selection
            ]
            for site, edit in edits:
                self._attach_one(handle, site, edit)
        return handle

    def _attach_one(self, handle: MultiHookHandle, site: Any, edit: Edit) -> None:
        port = port_at(site.path, self.recipe.direction, self.recipe.pick)
        for tap in (EditTap(port, edit, region=Region()), ReadTap(port, self._read)):
            handle.add(attach(site.module, tap.on_call, port.direction, order=tap.order))

    def _read(self, path: str, value: Tensor) -> None:
        self.memory.record(path, value)
        if self.recording is not None:
            self.recording.reached(path)

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
        self.recording = None
        try:
            if self._given:
                return self.run_on(data, data, forward, in_keys, out_keys)
            second = with_inputs_of(data, self.recipe.patch_key, in_keys, self.recipe)
            with self.memory.recording():
                forward(data.copy())
            return self.run_on(data, second, forward, in_keys, out_keys)
        finally:
            self.recording, self.memory.values = None, {}

    def run_on(
        self,
        data: TensorDictBase,
        base: TensorDictBase,
        forward: Forward,
        in_keys: list[CacheKey],
        out_keys: list[CacheKey],
    ) -> TensorDictBase:
        """Run every trial on copies of the inputs in ``base``; the metric sees them beside the entries of ``data``."""
        self.state.rows = rows = rows_of(base, in_keys)
        self._record(base, forward)
        trials = [
            trial
            for path, sites in windows_of(self.selection.paths, self.window)
            for trial in trials_at(self.recipe, self.over, path, sites, self.value_of(path, 0).shape)
        ]
        depth_of = {trial.sites: len(self._skipped([trial])) for trial in trials}
        trials.sort(key=lambda trial: depth_of[trial.sites])
        depths = [depth_of[trial.sites] for trial in trials]
        found: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        seen = data.copy()
        for key in in_keys:
            seen.set(key, base.get(key))
        for chunk in chunks_of(trials, depths, self.recipe.chunk):
            inputs = base.copy() if len(chunk) == 1 else repeated(base, in_keys, len(chunk), rows)
            with self._assigned(chunk):
                forward(inputs)
            for block, trial in enumerate(chunk):
                found[trial.name, trial.at] = self._measure(seen.copy(), inputs, out_keys, block)
        return self._result(found)

    def _record(self, base: TensorDictBase, forward: Forward) -> None:
        """Run once without a patch, to know what ran before what, and what it gave."""
        self.recording = recording = Recording(self._needed_model())
        with recording.attach():
            forward(base.copy())
        silent = [path for path in self.selection.paths if path not in recording.before]
        if silent:
            raise EditError(
                f"{len(silent)} of {len(self.selection)} sites did not run, so they cannot be patched: {silent[:5]!r}"
            )

    def _needed_model(self) -> nn.Module:
        if self.model is None:
            raise ContextError("this sweep is not attached to a model")
        return self.model

    def _skipped(self, trials: Sequence[Trial]) -> tuple[str, ...]:
        sites = tuple(site for trial in trials for site in trial.sites)
        return self.recording.done_before(sites) if self.recording is not None and self.recipe.replay else ()

    def _assigned(self, chunk: Sequence[Trial]) -> ExitStack:
        assigned: dict[str, list[tuple[int, Region]]] = {}
        for block, trial in enumerate(chunk):
            for site in trial.sites:
                assigned.setdefault(site, []).append((block, trial.region))
        stack = ExitStack()
        self.state.assigned, self.state.calls, self.state.blocks = assigned, {}, len(chunk)
        stack.callback(setattr, self.state, "assigned", {})
        if self.recording is not None:
            stubs = self.recording.stubs(self._skipped(chunk), len(chunk), self.state.rows)
            stack.enter_context(instead_of_forward(stubs))
        return stack

    def _measure(self, seen: TensorDictBase, ran: TensorDictBase, out_keys: list[CacheKey], block: int) -> Tensor:
        for key in out_keys:
            if key != "_":
                seen.set(key, block_of(ran.get(key), block, self.state, str(key)))
        value = self.recipe.metric(seen)
        return value if isinstance(value, Tensor) else torch.tensor(value)

    def _result(self, found: dict[tuple[str, tuple[int, ...]], Tensor]) -> TensorDictBase:
        grids: dict[CacheKey, Tensor] = {}
        for path in self.selection.paths:
            mine = {at: value for (name, at), value in found.items() if name == path}
            size = tuple(max(at[axis] for at in mine) + 1 for axis in range(len(self.over)))
            ordered = torch.stack([mine[at] for at in sorted(mine)])
            grids[path] = ordered.reshape((*size, *ordered.shape[1:]))
        joined = grids if self.stack_by is None else self.stack_by(grids)
        return TensorDict(dict(joined), batch_size=[])


@dataclass(frozen=True, slots=True)
class _ValueOf:
    """The source's value for one site of a sweep."""

    sweep: Sweep
    path: str

    def __call__(self, call: int) -> Tensor:
        return self.sweep.value_of(self.path, call)

    def __repr__(self) -> str:
        return f"source of {self.path!r}"


def rows_of(data: TensorDictBase, in_keys: list[CacheKey]) -> int:
    """How many rows a batch has: its batch size, or the first axis of the model's first input."""
    if data.batch_size:
        return int(data.batch_size[0])
    first: Any = data.get(in_keys[0])
    return int(first.shape[0]) if first.ndim else 1


def repeated(data: TensorDictBase, keys: list[CacheKey], blocks: int, rows: int) -> TensorDictBase:
    """Some entries of a batch, as often along the batch as there are blocks."""
    inputs = TensorDict(batch_size=[], device=data.device)
    for key in keys:
        value = data.get(key, None)
        if value is not None:
            inputs.set(key, expanded(value, blocks, rows) if isinstance(value, Tensor) else value)
    return inputs
