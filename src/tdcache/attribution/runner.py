"""A pass: one forward and one backward for everything that the methods open on a model ask for.

Points (the user's rows, their baselines, the steps of a path...) are stacked along the batch and cut into chunks. Where
something else looks on (other hooks on the model, a recipe that carries out calls itself), or rows cannot be told
apart, points run one after the other and the user's own rows last, so that what looks on keeps those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any, Protocol, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdcache.attribution.backward import Targets, gradients
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, Point, PointRows, View, giving_own_outputs
from tdcache.attribution.rows import RowAxes, UnstackableError
from tdcache.attribution.survey import Survey
from tdcache.attribution.taps import Replacement, SiteTap, check_unchanged
from tdcache.attribution.targets import Target, Unit
from tdcache.contexts.cached import all_paused, capturing_contexts
from tdcache.errors import ContextError
from tdcache.function_calls.stand_in import resolve_site
from tdcache.hooks import MultiHookHandle, Order, attach, attach_ports
from tdcache.hooks.attach import AttachedElsewhere
from tdcache.named_places import Names
from tdcache.place_modules import place_at
from tdcache.selection import Selection
from tdcache.types import CacheKey

__all__ = ["PassOptions", "Runner"]

_MANY = 16
"""Above this many points those without a backward get a forward of their own."""

Forward = Callable[[TensorDictBase], TensorDictBase]

_GRADS = attrgetter("grads")


class PassOptions(Protocol):
    """The options of a method that concern the pass; see :class:`~tdcache.attribution.base.Attribution`."""

    create_graph: bool
    chunk: int | None
    snapshot: bool | None
    names: Names | None


class Runner:
    """Runs points for the length of one call of a hooked module.

    Args:
        model: the user's model.
        forward: runs it once.
        data: the user's TensorDict, without results.
        in_keys: what the model reads.
        out_keys: what it writes.
        watched: whether something else looks on.
        survey: what is known of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        data: TensorDictBase,
        *,
        in_keys: Sequence[CacheKey],
        out_keys: Sequence[CacheKey],
        watched: bool,
        survey: Survey,
    ) -> None:
        self.model = model
        self.data = data
        self.in_keys, self.out_keys = list(in_keys), [key for key in out_keys if key != "_"]
        self.watched = watched
        self.fired: dict[Place, int] = {}
        """When each tapped place was seen first, as a number that rises through one forward."""
        self.targets: dict[Target, Target] = {}
        """One object for all methods with equal targets: within a pass targets are told apart by identity."""
        self.final: TensorDictBase | None = None
        """The TensorDict after the forward of the user's own rows."""
        self._forward = forward
        self._survey = survey
        self._modules: dict[str, nn.Module] = {}
        self._tables: list[Names] = []
        self.create_graph = False
        """Whether gradients are differentiable."""
        self._snapshot: bool | None = None
        self._stacks = data.batch_dims > 0 and not watched and not survey.statistics
        self._chunk = 1 << 30 if self._stacks else 1
        self._base: Point | None = None
        self._giving: set[Any] = set()
        """The labels of the points whose outputs are those of the user's rows."""
        self._last: Point | None = None
        """The point of the last forward; None if that was a probe."""
        self._shown = False
        """Whether a forward of the user's rows was shown to those that capture."""
        self._calls: dict[Place, int] = {}

    def add(self, method: PassOptions, selections: Iterable[Selection]) -> None:
        """Take the options of a method, and the modules that it selected, into account."""
        self.create_graph |= method.create_graph
        if method.chunk is not None:
            self._chunk = min(self._chunk, method.chunk)
        if method.snapshot is not None:
            self._snapshot = self._snapshot or method.snapshot
        if method.names is not None:
            self._tables.append(method.names)
        for selection in selections:
            self._modules.update((path, module) for path, module, _ in selection)

    def run(self, asks: Iterable[Ask], base: Point) -> None:
        """Run the points that are asked for, each once, and hand the sinks their views."""
        by_label: dict[Any, list[Ask]] = {}
        for ask in asks:
            by_label.setdefault(ask.point.label, []).append(ask)
        groups = list(by_label.values())
        self._base = base
        if len(groups) == 1 and groups[0][0].point is base:
            self._run_chunk(groups)
        else:
            self._run_points(groups, base)

    def _run_points(self, groups: list[list[Ask]], base: Point) -> None:
        modified = not (self.watched or self.create_graph)
        self._giving = giving_own_outputs([group[0].point for group in groups], modified=modified)
        given = self._giving or any(group[0].base_follows for group in groups)
        if self._stacks and self.final is None and not given:
            groups.append([_only_run(base)])  # so that the outputs need no forward of their own
        if self.watched:
            groups.sort(key=lambda group: group[0].point.label == base.label)
        else:  # a stable order, so that those without a backward come last
            groups.sort(key=lambda group: not any(ask.grads for ask in group))
        left = sum(any(ask.grads for ask in group) for group in groups)
        while groups:
            size = self._chunk
            if min(size, len(groups)) > _MANY and left:  # a graph for those that need none would cost more than a call
                size = min(size, left)
            chunk, groups = groups[:size], groups[size:]
            left = max(0, left - size)
            if len(chunk) == 1:
                self._run_chunk(chunk)
                continue
            try:
                self._run_chunk(chunk)
            except UnstackableError:
                self._stacks, self._chunk, left = False, 1, 0
                groups = [*chunk, *groups]

    def finish(self, base: Point) -> TensorDictBase:
        """The TensorDict after a forward of the user's own rows; the last forward, where something looks on."""
        self._base = base
        if self.final is None or (self.watched and (self._last is None or self._last.label != base.label)):
            self._run_chunk([[_only_run(base)]])
        return cast(TensorDictBase, self.final)  # the user's rows have run

    def ran_before(self, first: Place, second: Place) -> bool:
        """Whether ``first`` was seen before ``second``; both were asked for in the same point."""
        return self.fired[first] < self.fired[second]

    def row_axis(self, place: Place, value: Tensor) -> int | None:
        """The axis of a place's value that holds the user's rows; None where it has none, or none can be told."""
        if not self.data.batch_dims:
            return None
        if place.kind == "key":
            return 0
        total = self.data.batch_size[0]
        try:
            return self._axes([place], total).at(place, value.shape, total, str(place.name))
        except UnstackableError:
            return None

    def _is_final(self, point: Point) -> bool:
        if self._base is not None and point.label == self._base.label:
            return True
        return self.final is None and point.label in self._giving

    def _run_chunk(self, groups: list[list[Ask]]) -> None:
        asks = [ask for group in groups for ask in group]
        points = [group[0].point for group in groups]
        rows = self._rows(points, asks)
        data, inputs = self._stack(points, asks)
        taps, handle = self._hook(points, rows, asks)
        graph = self.create_graph or any(map(_GRADS, asks))
        shown = not self._shown and self._is_final(points[0])
        with torch.set_grad_enabled(graph), self._survey.unchanged(kept=shown and self.final is None):
            with handle, self._unseen(shown):
                after = self._forward(data)
            self._check_outputs(after, asks)
            values: dict[Place, Any] = self._seen(taps, asks) if taps else {}
            values.update(inputs)
            self._differentiate(groups, rows, Targets(after, taps), values, inputs)
        self._shown |= shown
        self._last = points[-1]

    def _seen(self, taps: dict[Place, SiteTap], asks: list[Ask]) -> dict[Place, Any]:
        """What the taps noted; those of modules that did not run, and need not, are dropped."""
        check_unchanged(taps.values())
        needed = {place for ask in asks for place in _read_by(ask.target)}
        needed.update(place for ask in asks if not ask.unused for place in (*ask.values, *ask.grads))
        for place, tap in list(taps.items()):
            self.fired.setdefault(place, tap.when)
            self._calls[place] = tap.calls
            if not tap.calls and place not in needed:
                del taps[place]
        return {place: tap.chosen().value for place, tap in taps.items()}

    def _rows(self, points: list[Point], asks: list[Ask]) -> list[PointRows | None]:
        if len(points) == 1:
            return [None]
        batch = self.data.batch_size[0]
        total = batch * len(points)
        places = {place for ask in asks for place in (*ask.values, *ask.grads, *_read_by(ask.target))}
        places |= {place for point in points for place in point.replace}
        cut = any(place.kind != "key" for place in places) or any(point.modifiers for point in points)
        axes = self._axes(places, total) if cut else None
        return [PointRows(at * batch, (at + 1) * batch, total, axes) for at in range(len(points))]

    def _axes(self, places: Iterable[Place], total: int) -> RowAxes:
        hooked = {place: self.module_at(place) for place in places if place.kind != "key"}
        with self._survey.unchanged():
            return RowAxes.of(self.model, self._probe, self.data, hooked, total)

    def _probe(self, data: TensorDictBase) -> TensorDictBase:
        self._last = None
        with self._unseen():
            return self._forward(data)

    def _unseen(self, shown: bool = False) -> AbstractContextManager[Any]:
        """Pause what captures: reducers over several forwards would count rows that are not the user's."""
        return nullcontext() if shown or not self.watched else all_paused(capturing_contexts(self.model))

    def _stack(self, points: list[Point], asks: list[Ask]) -> tuple[TensorDictBase, dict[Place, Tensor]]:
        """The TensorDict of all points, and the inputs whose values or gradients are wanted."""
        needed: dict[Place, bool] = {}
        for ask in asks:
            needed.update({place: True for place in ask.grads if place.kind == "key"})
            for place in ask.values:
                if place.kind == "key":
                    needed.setdefault(place, False)
        if self.watched and any(map(_GRADS, asks)):
            needed.update({Place("key", key): True for key in self.in_keys if self.data.get(key).is_floating_point()})
        if len(points) == 1:
            stacked = self.data.copy()
            if points[0].inputs:
                stacked.update(dict(points[0].inputs))
        else:
            batch = self.data.batch_size
            stacked = TensorDict(batch_size=[len(points) * batch[0], *batch[1:]], device=self.data.device)
            for name, value in self.data.items(include_nested=True, leaves_only=True):
                parts: list[Any] = [point.inputs.get(name, value) for point in points]
                stacked.set(name, torch.cat(parts))
        inputs: dict[Place, Tensor] = {}
        for place, differentiated in needed.items():
            tensor: Tensor = stacked.get(place.name)
            if differentiated and not (self.create_graph and tensor.requires_grad):
                tensor = tensor.detach().requires_grad_()
                stacked.set(place.name, tensor)
            inputs[place] = tensor
        return stacked, inputs

    def _hook(
        self, points: list[Point], rows: list[PointRows | None], asks: list[Ask]
    ) -> tuple[dict[Place, SiteTap], MultiHookHandle]:
        handle = MultiHookHandle()
        taps = self._taps(asks, rows[0])
        if not taps and all(not (point.modifiers or point.replace) for point in points):
            return taps, handle
        with handle.installing():
            replaced: dict[Place, list[tuple[PointRows | None, Tensor]]] = {}
            for point, part in zip(points, rows, strict=True):
                for modifier in point.modifiers:
                    modifier.install(self.model, part, handle)
                for place, tensor in point.replace.items():
                    replaced.setdefault(place, []).append((part, tensor))
            swaps = {place: Replacement(place, self._call(place), parts) for place, parts in replaced.items()}
            self._attach(swaps, handle, Order.EDIT)
            inside = {place: tap for place, tap in taps.items() if self._is_no_module(place)}
            self._attach({place: tap for place, tap in taps.items() if place not in inside}, handle, SiteTap.order)
            for place, tap in inside.items():
                handle.add(attach(self.module_at(place), tap.on_output, "fwd_kwargs", order=SiteTap.order))
        return taps, handle

    def _is_no_module(self, place: Place) -> bool:
        """Whether a place is the result of a call inside a forward."""
        return place.kind == "out" and isinstance(self.module_at(place), AttachedElsewhere)

    def _call(self, place: Place) -> int | None:
        return place.call if place.call is None or place.call >= 0 else self._calls[place] + place.call

    def _attach(self, hooks: Mapping[Place, Any], handle: MultiHookHandle, order: int) -> None:
        for kind, direction in (("out", "fwd"), ("in", "fwd_pre_kwargs")):
            found = [(self.module_at(place), hook) for place, hook in hooks.items() if place.kind == kind]
            if found:
                attach_ports(found, direction, handle, order)  # type: ignore[arg-type]

    def module_at(self, place: Place) -> nn.Module:
        """The module that is hooked for a place."""
        path = str(place.name)
        if path not in self._modules:
            table = next((each for each in self._tables if path in each), None)
            found = resolve_site(self.model, path) if table is None else place_at(table, self.model, path)
            self._modules[path] = found[1]
        return self._modules[path]

    def _taps(self, asks: list[Ask], rows: PointRows | None) -> dict[Place, SiteTap]:
        taps: dict[Place, SiteTap] = {}
        snapshot = self._survey.inplace if self._snapshot is None else self._snapshot
        for ask in asks:
            wanted = (("wants_value", ask.values), ("wants_grad", ask.grads), ("is_target", _read_by(ask.target)))
            for what, places in wanted:
                for place in places:
                    if place.kind != "key":
                        if place not in taps:
                            taps[place] = SiteTap(place, rows, snapshot=snapshot, live=self.create_graph)
                        setattr(taps[place], what, True)
        return taps

    def _check_outputs(self, after: Any, asks: list[Ask]) -> None:
        if all(ask.target is None or isinstance(ask.target, Unit) for ask in asks):
            return
        if after is None or not any(after.get(key, None) is not None for key in self.out_keys):
            raise ContextError(
                "the forward was stopped early, before the model wrote its output, so there is no target to explain; "
                "leave stop_early=True out of the contexts that are open on this model"
            )

    def _differentiate(
        self,
        groups: list[list[Ask]],
        rows: list[PointRows | None],
        targets: Targets,
        values: dict[Place, Any],
        inputs: dict[Place, Tensor],
    ) -> None:
        """Compute the targets, go backward once per target, and hand the sinks their views."""
        by_target: dict[int, list[tuple[Ask, PointRows | None]]] = {}
        for group, part in zip(groups, rows, strict=True):
            if self._is_final(group[0].point):
                self.final = targets.outputs(part)
            for ask in group:
                by_target.setdefault(id(ask.target), []).append((ask, part))
        backwards = []
        for number, entries in by_target.items():  # all of them first: an error comes before any sink has seen a view
            targets.compute(entries[0][0].target, entries)
            if any(ask.grads for ask, _ in entries):
                backwards.append(number)
        for number, entries in by_target.items():
            grads: dict[Place, Tensor] = {}
            if number in backwards:
                asks = [ask for ask, _ in entries if ask.grads]
                keep = number != backwards[-1] or self.create_graph
                grads = gradients(targets, asks[0].target, asks, inputs, keep=keep, graph=self.create_graph)
            for ask, part in entries:
                seen = targets.found.get((number, part))
                ask.sink(View(part, values, grads, seen if seen is None or self.create_graph else seen.detach()))


def _only_run(point: Point) -> Ask:
    return Ask(point=point, sink=lambda view: None)


def _read_by(target: Target | None) -> tuple[Place, ...]:
    return (target.place,) if isinstance(target, Unit) else ()
