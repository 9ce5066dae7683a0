"""Values seen under ``torch.func``: the tensors that they stand for.

Inside ``vmap``, ``grad`` or ``jvp`` a module sees wrappers, which are of no use once the transform has ended. What is
kept is the tensor inside: of a ``vmap`` with the mapped axis in front, as a Python loop over the samples and a
``torch.stack`` would give it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["in_transform", "is_wrapped", "unwrapped"]

_functorch = torch._C._functorch
is_wrapped = _functorch.is_functorch_wrapped_tensor


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` is under way on this thread."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def unwrapped(value: Tensor) -> Tensor:
    """A copy of the tensor that ``value`` stands for, ``(*mapped, *shape)`` with the axis of the outermost ``vmap`` first.

    A value that does not depend on the sample is repeated. Call it while the transforms are under way.
    """
    from torch._functorch import pyfunctorch

    sizes = {each.level(): _batch_size(each) for each in pyfunctorch.retrieve_all_functorch_interpreters()}
    axis_of: list[tuple[int, int]] = []
    inside = value
    while is_wrapped(inside):
        axis = _functorch.maybe_get_bdim(inside)
        if axis >= 0:
            axis_of.append((_functorch.maybe_get_level(inside), axis))
        inside = _functorch.get_unwrapped(inside)
    with pyfunctorch.temporarily_clear_interpreter_stack():
        return _with_axes(inside.detach(), axis_of, sizes).clone()


def _batch_size(interpreter: Any) -> int | None:
    size = getattr(interpreter, "batch_size", None)
    return None if size is None else size()


def _with_axes(inside: Tensor, axis_of: list[tuple[int, int]], sizes: dict[int, int | None]) -> Tensor:
    left, at = list(range(inside.ndim)), {}
    for level, axis in reversed(axis_of):  # the innermost wrapper counts the axes of the tensor itself
        at[level] = left.pop(axis)
    mapped = [level for level in sorted(sizes) if sizes[level] is not None]
    moved = inside.permute(*(at[level] for level in mapped if level in at), *left)
    for place, level in enumerate(mapped):
        if level not in at:
            moved = moved.unsqueeze(place)
    return moved.expand(*(sizes[level] for level in mapped), *(inside.shape[axis] for axis in left))
