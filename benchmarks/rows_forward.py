"""Forward capture: with the context left open, and in one shot."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import peers
import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, measure_makers, overhead_table, settle_process
from tensordict import TensorDict
from zoo import CHAIN_PATTERN, WIDTH, Chain, hooked_chain, tiny_input

from tdcache import ActivationCaching, cache_activations

TL_IDLE = "TransformerLens, idle HookPoints"


# Capture, the context left open.


def _no_hook(stack: ExitStack, count: int) -> Call:
    return partial(Chain(count), tiny_input())


def _floor(stack: ExitStack, count: int, *, detach: bool = False) -> Call:
    model, x = Chain(count), tiny_input()
    take = torch.Tensor.detach if detach else None
    kept = peers.hook_by_hand(stack, peers.matching(model, CHAIN_PATTERN), take)
    peers.checked(lambda: (model(x), kept)[1], count)
    return partial(model, x)


def _empty(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    for module in model.layers:
        stack.callback(module.register_forward_hook(lambda module, args, output: None).remove)
    return partial(model, tiny_input())


def _floor_td(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    kept = peers.hook_by_hand(stack, peers.matching(model, CHAIN_PATTERN))

    def call() -> TensorDict:
        model(x)
        return TensorDict(kept, batch_size=[])

    return peers.checked(call, count, TensorDict.keys)


def _tdcache_model(stack: ExitStack, count: int, **options: object) -> Call:
    model, x = Chain(count), tiny_input()
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN, **options).prepare(model))
    peers.checked(lambda: (model(x), hooked.cache)[1], count, TensorDict.keys)
    return partial(model, x)


def _tdcache_hooked(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN).prepare(model))

    def call() -> TensorDict:
        hooked(x)
        return hooked.cache

    return peers.checked(call, count, TensorDict.keys)


def _tdcache_td(stack: ExitStack, count: int) -> Call:
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN).prepare(Chain(count)))
    data = TensorDict({"input": tiny_input()}, batch_size=[])
    peers.checked(lambda: (hooked(data), hooked.cache)[1], count, TensorDict.keys)
    return partial(hooked, data)


def _tdhook_raw(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    hooked = stack.enter_context(peers.tdhook_caching(CHAIN_PATTERN).prepare(model))
    peers.checked(lambda: (model(x), hooked.hooking_context.cache)[1], count, TensorDict.keys)
    return partial(model, x)


def _tdhook_td(stack: ExitStack, count: int) -> Call:
    hooked = stack.enter_context(peers.tdhook_caching(CHAIN_PATTERN).prepare(Chain(count)))
    data = TensorDict({"input": tiny_input()}, batch_size=[])
    peers.checked(lambda: (hooked(data), hooked.hooking_context.cache)[1], count, TensorDict.keys)
    return partial(hooked, data)


def _baukit(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    names = [path for path, _ in peers.matching(model, CHAIN_PATTERN)]
    traces = stack.enter_context(peers.TraceDict(model, names, detach=False))
    peers.checked(lambda: (model(x), [one for one in traces.values() if one.output is not None])[1], count)
    return partial(model, x)


def _tl_idle(stack: ExitStack, count: int) -> Call:
    return partial(hooked_chain(count), tiny_input())


def _tl_open(stack: ExitStack, count: int) -> Call:
    model, x = hooked_chain(count), tiny_input()
    kept = model.add_caching_hooks()
    peers.checked(lambda: (model(x), kept)[1], count)
    return partial(model, x)


CAPTURE: Mapping[str, Maker] = {
    "no hook": _no_hook,
    "hook that does nothing": _empty,
    "raw hook writing a dict": _floor,
    "raw hook + TensorDict()": _floor_td,
    "tdcache, model(x)": _tdcache_model,
    "tdcache, hooked(x) and hooked.cache": _tdcache_hooked,
    "tdcache, hooked(td)": _tdcache_td,
    "tdhook, model(x)": _tdhook_raw,
    "tdhook, hooked(td)": _tdhook_td,
    "baukit-style": _baukit,
    TL_IDLE: _tl_idle,
    "TransformerLens, caching hooks": _tl_open,
}
GRAD_MODE: Mapping[str, Maker] = {
    "no hook": _no_hook,
    "raw hook writing a dict": _floor,
    "raw hook, detached": partial(_floor, detach=True),
    "tdcache, detached": _tdcache_model,
    "tdcache, hold='live'": partial(_tdcache_model, hold="live"),
    "tdhook, model(x)": _tdhook_raw,
    TL_IDLE: _tl_idle,
    "TransformerLens, caching hooks": _tl_open,
}


def capture(plan: Plan) -> list[Table]:
    """The cost of one more forward inside an open context."""
    settle_process()
    floor = "raw hook writing a dict"
    with torch.no_grad():
        samples, skipped = by_size(CAPTURE, plan)
    bases = {"TransformerLens, caching hooks": TL_IDLE}
    table = overhead_table("Capture, context open, no_grad", samples, floor, bases, skipped)
    for name in ("tdcache, model(x)", "tdcache, hooked(x) and hooked.cache"):
        table.goals += goals(f"capture, {name.removeprefix('tdcache, ')}", samples, name, floor)
    grads, skipped = by_size(GRAD_MODE, plan)
    second = overhead_table("Capture, context open, grad mode", grads, floor, bases, skipped)
    second.notes.append(
        "only 'raw hook, detached', 'tdcache, detached' and TransformerLens let go of the graph; one detach() is 0.4 us"
    )
    return [table, second]


# One shot.


def _shot_bare(stack: ExitStack, count: int) -> Call:
    return _no_hook(stack, count)


def _shot_floor(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    call = partial(peers.one_shot_by_hand, model, CHAIN_PATTERN, partial(model, x))
    return peers.checked(call, count, TensorDict.keys)


def _shot_tdcache(stack: ExitStack, count: int) -> Call:
    model, x, factory = Chain(count), tiny_input(), ActivationCaching(CHAIN_PATTERN)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            model(x)
        return hooked.cache

    return peers.checked(call, count, TensorDict.keys)


def _shot_again(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    context = ActivationCaching(CHAIN_PATTERN).prepare(model)

    def call() -> TensorDict:
        with context:
            model(x)
        return context.cache

    return peers.checked(call, count, TensorDict.keys)


def _shot_line(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()

    def call() -> TensorDict:
        with cache_activations(model, CHAIN_PATTERN) as cache:
            model(x)
        return cache

    return peers.checked(call, count, TensorDict.keys)


def _shot_tdhook(stack: ExitStack, count: int) -> Call:
    model, x, factory = Chain(count), tiny_input(), peers.tdhook_caching(CHAIN_PATTERN)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            model(x)
            return hooked.hooking_context.cache

    return peers.checked(call, count, TensorDict.keys)


def _shot_baukit(stack: ExitStack, count: int) -> Call:
    model, x = Chain(count), tiny_input()
    names = [path for path, _ in peers.matching(model, CHAIN_PATTERN)]

    def call() -> peers.TraceDict:
        with peers.TraceDict(model, names) as traces:
            model(x)
        return traces

    return peers.checked(call, count)


def _shot_nnsight(stack: ExitStack, count: int) -> Call:
    wrapped, x = peers.nnsight_model(Chain(count)), tiny_input()
    call = partial(peers.nnsight_cache, wrapped, list(wrapped.layers), x)
    return peers.checked(call, count, lambda cache: cache.keys())


def _shot_nnsight_save(stack: ExitStack, count: int) -> Call:
    wrapped, x = peers.nnsight_model(Chain(count)), tiny_input()
    return peers.checked(partial(peers.nnsight_save, wrapped, list(wrapped.layers), x), count)


def _shot_captum(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    return peers.checked(partial(peers.captum_layers(model, model.layers), tiny_input()), count)


def _shot_pyvene(stack: ExitStack, count: int) -> Call:
    return peers.checked(partial(peers.pyvene_chain(Chain(count), count, WIDTH), tiny_input()), count)


def _shot_tl(stack: ExitStack, count: int) -> Call:
    model, x = hooked_chain(count), tiny_input()
    return peers.checked(lambda: model.run_with_cache(x)[1], count)


ONE_SHOT: Mapping[str, Maker] = {
    "no hook": _shot_bare,
    "hand-written": _shot_floor,
    "tdcache, prepare and with": _shot_tdcache,
    "tdcache, cache_activations()": _shot_line,
    "tdcache, prepared context again": _shot_again,
    "nnsight, cache": _shot_nnsight,
    "nnsight, save": _shot_nnsight_save,
    "captum, LayerActivation": _shot_captum,
    TL_IDLE: _tl_idle,
    "TransformerLens, run_with_cache": _shot_tl,
    "pyvene, wrapped once": _shot_pyvene,
    "baukit-style": _shot_baukit,
    "tdhook": _shot_tdhook,
}


def one_shot(plan: Plan) -> list[Table]:
    """The cost of hooking, one forward, and unhooking."""
    settle_process()
    with torch.no_grad():
        samples, skipped = by_size(ONE_SHOT, plan)
        setup, set_up_skipped = by_size(SET_UP, plan)
    bases = {"TransformerLens, run_with_cache": TL_IDLE}
    table = overhead_table("Enter, forward, exit (no_grad)", samples, "hand-written", bases, skipped)
    for name in ("tdcache, prepare and with", "tdcache, prepared context again"):
        table.goals += goals(f"one shot, {name.removeprefix('tdcache, ')}", samples, name, "hand-written")
    second = overhead_table("Enter and exit only", setup, "hand-written", {}, set_up_skipped)
    second.head = [column.replace("us/tensor", "us/module") for column in second.head]
    second.goals += goals("enter and exit only", setup, "tdcache, prepare and with", "hand-written")
    again, before = "tdcache, prepared context again", "tdcache, prepare and with"
    second.goals += goals("entering again, to the first time", setup, again, before, limit=1)
    return [table, second]


# Enter and exit only.


def _nothing(stack: ExitStack, count: int) -> Call:
    return lambda: None


def _set_up_floor(stack: ExitStack, count: int) -> Call:
    return partial(peers.one_shot_by_hand, Chain(count), CHAIN_PATTERN, lambda: None)


def _set_up_tdcache(stack: ExitStack, count: int) -> Call:
    model, factory = Chain(count), ActivationCaching(CHAIN_PATTERN)

    def call() -> None:
        with factory.prepare(model):
            pass

    return call


def _set_up_again(stack: ExitStack, count: int) -> Call:
    context = ActivationCaching(CHAIN_PATTERN).prepare(Chain(count))

    def call() -> None:
        with context:
            pass

    return call


def _set_up_tdhook(stack: ExitStack, count: int) -> Call:
    model, factory = Chain(count), peers.tdhook_caching(CHAIN_PATTERN)

    def call() -> None:
        with factory.prepare(model):
            pass

    return call


def _set_up_baukit(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    names = [path for path, _ in peers.matching(model, CHAIN_PATTERN)]

    def call() -> None:
        with peers.TraceDict(model, names):
            pass

    return call


SET_UP: Mapping[str, Maker] = {
    "no hook": _nothing,
    "hand-written": _set_up_floor,
    "tdcache, prepare and with": _set_up_tdcache,
    "tdcache, prepared context again": _set_up_again,
    "baukit-style": _set_up_baukit,
    "tdhook": _set_up_tdhook,
}


# Both.


def by_size(makers: Mapping[str, Maker], plan: Plan) -> tuple[dict[int, Samples], dict[str, str]]:
    """Measure the variants on chains of every size."""
    skipped: dict[str, str] = {}
    samples = {
        size: measure_makers({name: _sized(maker, size) for name, maker in makers.items()}, plan, skipped)
        for size in plan.sizes
    }
    return samples, skipped


def _sized(maker: Maker, size: int) -> Maker:
    return lambda stack: maker(stack, size)


def goals(what: str, samples: Mapping[int, Samples], name: str, floor: str, limit: float = 1.25) -> list[Goal]:
    """The ratio to the floor, at every size."""
    return [
        Goal(f"{what}, {size} modules", one.ratio(name, floor, "no hook").median, limit)
        for size, one in samples.items()
    ]
