"""tdcache: read, keep and change what flows through any PyTorch model."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from tdcache.cache.named_cache import NamedCache
from tdcache.caching import ActivationCaching, cache_activations
from tdcache.contexts import (
    CompositeHookingContextFactory,
    HookingContext,
    HookingContextFactory,
    HookingContextWithCache,
)
from tdcache.errors import (
    AttributionError,
    CacheWriteError,
    CanonicalNameError,
    CaptureError,
    ContextError,
    DamagedError,
    DirectionError,
    EditError,
    HookSignatureError,
    InplaceModificationError,
    PathError,
    RepeatedCallWarning,
    ResidualError,
    SelectionError,
    SpecError,
    StopForward,
    StoreError,
    TdcacheError,
    TdcacheWarning,
    UnfiredSiteWarning,
)
from tdcache.function_calls.record import calls, select
from tdcache.hooks import CacheProxy, HookDirection, HookFactory, MultiHookHandle, MultiHookManager
from tdcache.interventions import (
    Ablation,
    ActivationAddition,
    ActivationPatching,
    CausalTracing,
    EditOptions,
    Intervention,
    PathPatching,
    Region,
    ResumeFrom,
    SteeringVectors,
    load_intervention,
    resume_from,
    save_intervention,
)
from tdcache.modules import HookedModule, HookedModuleRun
from tdcache.named_places import NamedPlace, Names
from tdcache.pipeline import Splice
from tdcache.public_names import PACKAGES, MissingName
from tdcache.reducers import Concatenate, First, Last, Mean, Reducer, Stack, TopK, Variance
from tdcache.selection import Selection, Site
from tdcache.steps import Step

if TYPE_CHECKING:
    from tdcache.harvesting import ActivationBuffer, ActivationDataset, harvest
    from tdcache.naming import names

try:
    __version__ = version("tdcache")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

__all__ = [
    "Ablation",
    "ActivationAddition",
    "ActivationBuffer",
    "ActivationCaching",
    "ActivationDataset",
    "ActivationPatching",
    "AttributionError",
    "CacheProxy",
    "CacheWriteError",
    "CanonicalNameError",
    "CaptureError",
    "CausalTracing",
    "CompositeHookingContextFactory",
    "Concatenate",
    "ContextError",
    "DamagedError",
    "DirectionError",
    "EditError",
    "EditOptions",
    "First",
    "HookDirection",
    "HookFactory",
    "HookSignatureError",
    "HookedModule",
    "HookedModuleRun",
    "HookingContext",
    "HookingContextFactory",
    "HookingContextWithCache",
    "InplaceModificationError",
    "Intervention",
    "Last",
    "Mean",
    "MultiHookHandle",
    "MultiHookManager",
    "NamedCache",
    "NamedPlace",
    "Names",
    "PathError",
    "PathPatching",
    "Reducer",
    "Region",
    "RepeatedCallWarning",
    "ResidualError",
    "ResumeFrom",
    "Selection",
    "SelectionError",
    "Site",
    "SpecError",
    "Splice",
    "Stack",
    "SteeringVectors",
    "Step",
    "StopForward",
    "StoreError",
    "TdcacheError",
    "TdcacheWarning",
    "TopK",
    "UnfiredSiteWarning",
    "Variance",
    "cache_activations",
    "calls",
    "harvest",
    "load_intervention",
    "names",
    "resume_from",
    "save_intervention",
    "select",
]


# Loaded when asked for: they bring data loading, files or pictures with them, or are many.
_LATER = {
    "ActivationBuffer": "harvesting",
    "ActivationDataset": "harvesting",
    "harvest": "harvesting",
    "names": "naming",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(f"tdcache.{_LATER[name]}"), name)
    if name in PACKAGES:
        return import_module(f"tdcache.{name}")
    return MissingName(__name__)(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, *PACKAGES})
