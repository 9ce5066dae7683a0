"""Hook points: named places inside a forward, with the interface of TransformerLens.

Code written for ``HookPoint``, ``run_with_cache`` and ``run_with_hooks`` runs after changing the import; hook points
can also be inserted into models that were written without any.
"""

from tdcache.points.hook_point import HookPoint, LensHandle
from tdcache.points.report import HookReport, HookRow, list_hooks
from tdcache.points.reshape import Reshape
from tdcache.points.root import HookedRootModule, HookRoot, hook_root
from tdcache.points.splice import SplicedPoint, insert_hook_point
from tdcache.public_names import MissingName

__all__ = [
    "HookPoint",
    "HookReport",
    "HookRoot",
    "HookRow",
    "HookedRootModule",
    "LensHandle",
    "Reshape",
    "SplicedPoint",
    "hook_root",
    "insert_hook_point",
    "list_hooks",
]

__getattr__ = MissingName(__name__)
