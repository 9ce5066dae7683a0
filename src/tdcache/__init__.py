"""tdcache: read, keep and change what flows through any PyTorch model."""

from importlib.metadata import PackageNotFoundError, version

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
    DirectionError,
    EditError,
    HookSignatureError,
    InplaceModificationError,
    PathError,
    RepeatedCallWarning,
    SelectionError,
    StopForward,
    TdcacheError,
    TdcacheWarning,
    UnfiredSiteWarning,
)
from tdcache.hooks import CacheProxy, HookDirection, HookFactory, MultiHookHandle, MultiHookManager
from tdcache.modules import HookedModule
from tdcache.reducers import Concatenate, First, Last, Mean, Reducer, Stack, TopK, Variance
from tdcache.selection import Selection, Site, select

try:
    __version__ = version("tdcache")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "unknown"

__all__ = [
    "ActivationCaching",
    "AttributionError",
    "CacheProxy",
    "CacheWriteError",
    "CaptureError",
    "CompositeHookingContextFactory",
    "Concatenate",
    "ContextError",
    "DirectionError",
    "EditError",
    "First",
    "HookDirection",
    "HookFactory",
    "HookSignatureError",
    "HookedModule",
    "HookingContext",
    "HookingContextFactory",
    "HookingContextWithCache",
    "InplaceModificationError",
    "Last",
    "Mean",
    "MultiHookHandle",
    "MultiHookManager",
    "PathError",
    "Reducer",
    "RepeatedCallWarning",
    "Selection",
    "SelectionError",
    "Site",
    "Stack",
    "StopForward",
    "TdcacheError",
    "TdcacheWarning",
    "TopK",
    "UnfiredSiteWarning",
    "Variance",
    "cache_activations",
    "select",
]
