"""A pass: one forward and one backward for everything that the methods open on a model ask for.

Points (the user's rows, their baselines, the steps of a path...) are stacked along the batch and cut into chunks. Where
something else looks on (other hooks on the model, a recipe that carries out calls itself), or rows cannot be stacked,
points run one after the other and the user's own rows last, so that what looks on keeps those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdcache.attribution.asks import Ask, Place, Point, Rows, View
from tdcache.attribution.taps import InputTap, OutputTap, Replacement, check_unchanged
from tdcache.attribution.targets import At, Target, row_values
from tdcache.errors import AttributionError, ContextError, listed
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.introspect import post_hooks, pre_hooks
from tdcache.selection import walk
from tdcache.types import CacheKey, Pick

__all__ = ["Runner", "Survey"]

Forward = Callable[[TensorDictBase], TensorDictBase]


class Runner:
    """Runs points for the length of one call of a hooked module.

    Args:
        model: the user's model.
        forward: runs it once.
        data: the user's TensorDict, without results.
        in_keys: what the model reads.
        out_keys: what it writes.
        modules: the modules by path.
        options: per path, which tensor and which call of it.
        chunk: how many points one forward may take; None for all.
        watched: whether something else looks on.
        survey: what is known of the model.
        create_graph: whether gradients are differentiable.
        snapshot: whether values are copied; None for where the model has modules that work in place.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        data: TensorDictBase,
        *,
        in_keys: Sequence[CacheKey],
        out_keys: Sequence[CacheKey],
        modules: dict[str, nn.Module],
        options: dict[str, tuple[Pick, int | None]],
        chunk: int | None,
        watched: bool,
        survey: Survey,
        create_graph: bool,
        snapshot: bool | None,
    ) -> None:
        self.model = model
        self.data = data
        self.in_keys, self.out_keys = list(in_keys), [key for key in out_keys if key != "_"]
        self.watched = watched
        self.forwards = self.backwards = 0
        self.fired: dict[Place, int] = {}
        """When each tapped place was seen first, as a number that rises through one forward."""
        self.final: TensorDictBase | None = None
        """The TensorDict after the forward of the user's own rows."""
        self._forward = forward
        self._survey = survey
        self._modules = modules
        self._options = options
        self._create_graph = create_graph
        self._snapshot = survey.inplace if snapshot is None else snapshot
        self._stacks = data.batch_dims > 0 and not watched and not survey.mixes_rows
        self._chunk = (chunk or 1 << 30) if self._stacks else 1
        self._base: Point | None = None
        self._last: Point | None = None
        self._calls: dict[str, int] = {}

    def run(self, asks: Iterable[Ask], base: Point) -> None:
        """Run the points that are asked for, each once, and hand the sinks their views."""
        by_label: dict[Any, list[Ask]] = {}
        for ask in asks:
            by_label.setdefault(ask.point.label, []).append(ask)
        groups = list(by_label.values())
        self._base = base
        if self._stacks and self.final is None and not any(self._gives_outputs(group[0].point) for group in groups):
            groups.append([_only_run(base)])  # so that the outputs need no forward of their own
        if self.watched:
            groups.sort(key=lambda group: group[0].point.label == base.label)
        batch: list[list[Ask]] = []
        size = 0
        for group in groups:
            if batch and size + group[0].point.copies > self._chunk:
                self._run_chunk(batch)
                batch, size = [], 0
            batch.append(group)
            size += group[0].point.copies
        if batch:
            self._run_chunk(batch)

    def finish(self, base: Point) -> TensorDictBase:
        """The TensorDict after a forward of the user's own rows; the last forward, where something looks on."""
        if self.final is None or (self.watched and self._last is not None and self._last.label != base.label):
            self._run_chunk([[_only_run(base)]])
        if self.final is None:
            raise ContextError("the model did not run")
        return self.final

    def _gives_outputs(self, point: Point) -> bool:
        """Whether the point's outputs are those of the user's rows; modifiers change no value, only the backward."""
        if point.modifiers and (self.watched or self._create_graph):
            return False
        return point.copies > 1 or not (point.inputs or point.replace)

    def ran_before(self, first: Place, second: Place) -> bool:
        """Whether ``first`` was seen before ``second``; both were asked for in the same point."""
        return self.fired[first] < self.fired[second]

    def _run_chunk(self, groups: list[list[Ask]]) -> None:
        asks = [ask for group in groups for ask in group]
        rows = self._rows([group[0].point for group in groups])
        data, inputs = self._stack([group[0].point for group in groups], asks)
        taps, handle = self._hook(groups, rows, asks)
        graph = any(ask.grads for ask in asks)
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            with handle:
                after = self._forward(data)
            self.forwards += 1
            self._check_outputs(after, asks)
            check_unchanged([tap for tap in taps.values() if tap.wants_value])
            for place, tap in taps.items():
                self.fired.setdefault(place, tap.when)
                self._calls[str(place.name)] = tap.calls
            values: dict[Place, Any] = {place: tap.chosen()[0] for place, tap in taps.items()}
            values |= {Place("key", key): tensor for key, tensor in inputs.items()}
            self._differentiate(groups, rows, after, values, taps, inputs)
        self._last = groups[-1][0].point

    def _rows(self, points: list[Point]) -> list[Rows]:
        batch = self.data.batch_size[0] if self.data.batch_dims else 1
        sizes = [point.copies * batch for point in points]
        total = sum(sizes)
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        return [Rows(start, start + size, total) for start, size in zip(starts, sizes, strict=True)]

    def _stack(self, points: list[Point], asks: list[Ask]) -> tuple[TensorDictBase, dict[CacheKey, Tensor]]:
        """The TensorDict of all points, and the inputs that need a gradient."""
        needed = {place.name for ask in asks for place in (*ask.grads, *ask.values) if place.kind == "key"}
        differentiated = {place.name for ask in asks for place in ask.grads if place.kind == "key"}
        differentiated |= set(self._floating()) if self.watched and any(ask.grads for ask in asks) else set()
        batch = self.data.batch_size
        copies = sum(point.copies for point in points)
        if len(points) == 1 and points[0].copies == 1:
            stacked = self.data.copy()
            stacked.update(dict(points[0].inputs))
        else:
            stacked = TensorDict(batch_size=[copies * batch[0], *batch[1:]], device=self.data.device)
            for key in self.data.keys(include_nested=True, leaves_only=True):
                parts = [self._part(point, key) for point in points]
                stacked.set(key, torch.cat(parts))
        inputs = {}
        for key in needed | differentiated:
            tensor = stacked.get(key)
            if key in differentiated and not (self._create_graph and tensor.requires_grad):
                tensor = (tensor.clone() if tensor.is_inference() else tensor).detach().requires_grad_()
                stacked.set(key, tensor)
            inputs[key] = tensor
        return stacked, inputs

    def _part(self, point: Point, key: Any) -> Tensor:
        given = point.inputs.get(key)
        if given is not None:
            return given
        value: Tensor = self.data.get(key)
        return value if point.copies == 1 else torch.cat([value] * point.copies)

    def _floating(self) -> list[CacheKey]:
        return [key for key in self.in_keys if self.data.get(key).is_floating_point()]

    def _hook(
        self, groups: list[list[Ask]], rows: list[Rows], asks: list[Ask]
    ) -> tuple[dict[Place, OutputTap | InputTap], MultiHookHandle]:
        handle = MultiHookHandle()
        alone = len(groups) == 1
        try:
            replaced: dict[str, list[tuple[Rows | None, Tensor]]] = {}
            for group, part in zip(groups, rows, strict=True):
                point = group[0].point
                for modifier in point.modifiers:
                    modifier.install(self.model, None if alone else part, handle)
                for path, tensor in point.replace.items():
                    replaced.setdefault(path, []).append((None if alone else part, tensor))
            for path, parts in replaced.items():
                pick, call = self._options.get(path, (None, None))
                swap = Replacement(path, pick, call if call is None or call >= 0 else self._calls[path] + call, parts)
                handle.add(attach(self._modules[path], swap.on_output, order=Order.EDIT))
            return self._tap(asks, handle), handle
        except BaseException:
            handle.remove()
            raise

    def _tap(self, asks: list[Ask], handle: MultiHookHandle) -> dict[Place, OutputTap | InputTap]:
        taps: dict[Place, OutputTap | InputTap] = {}
        for ask in asks:
            for place in (*ask.values, *ask.grads):
                if place.kind != "key" and place not in taps:
                    pick, call = self._options.get(str(place.name), (None, None))
                    tap = (OutputTap if place.kind == "out" else InputTap)(place, pick, call)
                    tap.snapshot, tap.live = self._snapshot, self._create_graph
                    taps[place] = tap
            for place in ask.values:
                if place in taps:
                    taps[place].wants_value = True
            for place in ask.grads:
                if place in taps:
                    taps[place].wants_grad = True
        for place, tap in taps.items():
            module = self._modules[str(place.name)]
            if isinstance(tap, OutputTap):
                handle.add(attach(module, tap.on_output, order=tap.order))
            else:
                handle.add(attach(module, tap.on_input, "fwd_pre_kwargs", order=tap.order))
        return taps

    def _check_outputs(self, after: Any, asks: list[Ask]) -> None:
        if not any(ask.target is not None for ask in asks):
            return
        if after is None or not any(after.get(key, None) is not None for key in self.out_keys):
            raise ContextError(
                "the forward was stopped early, before the model wrote its output, so there is no target to explain; "
                "leave stop_early=True out of the contexts that are open on this model"
            )

    def _differentiate(
        self,
        groups: list[list[Ask]],
        rows: list[Rows],
        after: TensorDictBase,
        values: dict[Place, Any],
        taps: dict[Place, OutputTap | InputTap],
        inputs: dict[CacheKey, Tensor],
    ) -> None:
        """Compute the targets, go backward once per target, and hand the sinks their views."""
        by_target: dict[Target | None, list[tuple[Ask, Rows, Tensor | None]]] = {}
        seeds: dict[Target, list[Tensor]] = {}
        whole: dict[Target, Tensor] = {}
        for group, part in zip(groups, rows, strict=True):
            point = group[0].point
            if point.label == getattr(self._base, "label", None) or (self.final is None and self._gives_outputs(point)):
                self.final = _rows_of(after, _first(part, point.copies))
            found = self._targets(group, after, part, whole, seeds)
            for ask in group:
                value = None if ask.target is None else found[ask.target]
                by_target.setdefault(ask.target, []).append((ask, part, value))
        left = len(seeds)
        for target, entries in by_target.items():
            grads: dict[Place, Tensor] = {}
            if target in seeds:
                left -= 1
                asks = [ask for ask, _, _ in entries]
                grads = self._gradients(seeds[target], asks, taps, inputs, keep=left > 0)
            for ask, part, value in entries:
                seen = value if value is None or self._create_graph else value.detach()
                ask.sink(View(part, values, grads, seen))

    def _targets(
        self,
        group: list[Ask],
        after: TensorDictBase,
        part: Rows,
        whole: dict[Target, Tensor],
        seeds: dict[Target, list[Tensor]],
    ) -> dict[Target, Tensor]:
        """The values of each target at one point; those that are differentiated also go to ``seeds``."""
        found: dict[Target, Tensor] = {}
        for target in dict.fromkeys(ask.target for ask in group if ask.target is not None):
            if isinstance(target, At) and target.is_one_for_all:  # all points at once: no slice of the TensorDict each
                if target not in whole:
                    whole[target] = row_values(target, after, after.batch_size)
                found[target] = part.part(whole[target], target)
            else:
                own = _rows_of(after, part)
                found[target] = row_values(target, own, own.batch_size)
            if any(ask.grads for ask in group if ask.target == target):
                seeds.setdefault(target, []).append(found[target])
        return found

    def _gradients(
        self,
        seeds: list[Tensor],
        asks: list[Ask],
        taps: dict[Place, OutputTap | InputTap],
        inputs: dict[CacheKey, Tensor],
        *,
        keep: bool,
    ) -> dict[Place, Tensor]:
        """One backward of the sum of ``seeds``: the gradient at every place that the asks want."""
        wanted = list(dict.fromkeys(place for ask in asks for place in ask.grads))
        lenient = {place for ask in asks if ask.unused for place in ask.grads}
        total = torch.stack([seed.sum(dtype=_accumulator(seed)) for seed in seeds]).sum()
        if not total.requires_grad:
            raise AttributionError(
                f"the target does not depend on {listed([str(place.name) for place in wanted])}: no gradient can reach "
                "it; is the output detached, or the site not used?"
            )
        keys = {Place("key", key): tensor for key, tensor in inputs.items()}
        edges: list[Any] = [keys[place] if place in keys else taps[place].chosen()[2] for place in wanted]
        others = [tensor for place, tensor in keys.items() if place not in wanted and tensor.requires_grad]
        self.backwards += 1
        for tap in taps.values():
            tap.grads.clear()
        found: Sequence[Tensor | None] = torch.autograd.grad(
            total,
            [*edges, *others],
            allow_unused=True,
            retain_graph=keep or self._create_graph,
            create_graph=self._create_graph,
        )
        arrived = dict(zip(wanted, found, strict=False))
        arrived |= {place: taps[place].grad() for place in wanted if place in taps}
        missing = [str(place.name) for place in wanted if arrived[place] is None and place not in lenient]
        if missing:
            raise AttributionError(
                f"no gradient reaches {listed(missing)}: the target does not depend on it, or it is detached "
                "or overwritten in place on the way; select other sites"
            )
        return {place: grad for place, grad in arrived.items() if grad is not None}


