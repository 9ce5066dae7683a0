"""One random state for all runs of a comparison, so that they do not differ by dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SharedRandomState"]


class SharedRandomState:
    """Starts every run with the state that the first one found, and leaves the generators as the first one did.

    Args:
        model: the model; the generators of its devices are included, besides the CPU's.

    Example:
        >>> shared = SharedRandomState(nn.Dropout())
        >>> drawn = []
        >>> for _ in range(2):
        ...     with shared.run():
        ...         drawn.append(torch.rand(3))
        >>> torch.equal(*drawn)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {each.device for each in model.parameters()} | {each.device for each in model.buffers()}
        self._devices = [each for each in devices if each.type not in ("cpu", "meta")]
        self._before: list[Tensor] | None = None
        self._after: list[Tensor] | None = None

    @contextmanager
    def run(self) -> Iterator[None]:
        """One run of the comparison."""
        if self._before is None:
            self._before = self._states()
        else:
            self._set(self._before)
        try:
            yield
        finally:
            if self._after is None:
                self._after = self._states()
            else:
                self._set(self._after)

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(_generators(each).get_rng_state(each) for each in self._devices)]

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            _generators(device).set_rng_state(state, device)


def _generators(device: torch.device) -> Any:
    return torch.get_device_module(device)
