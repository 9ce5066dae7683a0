"""tdcache: read, keep and change what flows through any PyTorch model."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

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
    CaptureError,
    ContextError,
    DamagedError,
    DirectionError,
    EditError,
    HookSignatureError,
    InplaceModificationError,
    PathError,
    RepeatedCallWarning,
    SelectionError,
    SpecError,
    StopForward,
    StoreError,
    TdcacheError,
    TdcacheWarning,
    UnfiredSiteWarning,
)
from tdcache.hooks import CacheProxy, HookDirection, HookFactory, MultiHookHandle, MultiHookManager
from tdcache.interventions import (
    Ablation,
    ActivationAddition,
    ActivationPatching,
    CausalTracing,
    Intervention,
    PathPatching,
    Region,
    ResumeFrom,
    SteeringVectors,
    Step,
    load_intervention,
    resume_from,
    save_intervention,
)
from tdcache.modules import HookedModule, HookedModuleRun
from tdcache.pipeline import Splice
from tdcache.reducers import Concatenate, First, Last, Mean, Reducer, Stack, TopK, Variance
from tdcache.selection import Selection, Site, select

if TYPE_CHECKING:
    from tdcache.harvesting import ActivationBuffer, ActivationDataset, harvest

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
    "CaptureError",
    "CausalTracing",
    "CompositeHookingContextFactory",
    "Concatenate",
    "ContextError",
    "DamagedError",
    "DirectionError",
    "EditError",
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
    "PathError",
    "PathPatching",
    "Reducer",
    "Region",
    "RepeatedCallWarning",
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
    "harvest",
    "load_intervention",
    "resume_from",
    "save_intervention",
    "select",
]


def __getattr__(name: str) -> object:
    if name in ("ActivationBuffer", "ActivationDataset", "harvest"):  # loaded when asked for: they bring data loading and files with them
        import tdcache.harvesting

        return getattr(tdcache.harvesting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
