"""Gradients averaged over noisy copies of the inputs."""

from __future__ import annotations

from typing import Any

import torch

from tdcache.attribution.base import Attribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import key_of
from tdcache.attribution.integrated import WeightedSum, WeightedTerm
from tdcache.attribution.point import Ask, wide

__all__ = ["SmoothGrad"]


class SmoothGrad(Attribution):
    """The gradient averaged over inputs with Gaussian noise (Smilkov et al. 2017, arXiv:1706.03825).

    All rows of a batch get the same noise, so that a row's scores do not depend on the others.

    Args:
        n_samples: how many noisy copies.
        scale: standard deviation of the noise, as a share of each row's range (its maximum minus its minimum); where a
            row is one number, of the batch's. Without a batch size all inputs are one row.
        seed: of the noise; equal seeds give equal scores.
        multiply_by_inputs: multiply by the input.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        *,
        n_samples: int = 25,
        scale: float = 0.1,
        seed: int = 0,
        multiply_by_inputs: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if n_samples < 1:
            raise ValueError(f"n_samples is at least 1, got {n_samples}")
        self.n_samples = n_samples
        self.scale = scale
        self.seed = seed
        self.multiply_by_inputs = multiply_by_inputs

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.explained()
        points = [
            frame.point(("noise", self.seed, self.scale, at), inputs=self._noisy(frame, at))
            for at in range(self.n_samples)
        ]
        sums = {name: WeightedSum() for name in frame.targets}
        asks: list[Ask] = [
            frame.ask(point, WeightedTerm(sums[name], 1 / self.n_samples, places), target, grads=places)
            for name, target in frame.targets.items()
            for point in points
        ]
        yield asks
        return {
            key_of(self.name, name, place): total.at(place, value) * (wide(value) if self.multiply_by_inputs else 1)
            for name, total in sums.items()
            for place, value in ((place, frame.data.get(place.name)) for place in places)
        }

    def _noisy(self, frame: Frame, at: int) -> dict[Any, torch.Tensor]:
        noisy = {}
        for number, (key, tensor) in enumerate(frame.inputs().items()):
            # Drawn on the CPU, so that a seed means the same on every device.
            generator = torch.Generator().manual_seed(hash((self.seed, at, number)) % (1 << 62))
            rows = frame.data.batch_dims
            noise = torch.randn(tensor.shape[rows:], generator=generator, dtype=torch.float32).to(tensor)
            noisy[key] = tensor + self.scale * _span(tensor, rows) * noise
        return noisy


def _span(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    axes = tuple(range(rows if tensor.ndim > rows else 0, tensor.ndim))
    return tensor.amax(dim=axes, keepdim=True) - tensor.amin(dim=axes, keepdim=True)
