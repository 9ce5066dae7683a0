"""Contexts: recipes (factories), their binding to one model, and several recipes as one.

The recipe is separate from its binding so that it can be pickled, compared and used on many models; everything that has
to be undone belongs to the binding.
"""

from tdcache.contexts.cached import HookingContextWithCache
from tdcache.contexts.composite import CompositeHookingContext, CompositeHookingContextFactory
from tdcache.contexts.context import HookingContext
from tdcache.contexts.factory import HookingContextFactory

__all__ = [
    "CompositeHookingContext",
    "CompositeHookingContextFactory",
    "HookingContext",
    "HookingContextFactory",
    "HookingContextWithCache",
]
