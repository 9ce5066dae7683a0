"""The interface of KempnerForge: the latest activations of a model, and its representations of a dataset."""

from __future__ import annotations

import warnings
import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tdcache.caching import ActivationCaching
from tdcache.compat.hook_names import is_called, literal_first
from tdcache.errors import SelectionError, UnfiredSiteWarning
from tdcache.harvesting.capture import BatchCapture
from tdcache.harvesting.options import HarvestOptions
from tdcache.hooks.port import own_entries
from tdcache.hooks.values import first_tensor, is_entries
from tdcache.modules import HookedModule
from tdcache.reducers import Concatenate
from tdcache.selection import select
from tdcache.types import Selector

__all__ = ["ActivationStore", "extract_representations"]


class ActivationStore:
    """Keeps the latest activations of some modules, as copies on the CPU, while enabled; also a context manager.

    Args:
        model: any module.
        layers: paths, or any selector; by default every module that is called.
        device: where copies are kept.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with ActivationStore(model, ["0"]) as store:
        ...     _ = model(torch.randn(4, 2))
        >>> store.get("0").shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module, layers: Selector | None = None, *, device: torch.device | str = "cpu") -> None:
        self._model = model
        self._layers = layers
        self._device = device
        self._hooks: list[HookedModule] = []
        self._dropped = weakref.finalize(self, _restore_all, self._hooks)
        self._every = _FirstIfAny() if layers is None else None
        self._cache: Any = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._model).__name__}, {'enabled' if self.enabled else 'disabled'})"

    @property
    def enabled(self) -> bool:
        """Whether activations are being kept."""
        return bool(self._hooks)

    @property
    def layer_names(self) -> list[str]:
        """The paths of the modules.

        Raises:
            SelectionError: no module has this path; the message lists the nearest.
        """
        return list(select(self._model, self._selector()).paths)

    def _selector(self) -> Selector:
        return is_called if self._layers is None else literal_first(self._model, self._layers)

    @property
    def activations(self) -> dict[str, Tensor]:
        """The latest activations by path."""
        for hooked in self._hooks:
            self._cache = hooked.cache
        without = self._every.without if self._every is not None else ()
        return {path: value for path, value in self._cache.items() if path not in without}

    def get(self, name: str) -> Tensor | None:
        """The latest activation at a path, or None."""
        return self.activations.get(name)

    def enable(self) -> None:
        """Start keeping activations, if not enabled already; if this fails, the model is unchanged.

        Raises:
            SelectionError: no module has this path; the message lists the nearest.
        """
        if not self._hooks:
            factory = ActivationCaching(self._selector(), callback=self._every, hold="snapshot", device=self._device)
            self._hooks.append(factory.prepare(self._model).open())

    def disable(self) -> None:
        """Stop, and remove every hook from the model; the activations stay."""
        while self._hooks:
            hooked = self._hooks.pop()
            try:
                self._cache = hooked.cache
            finally:
                with warnings.catch_warnings():
                    if self._every is not None:
                        warnings.simplefilter("ignore", UnfiredSiteWarning)  # nobody named these modules
                    hooked.restore()

    def clear(self) -> None:
        """Drop the activations kept so far."""
        for hooked in self._hooks:
            hooked.hooking_context.clear()
        self._cache = {}

    def __enter__(self) -> Self:
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()


def _restore_all(hooks: list[HookedModule]) -> None:
    """Remove the hooks of a store that was garbage collected."""
    while hooks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfiredSiteWarning)  # nobody would read a warning
            hooks.pop().restore()


class _FirstIfAny:
    """The callback when no layers were named: the first tensor of an output, or nothing."""

    def __init__(self) -> None:
        self.without: set[str] = set()
        """The paths whose latest output holds no tensor."""

    def __call__(self, *, module: nn.Module, output: Any, key: str, **_: Any) -> Tensor:
        own = own_entries(module, "out_keys") if is_entries(output) else []
        found = first_tensor(output.get(own[0]) if own else output)
        if found is None:
            self.without.add(key)
            return torch.empty(0)
        self.without.discard(key)
        return found


def extract_representations(
    model: nn.Module,
    dataset: Any,
    layers: Selector,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_samples: int | None = None,
) -> dict[str, Tensor]:
    """The outputs of some layers for a dataset: one tensor per path on the CPU, samples along the first dimension.

    The model runs without gradients in eval mode, and every module's training flag is restored. Rows are written to
    their final place, so that peak memory is the result and one batch.

    Args:
        model: any module.
        dataset: samples; mappings of tensors, tuples that begin with the inputs, or tensors.
        layers: paths, or any selector.
        device: where batches are moved; by default the device of the model.
        batch_size: samples per batch.
        max_samples: how many samples are run at most.

    Raises:
        SelectionError: no such layer, no samples, or no layers were given.
        CaptureError: shapes differ between batches, for instance because samples are padded per batch.
    """
    if max_samples is not None and max_samples < 1:
        raise SelectionError(f"max_samples is at least 1, got {max_samples}", selector=max_samples)
    if len(dataset) == 0:
        raise SelectionError("the dataset holds no sample, so there is nothing to extract")
    capture = BatchCapture(model, HarvestOptions(select=literal_first(model, layers), device=device))
    gathered: dict[str, Concatenate] = {}
    total = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    with capture.open() as hooked:
        for number, batch in enumerate(DataLoader(dataset, batch_size=batch_size, shuffle=False)):
            if number * batch_size >= total:
                break
            for path, value in capture.run(hooked, batch, None).items():
                gathered.setdefault(path, Concatenate(max_rows=total)).update(value)
    return {path: reducer.compute() for path, reducer in gathered.items()}
