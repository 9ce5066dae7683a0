"""What is registered on a model's modules is left out of copies of the model, but for the hooks of hook points."""

import importlib
import inspect

from architecture.source_tree import package_sources
from tdcache.hooks.transient import Transient

HOOKS = ("on_call", "on_output", "on_input")

# A hook point is a module of the model: a copy has its own, with its own hooks.
COPIED = {"GradInputHook", "GradOutputHook", "PointHook", "SavingPointHook", "SpliceTap"}


def hook_classes():
    """Every class of the package with a method that is registered as a hook."""
    for source in package_sources():
        for kind in vars(importlib.import_module(source.module)).values():
            own = (
                inspect.isclass(kind) and kind.__module__ == source.module and not getattr(kind, "_is_protocol", False)
            )
            if own and any(hasattr(kind, name) for name in HOOKS):
                yield kind


def test_hooks_are_left_out_of_copies():
    assert {kind.__name__ for kind in hook_classes() if not issubclass(kind, Transient)} == COPIED
