"""Models of a real shape: one-shot capture on GPT-2, and ending a forward early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import peers
import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, measure_makers, rounds_note, settle_process
from tensordict import TensorDict
from torch import nn
from zoo import GPT2_PATTERN, Chain, narrow_gpt2, small_gpt2, tiny_input, token_ids

from tdcache import ActivationCaching

LAYERS = 12
SITES = 3 * LAYERS
PATHS = [path for layer in range(LAYERS) for path in (f"h.{layer}.attn", f"h.{layer}.mlp", f"h.{layer}")]


def _ids() -> torch.Tensor:
    return token_ids(1, 16)


def _no_hook(stack: ExitStack) -> Call:
    return partial(narrow_gpt2(), _ids())


def _by_hand(stack: ExitStack, take: Callable[[Any], Any] = peers.first) -> Call:
    model = narrow_gpt2()
    call = partial(peers.one_shot_by_hand, model, GPT2_PATTERN, partial(model, _ids()), take)
    return peers.checked(call, SITES, TensorDict.keys)


def _by_hand_known(stack: ExitStack) -> Call:
    model, ids = narrow_gpt2(), _ids()
    sites = peers.matching(model, GPT2_PATTERN)
    call = partial(peers.one_shot_on_sites, sites, partial(model, ids), peers.first)
    return peers.checked(call, SITES, TensorDict.keys)


def _tdcache(stack: ExitStack, **options: Any) -> Call:
    model, ids = narrow_gpt2(), _ids()
    factory = ActivationCaching(GPT2_PATTERN, **options)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            model(ids)
        return hooked.cache

    return peers.checked(call, SITES, TensorDict.keys)


def _tdcache_again(stack: ExitStack) -> Call:
    model, ids = narrow_gpt2(), _ids()
    context = ActivationCaching(GPT2_PATTERN).prepare(model)

    def call() -> TensorDict:
        with context:
            model(ids)
        return context.cache

    return peers.checked(call, SITES, TensorDict.keys)


def _tdhook(stack: ExitStack) -> Call:
    model, ids = narrow_gpt2(), _ids()
    factory = peers.tdhook_caching(GPT2_PATTERN, callback=_take_output)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            model(ids)
            return hooked.hooking_context.cache

    return peers.checked(call, SITES, TensorDict.keys)


def _take_output(*, output: Any, **_: Any) -> torch.Tensor:
    return peers.first(output)


def _baukit(stack: ExitStack) -> Call:
    model, ids = narrow_gpt2(), _ids()

    def call() -> peers.TraceDict:
        with peers.TraceDict(model, PATHS, detach=False) as traces:  # detaching fails on (tensor, None)
            model(ids)
        return traces

    return peers.checked(call, SITES)


def _nnsight(stack: ExitStack) -> Call:
    wrapped = peers.nnsight_model(narrow_gpt2())
    modules = [module for block in wrapped.h for module in (block, block.attn, block.mlp)]
    call = partial(peers.nnsight_cache, wrapped, modules, _ids())
    return peers.checked(call, SITES, lambda cache: cache.keys())


def _pyvene(stack: ExitStack) -> Call:
    return peers.checked(partial(peers.pyvene_gpt2(narrow_gpt2(), LAYERS), _ids()), SITES)


NARROW: Mapping[str, Maker] = {
    "no hook": _no_hook,
    "hand-written, modules known before": _by_hand_known,
    "hand-written": _by_hand,
    "hand-written, detach().clone()": partial(_by_hand, take=lambda output: peers.first(output).detach().clone()),
    "tdcache, prepare and with": _tdcache,
    "tdcache, prepared context again": _tdcache_again,
    "tdcache, hold='snapshot'": partial(_tdcache, hold="snapshot"),
    "nnsight, cache": _nnsight,
    "pyvene, wrapped once": _pyvene,
    "tdhook, with a callback": _tdhook,
    "baukit-style": _baukit,
}


def gpt2(plan: Plan) -> list[Table]:
    """One-shot capture of every block, attention and feed-forward output."""
    settle_process()
    skipped: dict[str, str] = {}
    with torch.no_grad():
        samples = measure_makers(NARROW, plan, skipped)
    table = Table(
        f"GPT-2 shape: 12 layers, d=64, {SITES} tensors, one shot, no_grad",
        ["variant", "ms", "% over no hook", "us/tensor", "x hand-written"],
    )
    for name in samples.seconds:
        cells = [f"**{name}**" if name == "hand-written" else name, f"{samples.time(name).median * 1e3:.2f}"]
        if name == "no hook":
            cells += ["", "", ""]
        else:
            cells += [samples.share(name, "no hook").show(1), samples.over(name, "no hook", SITES).show()]
            cells.append(samples.ratio(name, "hand-written", "no hook").show())
        table.rows.append(cells)
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append(rounds_note([samples]))
    share = samples.share("tdcache, prepare and with", "no hook").median
    ratio = samples.ratio("tdcache, prepare and with", "hand-written", "no hook").median
    table.goals.append(Goal("GPT-2 shape, one shot, over no hook", share, 13, "%"))
    table.goals.append(Goal("GPT-2 shape, one shot, to hand-written", ratio, 1.25))
    return [table]


# Early stop. ``layers`` is how many of ``depth`` layers run.


def _run_all(stack: ExitStack, model: nn.Module, x: Any, path: str) -> Call:
    return partial(model, x)


def _stop_by_hand(stack: ExitStack, model: nn.Module, x: Any, path: str) -> Call:
    kept: dict[str, Any] = {}
    stack.callback(model.get_submodule(path).register_forward_hook(peers.stop_hook(kept, path)).remove)

    def call() -> dict[str, Any]:
        with suppress(peers.Reached):
            model(x)
        return kept

    return peers.checked(call, 1)


def _stop_tdcache(stack: ExitStack, model: nn.Module, x: Any, path: str) -> Call:
    factory = ActivationCaching(path.replace(".", r"\."), stop_early=True)
    hooked = stack.enter_context(factory.prepare(model))

    def call() -> TensorDict:
        hooked(x)
        return hooked.cache

    return peers.checked(call, 1, TensorDict.keys)


def _stop_tdcache_shot(stack: ExitStack, model: nn.Module, x: Any, path: str) -> Call:
    factory = ActivationCaching(path.replace(".", r"\."), stop_early=True)

    def call() -> TensorDict:
        with factory.prepare(model) as hooked:
            hooked(x)
        return hooked.cache

    return peers.checked(call, 1, TensorDict.keys)


def _stop_baukit(stack: ExitStack, model: nn.Module, x: Any, path: str) -> Call:
    def call() -> peers.TraceDict:
        with peers.TraceDict(model, [path], stop=True) as traces:
            model(x)
        return traces

    return peers.checked(call, 1)


def _stop_nnsight(stack: ExitStack, model: nn.Module, x: Any, path: str) -> Call:
    wrapped = peers.nnsight_model(model)
    layer = wrapped
    for name in path.split("."):
        layer = layer[int(name)] if name.isdecimal() else getattr(layer, name)
    return partial(peers.nnsight_stop, wrapped, layer, x)


STOPPED: Mapping[str, Callable[..., Call]] = {
    "hand-written, open": _stop_by_hand,
    "tdcache, open": _stop_tdcache,
    "tdcache, one shot": _stop_tdcache_shot,
    "baukit-style, one shot": _stop_baukit,
    "nnsight, one shot": _stop_nnsight,
}


def early_stop(plan: Plan) -> list[Table]:
    """What is left of a forward that ends at a quarter."""
    settle_process()
    with torch.no_grad():
        tiny, skipped = _stopped(plan, Chain, tiny_input(), (48, 12), "layers.11")
        rounds = 5 if plan.quick else 15
        ids = token_ids(1, 16 if plan.quick else 64)
        small, small_skipped = _stopped(plan, small_gpt2, ids, (LAYERS, 3), "h.2", rounds=rounds, copies=1)
    table = Table("Early stop", ["variant", "us", "us over ideal", "ms, GPT-2 small", "% of the full forward"])
    for name in tiny.seconds:
        cells = [f"**{name}**" if name == "ideal" else name, f"{tiny.time(name).median * 1e6:.1f}"]
        cells.append("" if name == "ideal" else tiny.over(name, "ideal").show(1))
        if name in small:
            share = 100 * small.time(name).median / small.time("full forward").median
            cells += [f"{small.time(name).median * 1e3:.2f}", f"{share:.0f}"]
        else:
            cells += ["-", "-"]
        table.rows.append(cells)
    table.notes += [f"{name}: {reason}" for name, reason in {**skipped, **small_skipped}.items()]
    table.notes += [
        f"us: the 12th of 48 tiny modules; ms: the 3rd of 12 layers of GPT-2 small, 1 x {ids.shape[1]} tokens",
        "ideal: a model that has only these layers, without hooks",
        rounds_note([tiny, small]),
    ]
    table.goals.append(
        Goal("early stop, tiny modules, over ideal", tiny.over("tdcache, open", "ideal").median, 15, "us")
    )
    full, ideal, ours = (small.time(name).median for name in ("full forward", "ideal", "tdcache, open"))
    saved = 100 * (full - ours) / (full - ideal)
    table.goals.append(Goal("early stop, GPT-2 small, part of the ideal saving", saved, 99, "%", at_least=True))
    return [table]


def _stopped(
    plan: Plan,
    make: Callable[[int], nn.Module],
    x: torch.Tensor,
    depths: tuple[int, int],
    path: str,
    **options: Any,
) -> tuple[Samples, dict[str, str]]:
    full, part = depths
    makers: dict[str, Maker] = {
        "full forward": lambda stack: partial(make(full), x),
        "ideal": lambda stack: partial(make(part), x),
    }
    for name, maker in STOPPED.items():
        makers[name] = partial(_on_own_model, maker, make, full, x, path)
    skipped: dict[str, str] = {}
    return measure_makers(makers, plan, skipped, **options), skipped


def _on_own_model(
    maker: Callable[..., Call],
    make: Callable[[int], nn.Module],
    depth: int,
    x: torch.Tensor,
    path: str,
    stack: ExitStack,
) -> Call:
    return maker(stack, make(depth), x, path)
