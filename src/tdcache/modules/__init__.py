"""Hooked modules: how a model is called inside a context, and the verbs to read and change it at one path.

A context works without them, since its hooks belong to the user's modules; they add calling conventions (TensorDict in,
TensorDict out) and runs.
"""

from tdcache.modules.call import ModelCall
from tdcache.modules.hooked import HookedModule
from tdcache.modules.run import HookedModuleRun

__all__ = ["HookedModule", "HookedModuleRun", "ModelCall"]
