"""The interfaces of other libraries, as thin adapters over tdcache: existing scripts run after a changed import.

======================================= ==============================================================
:mod:`tdcache.compat.transformer_lens`  TransformerLens: hook points, and models that hold them
:mod:`tdcache.compat.representations`   KempnerForge: the latest activations, and those of a dataset
:mod:`tdcache.compat.collector`         nanochat: rows of many batches at TransformerLens-style names
:mod:`tdcache.compat.activation_files`  dicts of activations in files of four kinds
======================================= ==============================================================

The same names can be had from :mod:`tdcache.points` and :mod:`tdcache.harvesting`.
"""

from tdcache.compat.activation_files import load_activations, save_activations
from tdcache.compat.collector import ActivationCollector, collect_activations_from_dataloader
from tdcache.compat.hook_names import LAYOUTS, HookSite, Layout, resolve_hook_points
from tdcache.compat.representations import ActivationStore, extract_representations
from tdcache.compat.transformer_lens import HookedRootModule, HookPoint, LensHandle, PointCache

__all__ = [
    "ActivationCollector",
    "ActivationStore",
    "HookPoint",
    "HookSite",
    "HookedRootModule",
    "LAYOUTS",
    "Layout",
    "LensHandle",
    "PointCache",
    "collect_activations_from_dataloader",
    "extract_representations",
    "load_activations",
    "resolve_hook_points",
    "save_activations",
]
