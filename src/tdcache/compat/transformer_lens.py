"""The interface of TransformerLens: its names for hook points and for models that contain them.

They are those of :mod:`tdcache.points`; a script for TransformerLens needs no other change than its imports.
"""

from __future__ import annotations

from tdcache.points import HookedRootModule, HookPoint, LensHandle
from tdcache.points.point_cache import PointCache

__all__ = ["HookPoint", "HookedRootModule", "LensHandle", "PointCache"]
