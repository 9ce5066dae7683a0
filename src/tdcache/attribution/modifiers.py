"""What changes the meaning of a backward: small recipes that add hooks and own no forward.

Each is a factory of its own, for everything in the pass, and may stand in ``modifiers=`` of one method, for its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor, nn

from tdcache.attribution.point import PointRows
from tdcache.contexts import HookingContextFactory
from tdcache.function_calls.stand_in import check_selector, resolve_site
from tdcache.hooks import MultiHookHandle, Order, OutputPort, attach
from tdcache.hooks.transient import Transient
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.place_modules import place_at, refuse_at_names, sites_of
from tdcache.types import Index, Match, Pick, Selector

__all__ = ["GradDrop", "GuidedReLU", "Installed", "Modifier", "ModifierHook", "ScaleGradient", "StopGradient"]


class Installed(HookingContextFactory):
    """Base of what adds hooks for some rows of a pass, or as a context of its own for all: override :meth:`install`."""

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Add the hooks, for some rows or (None) for all."""
        raise NotImplementedError

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        handle = MultiHookHandle()
        with handle.installing():
            self.install(module.model, None, handle)
        return handle


class Modifier(Installed):
    """Base of the modifiers: override :meth:`change`, which gets the gradient of each selected module's output.

    Args:
        selector: which modules.
        match: how patterns are held against paths.
        pick: which tensor of a structured output; ``"all"`` for each of them.
        index: the part of the tensor that is changed: ``(..., slice(0, 64))``.
        names: the canonical names of the model, which the selector then means.
    """

    def __init__(
        self,
        selector: Selector,
        *,
        match: Match = "full",
        pick: Pick = None,
        index: Index = None,
        names: Names | None = None,
    ) -> None:
        super().__init__()
        refuse_at_names(names, ())
        self.names = names
        check_selector(selector, match)
        self.selector = selector
        self.match: Match = match
        self.pick = pick
        self.index = index

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selector!r})"

    def change(self, grad: Tensor, output: Tensor) -> Tensor:
        """The gradient that takes the place of ``grad``."""
        raise NotImplementedError

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Add the hooks, for some rows or (None) for all."""
        for path, module in self._sites(model):
            hook = ModifierHook(self, OutputPort(path, self.pick), rows)
            handle.add(attach(module, hook.on_call, order=hook.order))

    def _sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(path, module) for path, module, _ in sites_of(model, self.selector, self.names, match=self.match)]


@dataclass(frozen=True, slots=True)
class ModifierHook(Transient):
    """Watches the gradient of what one module returns; of a tensor that it hands on, the module's own part."""

    modifier: Modifier
    port: OutputPort
    rows: PointRows | None
    order: int = Order.EDIT
    rowwise: bool = True  # it treats rows independently, so that a pass may go on stacking them

    def on_call(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Have the modifier change the gradient."""
        port, changed = self.port, None
        every = port.pick == "all"
        tensors = [t for _, t in port.parts(module, args, output)] if every else [port.read(module, args, output)]
        for tensor in tensors:
            if not tensor.requires_grad:
                continue
            axis = None if self.rows is None else self.rows.axis_in(port, module, args, output, tensor)
            handed = port.watch(module, args, output, tensor, _Change(self, tensor.detach(), axis))
            if handed is not None:
                output = changed = handed
        return changed


@dataclass(frozen=True, slots=True)
class _Change:
    """The modifier's change of one gradient, in its rows and at its index."""

    hook: ModifierHook
    output: Tensor
    axis: int | None

    def __call__(self, grad: Tensor) -> Tensor:
        rows = self.hook.rows
        if rows is None or self.axis is None:
            return self._indexed(grad, self.output)
        own = rows.part(self.output, self.axis)
        return rows.change(grad, self.axis, lambda part: self._indexed(part, own))

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
        """Return the gradient with its negative entries set to zero."""
        return grad.clamp(min=0)


class StopGradient(Modifier):
    """No gradient passes through what the selected modules return: it counts as a constant."""

    def change(self, grad: Tensor, output: Tensor) -> Tensor:
        """Return a gradient of zeros, so that nothing flows through the module."""
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
        """Return the gradient multiplied by ``scale``."""
        return grad * self.scale


class GradDrop(StopGradient):
    """Leaves out what one layer adds to the residual stream in the backward (Kramár et al. 2024, arXiv:2403.00745).

    Args:
        paths: the modules whose outputs that layer adds to the stream.
        names: the canonical names that ``paths`` are, where they are names.
    """

    def __init__(self, paths: Sequence[str], names: Names | None = None) -> None:
        super().__init__([regex.escape(path) for path in paths], names=names)
        self.paths = tuple(paths)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.paths)!r})"

    def _sites(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        if self.names is not None:
            return [place_at(self.names, model, path) for path in self.paths]
        return [resolve_site(model, path) for path in self.paths]  # an unknown one is an error
