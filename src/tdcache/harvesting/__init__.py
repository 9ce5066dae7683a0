"""Dataset loops: activations of many batches, in memory or on disk. The only place for ``torch.distributed``."""

from tdcache.harvesting.buffer import ActivationBuffer
from tdcache.harvesting.loop import harvest, preflight
from tdcache.harvesting.memory import (
    ActivationCollector,
    ActivationStore,
    collect_activations_from_dataloader,
    extract_representations,
)
from tdcache.harvesting.names import LAYOUTS, HookSite, Layout, resolve_hook_points
from tdcache.harvesting.plan import Preflight
from tdcache.harvesting.ray_fleet import harvest_with_ray
from tdcache.harvesting.saved import load_activations, save_activations
from tdcache.store import ActivationDataset

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
