"""The stacks of blocks in a forward, whether a block is a module of its own or not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tdcache.naming.resolve_blocks import BlockStack, called_stack, fill
from tdcache.naming.resolve_scattered import nested_lists, sibling_lists
from tdcache.naming.trace import ForwardTrace
from tdcache.naming.trace_attention import attentions
from tdcache.naming.trace_flow import DataFlow

__all__ = ["find_stacks"]


def find_stacks(trace: ForwardTrace, flow: DataFlow) -> list[BlockStack]:
    """The stacks of a forward, in the order in which they run.

    A stack is a container whose children are called and each add something to a stream, or whose children are lists of
    sublayers that do. Of containers in containers the outermost counts whose children all do.
    """
    found: list[BlockStack] = []
    ran = {call.path for call in trace.calls}
    containers = {
        path: module
        for path, module in trace.model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    }
    for path, module in containers.items():
        if _inside(path, found):
            continue
        called = any(f"{path}.{name}".lstrip(".") in ran for name, _ in module.named_children())
        stack = (called_stack if called else nested_lists)(path, module, trace, flow)
        if stack is not None:
            found.append(stack)
    if not found:  # sublayers one after the other in one list, or one list for each kind
        flat = (nested_lists(path, module, trace, flow) for path, module in containers.items())
        found = list(filter(None, flat))[:1] or list(sibling_lists(trace, flow))[:1]
    everything = attentions(trace)
    for stack in found:
        for block in stack.blocks:
            fill(block, flow, everything)
    return sorted(found, key=lambda stack: stack.blocks[0].call.begin)


def _inside(path: str, found: Sequence[BlockStack]) -> bool:
    return any(path.startswith(stack.path + ".") for stack in found)
