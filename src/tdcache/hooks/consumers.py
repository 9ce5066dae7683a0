"""Who uses a tensor, asked while its gradient is computed: its hook sees only the sum over all of them.

autograd keeps no list of them. But what the backward began at is on the stack, and from there the graph can be walked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tdcache.introspect import backward_outputs, current_node

__all__ = ["backward_consumers"]


def backward_consumers(output: int) -> list[Any] | None:
    """Which nodes of the backward under way give a gradient to the node whose hook is running; slow.

    Args:
        output: of which output of that node.

    Returns:
        The nodes, once per use; None if what the backward began at cannot be found.
    """
    roots = [each.grad_fn if isinstance(each, Tensor) else each.node for each in backward_outputs()]
    node = current_node()
    found: list[Any] = []
    ahead, seen = [root for root in roots if root is not None], set[Any]()
    while ahead:
        each = ahead.pop()
        if each in seen:
            continue
        seen.add(each)
        for after, number in each.next_functions:
            if after is node and number == output:
                found.append(each)
            elif after is not None:
                ahead.append(after)
    return found if roots else None
