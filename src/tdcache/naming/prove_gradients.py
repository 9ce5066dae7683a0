"""Where gradients go between the values of a proof: what arithmetic cannot tell apart, gradients do."""

from __future__ import annotations

import torch
from torch import Tensor

from tdcache.naming.gradients import gradient_of, positions
from tdcache.naming.prove_values import Reading

__all__ = ["gradient_between", "leads", "mixes", "random_like", "unit_by_unit"]


def random_like(tensor: Tensor) -> Tensor:
    """Normal numbers of a seed of its own, in the shape, dtype and device of ``tensor``."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(tensor)


def gradient_between(end: Reading, start: Reading, seed: Tensor) -> Tensor | None:
    """The gradient of ``(seed * end).sum()`` at ``start``; None if no graph leads from one to the other."""
    if end.edge is None or start.edge is None:
        return None
    found = gradient_of(end.edge, start.edge, end.place.given_back(seed))
    return None if found is None else start.place.shown(found)


def leads(start: Reading, end: Reading) -> bool:
    """Whether ``end`` depends on ``start``."""
    gradient = gradient_between(end, start, random_like(end.data))
    return gradient is not None and bool((gradient != 0).any())


def mixes(start: Reading, end: Reading) -> bool | None:
    """Whether a position of ``end`` depends on others of ``start``; None where it depends on nothing there."""
    if end.data.numel() != start.data.numel():
        return None
    found: bool | None = None
    for at in positions(tuple(start.data.shape[:-1])):
        mixed = _mixes_at(at, start, end)
        if mixed:
            return True
        found = mixed if found is None else found
    return found


def _mixes_at(at: tuple[int, ...], start: Reading, end: Reading) -> bool | None:
    seed = torch.zeros_like(start.data)
    seed[at] = random_like(start.data[at])
    gradient = gradient_between(end, start, seed.reshape(end.data.shape))
    if gradient is None or not bool((gradient != 0).any()):
        return None
    size = gradient.abs().amax(-1)
    largest = size.max()
    size[at] = 0
    return bool((size > 1e-9 * largest).any())


def unit_by_unit(start: Reading, end: Reading) -> bool:
    """Whether a unit of ``end`` depends on that unit of ``start`` alone."""
    if end.data.shape != start.data.shape:
        return False
    whole = gradient_between(end, start, torch.ones_like(end.data))
    if whole is None:
        return False
    at = tuple(int(each) for each in torch.unravel_index(whole.abs().argmax(), whole.shape))  # not where it is flat
    seed = torch.zeros_like(end.data)
    seed[at] = 1
    gradient = gradient_between(end, start, seed)
    if gradient is None:
        return False
    own = gradient[at].clone()
    gradient[at] = 0
    return bool(own != 0) and not bool((gradient != 0).any())
