"""Hooks in the forward that act in the backward: they read, replace or block the gradient of a value.

A tensor hook on the value itself would see the gradients of all its uses; one on a copy sees only what comes from after
this point of the pipeline.
"""

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
    """A forward hook that leaves the value unchanged and calls ``hook(grad)`` in the backward.

    The gradient is the one from all uses of the value *after* this hook, and from no other. A return value other than
    None replaces it. ``hook`` gets a copy, which it may modify and keep. It is called in every backward through the
    value, as long as the graph exists, with the keyword arguments that were in scope in the forward.

    Raises:
        CaptureError: in the forward, the value does not require grad, so that ``hook`` would never be called.
    """

    hook: Hook
    call: HookCall = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", HookCall(self.hook))

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        """Return a copy of ``x`` whose gradient passes through the hook."""
        if not isinstance(x, Tensor) or not x.requires_grad or not torch.is_grad_enabled():
            raise self._no_gradient(x, kwargs.get("path"))
        # A copy, since a later in-place operation on a view would remove the view, with its hook, from the graph.
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
    """Turn a hook on gradients into a hook for the forward; see :class:`GradientHook`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> grad_hook_wrapper(lambda grad: 10 * grad)(x).sum().backward()
        >>> x.grad
        tensor([10., 10.])
    """
    return GradientHook(hook)


def stop_gradient(x: Tensor) -> Tensor:
    """Pass the value and block its gradient: ``x.detach()``, which shares memory with ``x``."""
    return x.detach()
