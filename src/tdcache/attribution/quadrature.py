"""Nodes and weights on [0, 1] for integrals along a path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["METHODS", "quadrature"]


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Golub and Welsch (1969): the eigenvalues of the Jacobi matrix; exact up to degree ``2 * count - 1``."""
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / torch.sqrt(4 * k**2 - 1)
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (values + 1) / 2, vectors[0] ** 2


def _trapezoid(count: int) -> tuple[Tensor, Tensor]:
    if count < 2:
        raise ValueError(f"method='trapezoid' needs n_steps >= 2, got {count}")
    weights = torch.full((count,), 1 / (count - 1), dtype=torch.float64)
    weights[0] = weights[-1] = 0.5 / (count - 1)
    return torch.linspace(0, 1, count, dtype=torch.float64), weights


def _riemann(count: int, shift: float) -> tuple[Tensor, Tensor]:
    nodes = (torch.arange(count, dtype=torch.float64) + shift) / count
    return nodes, torch.full((count,), 1 / count, dtype=torch.float64)


METHODS: Mapping[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "gausslegendre": _gauss_legendre,
    "trapezoid": _trapezoid,
    "left": lambda count: _riemann(count, 0.0),
    "middle": lambda count: _riemann(count, 0.5),
    "right": lambda count: _riemann(count, 1.0),
}
"""The rules by name: Gauss-Legendre, the trapezoid rule, and left, middle and right Riemann sums."""


def quadrature(method: str, n_steps: int) -> list[tuple[float, float]]:
    """``(node, weight)`` pairs in rising order; the weights sum to one.

    Raises:
        ValueError: unknown method, or too few steps.

    Example:
        >>> quadrature("middle", 2)
        [(0.25, 0.5), (0.75, 0.5)]
    """
    if method not in METHODS:
        raise ValueError(f"unknown quadrature method {method!r}; use one of {', '.join(map(repr, METHODS))}")
    if n_steps < 1:
        raise ValueError(f"n_steps is at least 1, got {n_steps}")
    nodes, weights = METHODS[method](n_steps)
    return list(zip(nodes.tolist(), weights.tolist(), strict=True))
