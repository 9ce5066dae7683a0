"""What changes the meaning of a backward: small recipes that add hooks and own no forward.

Each is a factory of its own, for everything in the pass, and may stand in ``modifiers=`` of one method, for its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.attribution.asks import Rows
from tdcache.contexts import HookingContextFactory
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.hooks.values import leaves, pick_tensor
from tdcache.modules import HookedModule
from tdcache.selection import as_matcher, select
from tdcache.types import Index, Match, Pick, Selector

__all__ = ["GradDrop", "GradientHook", "GuidedReLU", "Installed", "Modifier", "ScaleGradient", "StopGradient"]


class Installed(HookingContextFactory):
    """Base of what adds hooks for some rows of a pass, or as a context of its own for all: override :meth:`install`."""

    def install(self, model: nn.Module, rows: Rows | None, handle: MultiHookHandle) -> None:
        """Add the hooks, for some rows or (None) for all."""
        raise NotImplementedError

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        handle = MultiHookHandle()
        try:
            self.install(module.model, None, handle)
        except BaseException:
            handle.remove()
            raise
        return handle


class Modifier(Installed):
    """Base of the modifiers: override :meth:`change`, which gets the gradient of each selected module's output.

    Args:
        selector: which modules.
        match: how patterns are held against paths.
        pick: which tensor of a structured output; None for all of them.
        index: the part of the tensor that is changed, counted behind the batch: ``(..., slice(0, 64))``.
    """

    def __init__(self, selector: Selector, *, match: Match = "full", pick: Pick = None, index: Index = None) -> None:
        super().__init__()
        as_matcher(selector, match)
        self.selector = selector
        self.match: Match = match
        self.pick = pick
        self.index = index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selector!r})"

    def change(self, grad: Tensor, output: Tensor) -> Tensor:
        """The gradient that takes the place of ``grad``."""
        raise NotImplementedError

    def install(self, model: nn.Module, rows: Rows | None, handle: MultiHookHandle) -> None:
        """Add the hooks, for some rows or (None) for all."""
        for path, module, _ in select(model, self.selector, match=self.match):
            hook = GradientHook(self, path, rows)
            handle.add(attach(module, hook.on_output, order=hook.order))


@dataclass(frozen=True, slots=True)
class GradientHook:
    """Sets a tensor hook on what one module returns."""

    modifier: Modifier
    path: str
    rows: Rows | None
    order: int = Order.EDIT
    rowwise: bool = True  # it treats rows independently, so that a pass may go on stacking them

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watch the gradient of the output."""
        pick = self.modifier.pick
        tensors = [each for _, each in leaves(output)] if pick is None else [pick_tensor(output, pick, self.path)]
        for tensor in tensors:
            if tensor.requires_grad and not tensor.is_leaf:
                tensor.register_hook(_Change(self, tensor.detach()))


@dataclass(frozen=True, slots=True)
class _Change:
    """A tensor hook: the modifier's change, in its rows and at its index."""

    hook: GradientHook
    output: Tensor

    def __call__(self, grad: Tensor) -> Tensor:
        rows = self.hook.rows
        if rows is None:
            return self._indexed(grad, self.output)
        own = rows.part(self.output, self.hook.path)
        return rows.change(grad, self.hook.path, lambda part: self._indexed(part, own))

    def _indexed(self, grad: Tensor, output: Tensor) -> Tensor:
        modifier = self.hook.modifier
        if modifier.index is None:
            return modifier.change(grad, output)
        changed = grad.clone()
        changed[modifier.index] = modifier.change(grad[modifier.index], output[modifier.index])
        return changed


class GuidedReLU(Modifier):
    """At ReLUs only positive gradients pass (Springenberg et al. 2015, arXiv:1412.6806)."""

    def __init__(self, selector: Selector = nn.ReLU, **options: Any) -> None:
        super().__init__(selector, **options)

    def change(self, grad: Tensor, output: Tensor) -> Tensor:
        """Clamp at zero."""
        return grad.clamp(min=0)


class StopGradient(Modifier):
    """No gradient passes through what the selected modules return: it counts as a constant."""

    def change(self, grad: Tensor, output: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(grad)


class ScaleGradient(Modifier):
    """Gradients of what the selected modules return are multiplied by ``scale``.

    Args:
        selector: which modules.
        scale: the factor.
        **options: see :class:`Modifier`.
    """

    def __init__(self, selector: Selector, scale: float, **options: Any) -> None:
        super().__init__(selector, **options)
        self.scale = scale

    def change(self, grad: Tensor, output: Tensor) -> Tensor:
        """Multiply."""
        return grad * self.scale


class GradDrop(StopGradient):
    """Leaves out what one layer adds to the residual stream in the backward (Kramár et al. 2024, arXiv:2403.00745).

    Args:
        paths: the modules whose outputs that layer adds to the stream.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(_OneOf(frozenset(paths)))
        self.paths = tuple(paths)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.paths)!r})"


@dataclass(frozen=True, slots=True)
class _OneOf:
    """Selects modules by their exact paths."""

    paths: frozenset[str]

    def __call__(self, path: str, module: nn.Module) -> bool:
        return path in self.paths
