"""Hooks: the directions, their registration, and ready ones for one's own contexts."""

from tdcache.hooks.attach import attach, attach_outputs, attach_ports, bracket, register_hook_to_module
from tdcache.hooks.directions import DIRECTIONS, Direction, direction_row
from tdcache.hooks.factory import CacheProxy, HookFactory
from tdcache.hooks.manager import MultiHookManager
from tdcache.hooks.port import InputPort, OutputPort, Port, port_at
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.types import HookDirection

__all__ = [
    "CacheProxy",
    "DIRECTIONS",
    "Direction",
    "HookDirection",
    "HookFactory",
    "InputPort",
    "MultiHookHandle",
    "MultiHookManager",
    "Order",
    "OutputPort",
    "Port",
    "attach",
    "attach_outputs",
    "attach_ports",
    "bracket",
    "direction_row",
    "port_at",
    "register_hook_to_module",
]
