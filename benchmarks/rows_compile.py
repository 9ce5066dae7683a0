"""Compiled models: hooks that are there when the graph is made, and hooks that come later."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from math import nan
from typing import Any

import peers
import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, build, measure, rounds_note, settle_process
from tensordict import TensorDict
from torch import nn
from zoo import CHAIN_PATTERN, own_pointwise_chain

from tdcache import ActivationCaching

COUNT = 12


def _input() -> torch.Tensor:
    return torch.full((64, 64), 0.5)


def _compile(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True)


def _as_it_is(model: nn.Module) -> Callable[..., Any]:
    return model


def _no_hook(stack: ExitStack, wrap: Callable[[nn.Module], Any]) -> Call:
    return partial(wrap(own_pointwise_chain(COUNT)), _input())


def _by_hand(stack: ExitStack, wrap: Callable[[nn.Module], Any]) -> Call:
    model, x = own_pointwise_chain(COUNT), _input()
    kept = peers.hook_by_hand(stack, peers.matching(model, CHAIN_PATTERN))
    wrapped = wrap(model)

    def call() -> dict[str, Any]:
        kept.clear()  # a dict that is full when the call begins costs a second compilation
        wrapped(x)
        return kept

    return peers.checked(call, COUNT)


def _tdcache(stack: ExitStack, wrap: Callable[[nn.Module], Any]) -> Call:
    model, x = own_pointwise_chain(COUNT), _input()
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN).prepare(model))
    wrapped = wrap(model)

    def call() -> TensorDict:
        wrapped(x)
        return hooked.cache

    return peers.checked(call, COUNT, TensorDict.keys)


def _tdhook(stack: ExitStack, wrap: Callable[[nn.Module], Any]) -> Call:
    model, x = own_pointwise_chain(COUNT), _input()
    hooked = stack.enter_context(peers.tdhook_caching(CHAIN_PATTERN).prepare(model))
    wrapped = wrap(model)

    def call() -> TensorDict:
        wrapped(x)
        return hooked.hooking_context.cache

    return peers.checked(call, COUNT, TensorDict.keys)


PRESENT: Mapping[str, Maker] = {
    "eager": partial(_no_hook, wrap=_as_it_is),
    "eager, hand-written": partial(_by_hand, wrap=_as_it_is),
    "eager, tdcache": partial(_tdcache, wrap=_as_it_is),
    "compiled": partial(_no_hook, wrap=_compile),
    "compiled, hand-written": partial(_by_hand, wrap=_compile),
    "compiled, tdcache": partial(_tdcache, wrap=_compile),
    "compiled, tdhook": partial(_tdhook, wrap=_compile),
}


def compiled(plan: Plan) -> list[Table]:
    """Both kinds."""
    settle_process()
    with torch.no_grad():
        return [_present(plan), _later()]


def _present(plan: Plan) -> Table:
    table = Table(
        f"torch.compile(fullgraph=True), hooks there at the first call, {COUNT} pointwise blocks",
        ["variant", "us", "x eager", "x compiled", "graphs", "breaks"],
    )
    skipped: dict[str, str] = {}
    calls: dict[str, Call] = {}
    graphs: dict[str, tuple[int, int]] = {}
    with ExitStack() as stack:
        for name, maker in PRESENT.items():
            torch._dynamo.utils.counters.clear()
            built = build({name: maker}, stack, skipped)
            for call in built.values():
                call()
                call()
            calls |= built
            graphs[name] = _graphs()
        samples = measure(calls, plan=plan)
    for name in samples.seconds:
        found, broken = graphs[name] if name.startswith("compiled") else ("", "")
        table.rows.append(
            [name, f"{samples.time(name).median * 1e6:.1f}", *_ratios(samples, name), str(found), str(broken)]
        )
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append(rounds_note([samples]))
    made, broken = graphs["compiled, tdcache"] if "compiled, tdcache" in samples else (nan, nan)
    table.goals.append(Goal("compile, hooks present: graphs", made, 1, "graph"))
    table.goals.append(Goal("compile, hooks present: breaks", broken, 0, "breaks"))
    return table


def _graphs() -> tuple[int, int]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _ratios(samples: Samples, name: str) -> list[str]:
    return [
        f"{1 + samples.share(name, base).median / 100:.2f}" if base in samples else "-"
        for base in ("eager", "compiled")
    ]


# Hooks that come after the first call. ``model`` is the user's own, ``called`` what was compiled and is called.


def _later_by_hand(stack: ExitStack, model: nn.Module, called: nn.Module) -> int:
    kept = peers.hook_by_hand(stack, peers.matching(model, CHAIN_PATTERN))
    called(_input())
    return len(kept)


def _later_tdcache(stack: ExitStack, model: nn.Module, called: nn.Module) -> int:
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN).prepare(called))
    called(_input())
    return len(list(hooked.cache.keys()))


def _context_inside(stack: ExitStack, model: nn.Module, called: nn.Module) -> int:
    hooked = stack.enter_context(ActivationCaching(CHAIN_PATTERN).prepare(model))
    called(_input())
    return len(list(hooked.cache.keys()))


def _later_tdhook(stack: ExitStack, model: nn.Module, called: nn.Module) -> int:
    hooked = stack.enter_context(peers.tdhook_caching(CHAIN_PATTERN).prepare(model))
    called(_input())
    return len(list(hooked.hooking_context.cache.keys()))


LATER: Mapping[str, Callable[..., int]] = {
    "hand-written": _later_by_hand,
    "tdcache, context on what is called": _later_tdcache,
    "tdcache, context on the model inside": _context_inside,
    "tdhook": _later_tdhook,
}


PLACES = ("torch.compile(model)", "model.compile()", "another model of the class compiled before")


def _later() -> Table:
    table = Table("torch.compile, graphs made without the hooks", ["variant", *PLACES])
    for name, hook in LATER.items():
        answers = [_captured(hook, place) for place in PLACES]
        table.rows.append([name, *(answer for answer, _ in answers)])
        if name.startswith("tdcache"):
            good = sum(fine for _, fine in answers)
            what = f"compile, graphs made before, {name.removeprefix('tdcache, ')}: captured or refused"
            table.goals.append(Goal(what, good, len(answers), f"of {len(answers)}", at_least=True))
    table.notes += [
        "captured values of those selected; 'silent' where there was neither a warning nor an error",
        "in the first two the model ran before the hooks came; in the last the hooks were there at its own first call",
    ]
    return table


def _captured(hook: Callable[..., int], place: str) -> tuple[str, bool]:
    """What came of it, and whether everything was captured or an error raised."""
    model = own_pointwise_chain(COUNT)
    if place == "model.compile()":
        model.compile()
        called = model
        called(_input())
    elif place == "torch.compile(model)":
        called = torch.compile(model)
        called(_input())
    else:
        torch.compile(type(model)(COUNT))(_input())
        called = torch.compile(model)
    try:
        with warnings.catch_warnings(record=True) as told, ExitStack() as stack:
            warnings.simplefilter("always")
            count = hook(stack, model, called)
    except ImportError:
        return "not installed", False
    except Exception as error:  # noqa: BLE001 - whatever the variant says is the finding
        return f"refused: {type(error).__name__}", True
    said = f", {told[-1].category.__name__}" if told else "" if count == COUNT else ", silent"
    return f"{count} of {COUNT}{said}", count == COUNT
