"""Compiled models: a graph that was traced before the hooks came skips them, so inside a context it is not used.

``torch.compile`` does not guard on hooks (``skip_nnmodule_hook_guards``, pytorch#117758). Hooks that are there when a
model is first traced become part of its graph; hooks that come later are silently never called.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from tdcache.introspect import compiled_modules, has_stale_graph, is_optimized_module

__all__ = ["eager_where_stale"]


def eager_where_stale(model: nn.Module, undo: ExitStack) -> bool:
    """Let ``model`` run eagerly until ``undo`` closes, if it was traced before; says whether it was.

    A module of torch.nn's own classes that was compiled in place never makes a graph (its frames are skipped), but
    would have every hook compiled by itself: it runs eagerly in any case.
    """
    stale = has_stale_graph(model)
    if stale and is_optimized_module(model):
        undo.callback(model.__dict__.__setitem__, "forward", model.__dict__["forward"])
        model.__dict__["forward"] = model.get_submodule("_orig_mod").__call__
    compiled = compiled_modules(model) if stale or model._compiled_call_impl is not None else []
    for module in compiled:
        if stale or type(module).forward.__module__.startswith("torch.nn."):
            undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = None
    return stale
