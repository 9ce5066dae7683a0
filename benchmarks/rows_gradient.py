"""Forward and backward with the gradients of the outputs: with the context left open, and in one shot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import peers
from harness import Call, Maker, Plan, Table, overhead_table, settle_process
from rows_forward import by_size, goals
from tensordict import TensorDict
from torch import Tensor, nn
from zoo import CHAIN_PATTERN, Chain, hooked_chain, tiny_input

from tdcache import ActivationCaching

TL_IDLE = "TransformerLens, idle HookPoints"
FLOOR = "tensor hook"


def _step(model: nn.Module) -> Callable[[], None]:
    """One forward and one backward."""
    x = tiny_input()

    def step() -> None:
        peers.backward(model(x).sum())

    return step


def _no_hook(stack: ExitStack, count: int) -> Call:
    return _step(Chain(count))


def _floor(stack: ExitStack, count: int, *, outputs: bool = True, detach: bool = False, flush: bool = False) -> Call:
    model = Chain(count)
    kept: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    for path, module in peers.matching(model, CHAIN_PATTERN):
        hook = peers.gradient_hook(kept if outputs else None, grads, path, detach=detach)
        stack.callback(module.register_forward_hook(hook).remove)
    step = _step(model)
    if not flush:
        peers.checked(lambda: (step(), grads)[1], count)
        return step

    def call() -> tuple[TensorDict, TensorDict]:
        step()
        return TensorDict(kept, batch_size=[]), TensorDict(grads, batch_size=[])

    return peers.checked(call, count, lambda pair: pair[1].keys())


def _full_backward(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    grads: dict[str, Tensor] = {}
    for path, module in peers.matching(model, CHAIN_PATTERN):
        stack.callback(module.register_full_backward_hook(peers.full_backward_hook(grads, path)).remove)
    step = _step(model)
    peers.checked(lambda: (step(), grads)[1], count)
    return step


def _tdcache(stack: ExitStack, count: int, directions: tuple[str, ...], read: bool = False) -> Call:
    model = Chain(count)
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN, directions=directions).prepare(model))
    step = _step(model)

    def call() -> TensorDict:
        step()
        return hooked.cache

    peers.checked(call, count, _gradient_keys(directions))
    return call if read else step


def _gradient_keys(directions: tuple[str, ...]) -> Callable[[TensorDict], Any]:
    return lambda cache: (cache["bwd"] if len(directions) > 1 else cache).keys()


def _tdhook(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    factory = peers.tdhook_caching(CHAIN_PATTERN, directions=["fwd", "bwd"], callback=_tdhook_take)
    hooked = stack.enter_context(factory.prepare(model))
    step = _step(model)
    peers.checked(lambda: (step(), hooked.hooking_context.cache["bwd"])[1], count, TensorDict.keys)
    return step


def _tdhook_take(*, direction: str, output: Any = None, grad_output: Any = None, **_: Any) -> Tensor:
    return peers.first(grad_output if direction == "bwd" else output)


def _tl_idle(stack: ExitStack, count: int) -> Call:
    return _step(hooked_chain(count))


def _tl_open(stack: ExitStack, count: int) -> Call:
    model = hooked_chain(count)
    kept = model.add_caching_hooks(incl_bwd=True)
    step = _step(model)
    peers.checked(lambda: (step(), kept)[1], 2 * count)
    return step


OPEN: Mapping[str, Maker] = {
    "no hook": _no_hook,
    FLOOR: _floor,
    "tensor hook, output detached": partial(_floor, detach=True),
    "tensor hook + TensorDict()": partial(_floor, flush=True),
    "tdcache, fwd and bwd": partial(_tdcache, directions=("fwd", "bwd")),
    "tdcache, fwd and bwd, hooked.cache": partial(_tdcache, directions=("fwd", "bwd"), read=True),
    "tensor hook, gradient only": partial(_floor, outputs=False),
    "tdcache, bwd": partial(_tdcache, directions=("bwd",)),
    "full backward hook": _full_backward,
    "tdhook, fwd and bwd": _tdhook,
    TL_IDLE: _tl_idle,
    "TransformerLens, caching hooks": _tl_open,
}


# One shot.


def _shot_floor(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    step = _step(model)

    def call() -> tuple[TensorDict, TensorDict]:
        kept: dict[str, Tensor] = {}
        grads: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(peers.gradient_hook(kept, grads, path))
            for path, module in peers.matching(model, CHAIN_PATTERN)
        ]
        try:
            step()
        finally:
            for handle in handles:
                handle.remove()
        return TensorDict(kept, batch_size=[]), TensorDict(grads, batch_size=[])

    return peers.checked(call, count, lambda pair: pair[1].keys())


def _shot_tdcache(stack: ExitStack, count: int) -> Call:
    model, factory = Chain(count), ActivationCaching(CHAIN_PATTERN, directions=("fwd", "bwd"))
    step = _step(model)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            step()
        return hooked.cache

    return peers.checked(call, count, lambda cache: cache["bwd"].keys())


def _shot_tdhook(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    factory = peers.tdhook_caching(CHAIN_PATTERN, directions=["fwd", "bwd"], callback=_tdhook_take)
    step = _step(model)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            step()
            return hooked.hooking_context.cache

    return peers.checked(call, count, lambda cache: cache["bwd"].keys())


def _shot_nnsight(stack: ExitStack, count: int) -> Call:
    wrapped = peers.nnsight_model(Chain(count))
    return peers.checked(partial(peers.nnsight_gradients, wrapped, list(wrapped.layers), tiny_input()), count)


def _shot_tl(stack: ExitStack, count: int) -> Call:
    model, x = hooked_chain(count, loss=True), tiny_input()
    return peers.checked(lambda: model.run_with_cache(x, incl_bwd=True)[1], 2 * count)


ONE_SHOT: Mapping[str, Maker] = {
    "no hook": _no_hook,
    "hand-written": _shot_floor,
    "tdcache, fwd and bwd": _shot_tdcache,
    "nnsight, backward in a trace": _shot_nnsight,
    "tdhook, fwd and bwd": _shot_tdhook,
    TL_IDLE: _tl_idle,
    "TransformerLens, run_with_cache": _shot_tl,
}


def gradient(plan: Plan) -> list[Table]:
    """The cost of one more forward and backward."""
    settle_process()
    samples, skipped = by_size(OPEN, plan)
    title = "Forward and gradient, context open"
    table = overhead_table(title, samples, FLOOR, {"TransformerLens, caching hooks": TL_IDLE}, skipped)
    table.goals += goals("forward + gradient", samples, "tdcache, fwd and bwd", FLOOR)
    table.notes.append(
        "overhead over forward and backward without hooks; the output is captured too where not said otherwise"
    )
    shots, skipped = by_size(ONE_SHOT, plan)
    bases = {"TransformerLens, run_with_cache": TL_IDLE}
    second = overhead_table("Enter, forward, gradient, exit", shots, "hand-written", bases, skipped)
    second.goals += goals("forward + gradient, one shot", shots, "tdcache, fwd and bwd", "hand-written")
    return [table, second]
