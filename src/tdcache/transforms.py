"""Tensors inside a transform of ``torch.func``.

A module inside ``vmap`` or ``grad`` sees wrapper tensors that are invalid once the transform ends; a cache that kept
them would fail when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import CaptureError, listed

__all__ = ["escaped", "in_transform", "is_wrapped", "transform_under_way", "unwrapped"]

is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor is what a module sees inside a transform of ``torch.func``."""

transform_under_way: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
"""The innermost transform of ``torch.func`` on this thread, or None. Not to be asked in a graph."""


def in_transform() -> bool:
    """Whether a transform of ``torch.func``, or autograd's batch of gradients, is under way on this thread."""
    if torch.compiler.is_compiling():
        return False
    return transform_under_way() is not None or _batches_of_gradients() > 0


def _batches_of_gradients() -> int:
    """How many older ``vmap``s are under way: ``is_grads_batched`` and ``jacobian(vectorize=True)`` use them."""
    depth: int = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return depth


def _without_batches(value: Tensor) -> Tensor:
    """``value`` with the axes of older ``vmap``s as its first ones, the outermost first."""
    for level in range(_batches_of_gradients(), 0, -1):
        if torch._C._functorch.is_legacy_batchedtensor(value):
            value = torch._remove_batch_dim(value, level, 1, 0)
    return value


def escaped(paths: Sequence[str]) -> CaptureError:
    """The error for values that were kept at ``paths``, inside a transform that has ended."""
    return CaptureError(
        f"{listed(paths)} ran inside a torch.func transform (vmap, grad, jvp) within the model's forward, "
        "and what is kept has no meaning after it; keep a copy with hold='snapshot'",
        paths=paths,
    )


def unwrapped(value: Tensor) -> Tensor:
    """A copy of the tensor that ``value`` stands for inside ``vmap``, ``grad`` or ``jvp``, without their graphs.

    Call it while the transforms are under way. Of a ``vmap`` it is what a Python loop over the samples and a
    ``torch.stack`` would give: ``(*mapped, *shape)``, the outermost first; what does not depend on the sample is
    repeated.
    """
    functorch, layers = torch._C._functorch, torch._functorch.pyfunctorch
    value = _without_batches(value)
    if functorch.peek_interpreter_stack() is None:
        return value.detach().clone()
    mapped = {
        layer.level(): layer.batch_size()
        for layer in layers.retrieve_all_functorch_interpreters()
        if isinstance(layer, layers.VmapInterpreter)
    }
    axes: list[tuple[int, int]] = []
    inside = value
    while is_wrapped(inside):
        axes.append((functorch.maybe_get_level(inside), functorch.maybe_get_bdim(inside)))
        inside = functorch.get_unwrapped(inside)
    left, axis_of = list(range(inside.ndim)), {}
    for level, axis in reversed(axes):  # the innermost wrapper counts the axes of the tensor itself
        if axis >= 0:
            axis_of[level] = left.pop(axis)
    with layers.temporarily_clear_interpreter_stack():
        moved = inside.detach().permute(*(axis_of[level] for level in sorted(mapped) if level in axis_of), *left)
        for place, level in enumerate(sorted(mapped)):
            if level not in axis_of:
                moved = moved.unsqueeze(place)
        sizes = [mapped[level] for level in sorted(mapped)]
        return moved.expand(*sizes, *moved.shape[len(sizes) :]).clone()