def _only_run(point: Point) -> Ask:
    return Ask(point=point, sink=lambda view: None)


def _rows_of(after: TensorDictBase, part: Rows) -> TensorDictBase:
    return after if part.total == part.stop - part.start else after[part.start : part.stop]


def _first(part: Rows, copies: int) -> Rows:
    return Rows(part.start, part.start + (part.stop - part.start) // copies, part.total)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


@dataclass(frozen=True, slots=True)
class Survey:
    """What a pass must know of a model, found in one walk over its modules.

    Args:
        watched: hooks are on it that are not row-wise modifiers of ours.
        mixes_rows: a batch norm is in training mode.
        inplace: some module says that it works in place.
    """

    watched: bool = False
    mixes_rows: bool = False
    inplace: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Survey:
        """Look at every module once."""
        found = [model, *(module for _, module in walk(model))]
        return cls(
            watched=any(
                _is_foreign(hook) for m in found for hooks in (post_hooks(m), pre_hooks(m)) for hook in hooks.values()
            ),
            mixes_rows=any(module.training and isinstance(module, _BATCH_NORMS) for module in found),
            inplace=any(module.__dict__.get("inplace") is True for module in found),
        )


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _is_foreign(hook: Any) -> bool:
    return not getattr(getattr(hook, "__self__", hook), "rowwise", False)
