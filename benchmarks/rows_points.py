"""Hook points: idle, and in a run with a cache, beside TransformerLens and a bare ``nn.Identity``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import peers
import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, measure_makers, overhead_table, rounds_note, settle_process
from tensordict import TensorDict
from torch import Tensor, nn
from zoo import WIDTH, Chain, tiny_input

from tdcache.points import HookedRootModule, HookPoint

NO_HOOK = "no hook"  # nn.Identity in place of every point
OURS_IDLE, LENS_IDLE = "tdcache, idle HookPoints", "TransformerLens, idle HookPoints"
ALIASES = "tdcache, caching hooks that stay, hold='detached'"  # what TransformerLens' keep as well: no copies
STAYING = "TransformerLens, caching hooks that stay"
OURS, LENS = "tdcache, run_with_cache", "TransformerLens, run_with_cache"


class _Plain(nn.Module):
    def setup(self) -> None:
        """Nothing to name."""


def chain_on(root: type[nn.Module], point: Callable[[], nn.Module], count: int, *, loss: bool = False) -> Any:
    """The chain with a point behind every module, of one library's classes; with ``loss`` it returns a scalar."""

    class PointChain(root):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.layers = Chain(count).layers
            self.points = nn.ModuleList(point() for _ in range(count))
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            for layer, each in zip(self.layers, self.points, strict=True):
                x = each(layer(x))
            return x.sum() if loss else x

    return PointChain()


def _ours(count: int, **options: Any) -> Any:
    return chain_on(HookedRootModule, HookPoint, count, **options)


def _lens(count: int, **options: Any) -> Any:
    from transformer_lens import HookedRootModule as Root
    from transformer_lens.hook_points import HookPoint as Point

    return chain_on(Root, Point, count, **options)


def _identity(stack: ExitStack, count: int, **options: Any) -> Call:
    return _called(chain_on(_Plain, nn.Identity, count, **options), options)


def _idle(stack: ExitStack, count: int, make: Callable[..., Any], **options: Any) -> Call:
    return _called(make(count, **options), options)


def _called(model: nn.Module, options: Mapping[str, Any]) -> Call:
    x = tiny_input()
    return (lambda: peers.backward(model(x))) if options.get("loss") else partial(model, x)


def _by_hand(stack: ExitStack, count: int) -> Call:
    model, x = chain_on(_Plain, nn.Identity, count), tiny_input()
    call = partial(peers.one_shot_by_hand, model, r"points\.\d+", partial(model, x))
    return peers.checked(call, count, TensorDict.keys)


def _cached(stack: ExitStack, count: int, make: Callable[..., Any], names: Any = None, **options: Any) -> Call:
    model, x = make(count), tiny_input()
    return _kept(lambda: model.run_with_cache(x, names_filter=names, **options)[1], count)


def _with_gradients(stack: ExitStack, count: int, make: Callable[..., Any]) -> Call:
    model, x = make(count, loss=True), tiny_input()
    return _kept(lambda: model.run_with_cache(x, incl_bwd=True)[1], 2 * count)


def _standing(stack: ExitStack, count: int, make: Callable[..., Any], **options: Any) -> Call:
    model, x = make(count), tiny_input()
    kept = model.add_caching_hooks(**options)
    peers.checked(lambda: (model(x), kept)[1], count, lambda found: found.keys())
    return partial(model, x)


def _named(stack: ExitStack, count: int, make: Callable[..., Any]) -> Call:
    return _cached(stack, count, make, [f"points.{index}" for index in range(count)])


def _kept(call: Call, count: int) -> Call:
    return peers.checked(call, count, lambda found: found.keys())


IDLE: Mapping[str, Maker] = {
    NO_HOOK: _identity,
    OURS_IDLE: partial(_idle, make=_ours),
    LENS_IDLE: partial(_idle, make=_lens),
}
CACHED: Mapping[str, Maker] = {
    **IDLE,
    "hand-written": _by_hand,
    OURS: partial(_cached, make=_ours),
    "tdcache, by regex": partial(_cached, make=_ours, names=r"points\.\d+"),
    "tdcache, by a list of names": partial(_named, make=_ours),
    "tdcache, hold='snapshot'": partial(_cached, make=_ours, hold="snapshot"),
    "tdcache, pos_slice": partial(_cached, make=_ours, pos_slice=0),
    "tdcache, caching hooks that stay": partial(_standing, make=_ours),
    ALIASES: partial(_standing, make=_ours, hold="detached"),
    LENS: partial(_cached, make=_lens),
    "TransformerLens, by a list of names": partial(_named, make=_lens),
    "TransformerLens, pos_slice": partial(_cached, make=_lens, pos_slice=0),
    STAYING: partial(_standing, make=_lens),
}
GRADIENTS: Mapping[str, Maker] = {
    NO_HOOK: partial(_identity, loss=True),
    OURS_IDLE: partial(_idle, make=_ours, loss=True),
    LENS_IDLE: partial(_idle, make=_lens, loss=True),
    OURS: partial(_with_gradients, make=_ours),
    LENS: partial(_with_gradients, make=_lens),
}


def points(plan: Plan) -> list[Table]:
    """Idle points, runs with a cache, and runs with a cache of gradients."""
    settle_process()
    skipped: dict[str, str] = {}
    with torch.no_grad():
        idle = _by_size(IDLE, plan, skipped)
        cached = _by_size(CACHED, plan, skipped)
    gradients = _by_size(GRADIENTS, plan, skipped)
    bases = {name: LENS_IDLE if name.startswith("TransformerLens") else OURS_IDLE for name in CACHED}
    bases |= {NO_HOOK: NO_HOOK, "hand-written": NO_HOOK}
    table = overhead_table("Hook points: run_with_cache (no_grad)", cached, "hand-written", bases, skipped)
    table.goals = _goals("run_with_cache", cached)
    second = overhead_table("Hook points: run_with_cache, incl_bwd", gradients, OURS, bases, {})
    table.goals += [
        Goal(f"{ALIASES} over TransformerLens', {size} points", found.median, 1)
        for size, samples in cached.items()
        if STAYING in samples
        for found in (samples.ratio(ALIASES, STAYING, OURS_IDLE, LENS_IDLE),)
    ]
    second.goals = _goals("run_with_cache, incl_bwd", gradients)
    return [_idle_table(idle), table, second]


def _by_size(makers: Mapping[str, Maker], plan: Plan, skipped: dict[str, str]) -> dict[int, Samples]:
    return {
        size: measure_makers({name: partial(maker, count=size) for name, maker in makers.items()}, plan, skipped)
        for size in plan.sizes
    }


def _idle_table(by_size: Mapping[int, Samples]) -> Table:
    head = ["variant", *(f"{size}: % over nn.Identity" for size in by_size)]
    table = Table("Hook points without hooks", head, notes=[f"width {WIDTH}", rounds_note(by_size.values())])
    for name in (OURS_IDLE, LENS_IDLE):
        cells = [samples.share(name, NO_HOOK).show(1) if name in samples else "-" for samples in by_size.values()]
        table.rows.append([name, *cells])
    table.goals = [
        Goal(f"idle HookPoints over nn.Identity, {size}", samples.share(OURS_IDLE, NO_HOOK).median, 2, "%")
        for size, samples in by_size.items()
    ]
    return table


def _goals(what: str, by_size: Mapping[int, Samples]) -> list[Goal]:
    return [
        Goal(
            f"TransformerLens' {what} over ours, {size} points",
            samples.ratio(LENS, OURS, LENS_IDLE, OURS_IDLE).median,
            2,
            at_least=True,
        )
        for size, samples in by_size.items()
        if LENS in samples
    ]
