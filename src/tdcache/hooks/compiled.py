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
    """Let ``model`` run eagerly until ``undo`` closes, if it was traced before; says whether it was."""
    if not has_stale_graph(model):
        return False
    if is_optimized_module(model):
        traced = model.__dict__["forward"]
        undo.callback(model.__dict__.__setitem__, "forward", traced)
        model.__dict__["forward"] = model.get_submodule("_orig_mod").__call__
    for module in compiled_modules(model):
        undo.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
        module._compiled_call_impl = None
    return True
