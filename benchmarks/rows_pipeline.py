"""Pipelines: three taps at each module of a chain against one hand-written hook that does the same; and a splice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import peers
import torch
from harness import Call, Maker, Plan, Table, overhead_table, settle_process
from rows_forward import by_size
from torch import Tensor, nn
from zoo import CHAIN_PATTERN, Chain, tiny_input

from tdcache import Splice
from tdcache.pipeline import AutoencoderHooks, FwdBwdHooks, Hooks, attach

FLOOR = "hand-written hook"


class Kept(dict[str, Tensor]):
    """Keeps a value under the path it is called with."""

    def __call__(self, x: Tensor, path: str) -> None:
        self[path] = x.detach()


def halve(x: Tensor) -> Tensor:
    """An edit."""
    return 0.5 * x


def _forward(model: nn.Module) -> Callable[[], Tensor]:
    return partial(model, tiny_input())


def _step(model: nn.Module) -> Callable[[], None]:
    x = tiny_input()
    return lambda: peers.backward(model(x).sum())


def _hooked(stack: ExitStack, model: nn.Module, make: Callable[[str], Any]) -> None:
    for path, module in peers.matching(model, CHAIN_PATTERN):
        stack.callback(module.register_forward_hook(make(path)).remove)


def _taps(before: Kept, after: Kept, path: str) -> Callable[..., Tensor]:
    """What the three taps do, in one hook: keep, edit, keep."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        before[path] = output.detach()
        output = 0.5 * output
        after[path] = output.detach()
        return output

    return hook


def _gradient_taps(kept: Kept, grads: Kept, path: str) -> Callable[..., Tensor]:
    """An edit, then a gradient that is edited and kept, in one hook."""

    def on_grad(grad: Tensor) -> Tensor:
        grad = 0.5 * grad
        grads[path] = grad
        return grad

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        kept[path] = output.detach()
        output.register_hook(on_grad)
        return output

    return hook


# Forward.


def _no_hook(stack: ExitStack, count: int) -> Call:
    return _forward(Chain(count))


def _by_hand(stack: ExitStack, count: int) -> Call:
    model, before, after = Chain(count), Kept(), Kept()
    _hooked(stack, model, partial(_taps, before, after))
    return peers.checked(_keeping(_forward(model), before, after), 2 * count)


def _attached(stack: ExitStack, count: int) -> Call:
    model, before, after = Chain(count), Kept(), Kept()
    stack.enter_context(attach(model, CHAIN_PATTERN, Hooks(before, halve, after)))
    return peers.checked(_keeping(_forward(model), before, after), 2 * count)


def _keeping(call: Call, *kept: Kept) -> Call:
    def keeping() -> list[Tensor]:
        call()
        return [value for each in kept for value in each.values()]

    return keeping


FORWARD: Mapping[str, Maker] = {"no hook": _no_hook, FLOOR: _by_hand, "tdcache, pipeline of three taps": _attached}


# Forward and backward.


def _no_hook_step(stack: ExitStack, count: int) -> Call:
    return _step(Chain(count))


def _by_hand_step(stack: ExitStack, count: int) -> Call:
    model, kept, grads = Chain(count), Kept(), Kept()
    _hooked(stack, model, partial(_gradient_taps, kept, grads))
    return peers.checked(_keeping(_step(model), kept, grads), 2 * count)


def _attached_step(stack: ExitStack, count: int) -> Call:
    model, kept, grads = Chain(count), Kept(), Kept()
    pipeline = FwdBwdHooks().append_fwd(kept).append_bwd(halve).append_bwd(grads)
    stack.enter_context(attach(model, CHAIN_PATTERN, pipeline))
    return peers.checked(_keeping(_step(model), kept, grads), 2 * count)


BACKWARD: Mapping[str, Maker] = {
    "no hook": _no_hook_step,
    FLOOR: _by_hand_step,
    "tdcache, pipeline of three taps": _attached_step,
}


# A linear basis with its error term.


def _basis() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    width = tiny_input().shape[-1]
    matrix = torch.linalg.qr(torch.randn(width, width)).Q
    return lambda x: torch.relu(x @ matrix), lambda z: z @ matrix.T


def _spliced_by_hand(stack: ExitStack, count: int) -> Call:
    model, (encode, decode) = Chain(count), _basis()

    def make(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            latents = encode(output)
            return decode(latents.clone()) + (output - decode(latents))

        return hook

    _hooked(stack, model, make)
    return _step(model)


def _spliced(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    stack.enter_context(Splice(CHAIN_PATTERN, _basis()).prepare(model))
    return _step(model)


def _as_hooks(stack: ExitStack, count: int) -> Call:
    model = Chain(count)
    stack.enter_context(attach(model, CHAIN_PATTERN, AutoencoderHooks(*_basis(), add_error=True)))
    return _step(model)


SPLICE: Mapping[str, Maker] = {
    "no hook": _no_hook_step,
    FLOOR: _spliced_by_hand,
    "tdcache, Splice": _spliced,
    "tdcache, AutoencoderHooks attached": _as_hooks,
}

TABLES = {
    "Pipeline of three taps (keep, edit, keep), forward, context open": FORWARD,
    "Pipeline of three taps (keep; edit the gradient, keep it), forward and backward, context open": BACKWARD,
    "Splice of a linear basis with error term, forward and backward, context open": SPLICE,
}


def pipeline(plan: Plan) -> list[Table]:
    """The cost of pipelines and splices over one hand-written hook a module."""
    settle_process()
    tables = []
    for title, makers in TABLES.items():
        samples, skipped = by_size(makers, plan)
        table = overhead_table(title, samples, FLOOR, {}, skipped)
        table.notes.append(
            "us per hooked module, over the model without hooks; the hand-written hook does the same work"
        )
        tables.append(table)
    return tables
