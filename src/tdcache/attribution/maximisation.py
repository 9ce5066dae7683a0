"""Inputs that a target likes: gradient ascent from the given ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.base import Attribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of
from tdcache.errors import AttributionError
from tdcache.types import CacheKey

__all__ = ["ActivationMaximisation"]


class ActivationMaximisation(Attribution):
    """Moves the inputs uphill (Erhan et al. 2009); the results are ``("attr", in_key)``, of the inputs' shapes.

    Each step is ``x + rate * g / |g|``, with the norm over each row. The model's outputs are those of the given inputs.

    Args:
        n_steps: how many steps.
        rate: their length.
        project: brings an input back to where it may be, e.g. ``lambda x: x.clamp(0, 1)``.
        **options: see :class:`Attribution`. One target only.
    """

    def __init__(
        self, *, n_steps: int = 32, rate: float = 0.1, project: Callable[[Tensor], Tensor] | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self.n_steps = n_steps
        self.rate = rate
        self.project = project

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.explained()
        if len(frame.targets) > 1:
            raise AttributionError(f"one input cannot maximise {len(frame.targets)} targets; give one, or their sum")
        ((name, target),) = frame.targets.items()
        current: dict[CacheKey, Tensor] = frame.inputs()
        for step in range(self.n_steps):
            seen = Seen(places, with_values=False)
            point = frame.point(("maximise", id(self), step), inputs=current)
            yield [frame.ask(point, seen, target, grads=places)]
            current = {place.name: self._moved(current[place.name], seen.grads[place], frame) for place in places}
        return {key_of(self.name, name, place): current[place.name] for place in places}

    def _moved(self, value: Tensor, grad: Tensor, frame: Frame) -> Tensor:
        axes = tuple(range(min(frame.data.batch_dims, grad.ndim - 1), grad.ndim))
        norm = torch.linalg.vector_norm(grad, dim=axes, keepdim=True)
        moved = value + self.rate * grad / norm.clamp(min=1e-12)
        return moved if self.project is None else self.project(moved)
