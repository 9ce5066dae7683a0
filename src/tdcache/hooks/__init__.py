"""Hooks: the directions, their registration, and ready ones for one's own contexts."""

from tdcache.hooks.attach import MultiHookHandle, Order, attach, attach_outputs, bracket, register_hook_to_module
from tdcache.hooks.directions import DIRECTIONS, Direction, direction_row
from tdcache.hooks.factory import CacheProxy, HookFactory
from tdcache.hooks.manager import MultiHookManager
from tdcache.types import HookDirection

__all__ = [
    "CacheProxy",
    "DIRECTIONS",
    "Direction",
    "HookDirection",
    "HookFactory",
    "MultiHookHandle",
    "MultiHookManager",
    "Order",
    "attach",
    "attach_outputs",
    "bracket",
    "direction_row",
    "register_hook_to_module",
]
