"""Flattens a pipeline for one site into a list of calls with their keyword arguments.

A pipeline looks up its bindings and the arguments of each hook in every call, because both may change between calls. An
attached pipeline is a private copy, so all of this is looked up once, on entering.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from tdcache.hooks.values import check_fits
from tdcache.pipeline.calling import HookCall, spell
from tdcache.pipeline.collection import FwdBwdHooks
from tdcache.pipeline.gradients import GradientHook, grad_hook_wrapper
from tdcache.pipeline.hooks import Hook, HookNode, Hooks, WrapperHooks

__all__ = ["GradientSteps", "HookStep", "VARYING", "laid_out", "run_steps"]

VARYING = ("call", "forward")
"""The keyword arguments in scope that vary from call to call."""


class HookStep(NamedTuple):
    """One hook of a pipeline at one site."""

    hook: Hook
    """The hook, with the keyword arguments that are the same in every call."""
    varying: tuple[str, ...]
    """The names of the keyword arguments that vary."""
    gradient: GradientSteps | None = None
    """If the hook only watches the gradient of its value: the hook on the gradient."""


def run_steps(steps: Sequence[HookStep], x: Any, values: Mapping[str, Any]) -> Any:
    """Pass ``x`` through the steps; ``values`` are the varying keyword arguments."""
    for hook, varying, _ in steps:
        new = hook(x, **{name: values[name] for name in varying}) if varying else hook(x)
        if new is not None:
            x = new
    return x


def laid_out(pipeline: Any, scope: Mapping[str, Any]) -> Iterator[HookStep]:
    """The steps of a pipeline with these keyword arguments in scope; the binding nearest to a hook wins.

    Raises:
        HookSignatureError: a hook needs a keyword argument that is not in scope.
    """
    if isinstance(pipeline, HookNode):
        scope = {**scope, **pipeline.bound}
    kind = type(pipeline)
    if isinstance(pipeline, Hooks) and kind is Hooks:
        for call in pipeline.calls:
            nested = isinstance(call.hook, HookNode)
            yield from laid_out(call.hook, scope) if nested else (_step(call, scope),)
    elif isinstance(pipeline, FwdBwdHooks) and kind is FwdBwdHooks:
        for sequence in (pipeline.fwd, pipeline.bwd, pipeline.fwd2):
            yield from laid_out(sequence, scope)
    elif isinstance(pipeline, WrapperHooks) and kind is WrapperHooks and pipeline.wrapper is grad_hook_wrapper:
        steps = tuple(step for call in pipeline.calls for step in laid_out(call.hook, scope))
        if steps:
            text = " -> ".join(spell(call.hook) for call in pipeline.calls)
            watcher = GradientSteps(steps, str(scope.get("path", "")), text)
            hook = partial(GradientHook(watcher), **scope)
            yield HookStep(
                hook, tuple(name for name in VARYING if any(name in each.varying for each in steps)), watcher
            )
    else:
        yield _step(HookCall(pipeline), scope)


def _step(call: HookCall, scope: Mapping[str, Any]) -> HookStep:
    taken = call.taken({**dict.fromkeys(VARYING), **scope})
    varying = tuple(name for name in VARYING if name in taken and name not in scope)
    fixed = {name: value for name, value in taken.items() if name not in varying}
    return HookStep(partial(call.hook, **fixed) if fixed else call.hook, varying)


@dataclass(frozen=True, slots=True)
class GradientSteps:
    """Steps on a gradient, as one hook; it takes the varying keyword arguments."""

    steps: tuple[HookStep, ...]
    path: str
    text: str
    takes_any_keyword: ClassVar[bool] = True

    def __call__(self, x: Any, /, **kwargs: Any) -> Any:
        """Pass a gradient through the steps."""
        return run_steps(self.steps, x, kwargs)

    def on_grad(self, grad: Tensor, values: Mapping[str, Any] | None = None) -> Any:
        """Pass a copy of the gradient through the steps and return the result."""
        new = run_steps(self.steps, grad.clone(), values or {})
        check_fits(new, grad, self.path)
        return new

    def __repr__(self) -> str:
        return self.text
