"""Gradient taps: identities whose backward may read or replace the gradient, or let none through."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.hooks.values import check_fits
from tdcache.introspect import add_tensor_hook
from tdcache.pipeline.calling import HookCall, spell
from tdcache.pipeline.hooks import Hook

__all__ = ["GradientHook", "grad_hook_wrapper", "stop_gradient"]


@dataclass(frozen=True, slots=True)
class GradientHook:
    """A hook for the forward that calls ``hook(grad)`` in the backward: the value goes through unchanged.

    The gradient is the one that arrives from whatever uses the value *after* this hook, and from nothing else. What
    ``hook`` returns, if not None, goes on in its place. ``hook`` gets a copy, so that it may write into it and keep it.
    It is called in every backward through the value, as long as the graph lives, with the keyword arguments that were
    in scope in the forward.

    Raises:
        CaptureError: in the forward, the value needs no gradient, so that ``hook`` would never be called.
    """

    hook: Hook
    call: HookCall = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", HookCall(self.hook))

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        """Give an alias-free copy of ``x`` whose gradient passes through the hook."""
        if not isinstance(x, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
            raise self._no_gradient(x, kwargs.get("path"))
        # A copy, no view: a later in-place operation on a view would take the view, and its hook, out of the graph.
        tapped = x.clone()
        add_tensor_hook(tapped, partial(self._on_grad, args, kwargs))
        return tapped

    def _on_grad(self, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor) -> Tensor | None:
        new = self.call(grad.clone(), args, kwargs)
        if new is not None:
            check_fits(new, grad, kwargs.get("path") or f"the gradient hook {spell(self.hook)}")
        return new  # type: ignore[no-any-return]

    def _no_gradient(self, x: Any, path: str | None) -> CaptureError:
        where = f" at {path!r}" if path else ""
        if not isinstance(x, Tensor):
            what = f"the value is {type(x).__name__}, no tensor"
        elif not torch.is_grad_enabled():
            what = "the forward runs without grad (no_grad or inference_mode)"
        else:
            what = (
                f"the value, {x.dtype} of shape {tuple(x.shape)}, does not require grad (frozen or integer-only input?)"
            )
        return CaptureError(
            f"the gradient hook {spell(self.hook)}{where} would never be called: {what}; run with grad from a "
            "parameter or input that requires it, or leave the hook out",
            paths=(path,) if path else (),
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({spell(self.hook)})"


def grad_hook_wrapper(hook: Hook) -> GradientHook:
    """Make of a hook on gradients a hook for the forward; see :class:`GradientHook`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> grad_hook_wrapper(lambda grad: 10 * grad)(x).sum().backward()
        >>> x.grad
        tensor([10., 10.])
    """
    return GradientHook(hook)


def stop_gradient(x: Tensor) -> Tensor:
    """Let the value through and no gradient back: ``x.detach()``, which shares memory with ``x``."""
    return x.detach()
