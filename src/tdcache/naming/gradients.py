"""Gradients between two values of one forward, by their places in the graph.

A tensor that is overwritten after it was seen leads elsewhere in the graph; what was noted when it was seen does not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["edge_of", "gradient_of", "positions"]


def edge_of(tensor: Tensor) -> GradientEdge | None:
    """Where a gradient of ``tensor``, as it is now, can be asked for or started; None if it has no graph."""
    try:
        return get_gradient_edge(tensor) if tensor.requires_grad else None
    except (AssertionError, RuntimeError):  # a leaf of a mode that records nothing
        return None


def gradient_of(end: GradientEdge, start: GradientEdge, seed: Tensor) -> Tensor | None:
    """The gradient of ``(seed * end).sum()`` at ``start``; None if no way leads there. The graph is kept."""
    found: tuple[Tensor | None, ...]
    found = torch.autograd.grad((end,), (start,), (seed,), retain_graph=True, allow_unused=True)
    return found[0]


def positions(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A few positions with others before and after them, and none in the padding that a model may add at the end."""
    return tuple(dict.fromkeys(tuple(min(size // 2, at) for size in shape) for at in (3, 5, 2)))
