"""Hooked modules: how a model is called inside a context."""

from tdcache.modules.call import ModelCall
from tdcache.modules.hooked import HookedModule
from tdcache.modules.run import HookedModuleRun

__all__ = ["HookedModule", "HookedModuleRun", "ModelCall"]
