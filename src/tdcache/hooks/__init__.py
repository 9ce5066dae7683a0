"""Hooks: the table of directions, registration, and ready-made hooks for contexts of your own.

Nothing above this package calls torch's ``register_*`` methods, so that order, removal, threads, copies of the model
and compiled graphs are handled in one place.
"""

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
