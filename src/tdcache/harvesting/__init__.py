"""Dataset loops: activations of many batches, in memory or on disk. The only place for ``torch.distributed``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tdcache.harvesting.buffer import ActivationBuffer
from tdcache.harvesting.entry import harvest, preflight
from tdcache.harvesting.plan import Preflight
from tdcache.harvesting.ray_fleet import harvest_with_ray
from tdcache.public_names import MissingName
from tdcache.store import ActivationDataset

if TYPE_CHECKING:
    from tdcache.compat import (
        LAYOUTS,
        ActivationCollector,
        ActivationStore,
        HookSite,
        Layout,
        collect_activations_from_dataloader,
        extract_representations,
        load_activations,
        resolve_hook_points,
        save_activations,
    )

__all__ = [
    "ActivationBuffer",
    "ActivationCollector",
    "ActivationDataset",
    "ActivationStore",
    "HookSite",
    "LAYOUTS",
    "Layout",
    "Preflight",
    "collect_activations_from_dataloader",
    "extract_representations",
    "harvest",
    "harvest_with_ray",
    "load_activations",
    "preflight",
    "resolve_hook_points",
    "save_activations",
]

_HERE = frozenset(globals())


def __getattr__(name: str) -> Any:
    """The adapters of :mod:`tdcache.compat` that can be had from here as well; they stand on this package."""
    if name in __all__ and name not in _HERE:
        return getattr(import_module("tdcache.compat"), name)
    return MissingName(__name__)(name)
