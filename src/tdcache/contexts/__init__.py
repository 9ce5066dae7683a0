"""Contexts: recipes, their binding to a model, and several of them as one."""

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
