"""What a function that torch hands to a function mode is called: one name per operation, however it was written.

``x + 1``, ``x.add(1)`` and ``torch.add(x, 1)`` are all ``add``. Without this table a selector would depend on how the
author of a model happened to spell an operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["DERIVED", "call_name", "is_torch_name", "parameters_of_function", "parameters_of_torch"]

DERIVED = ("q", "k", "v", "scores", "pattern", "z")
"""The places of an attention call that are derived from its arguments or found by their role."""

# Spelling in torch -> the name here. Reflected operators keep their own order of arguments: in 2 - x the first is x.
_ALIASES = {
    "absolute": "abs",
    "arccos": "acos",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "greater": "gt",
    "invert": "bitwise_not",
    "less": "lt",
    "multiply": "mul",
    "negative": "neg",
    "radd": "add",
    "rdiv": "div",
    "rfloordiv": "floor_divide",
    "floordiv": "floor_divide",
    "rmatmul": "matmul",
    "rmod": "remainder",
    "rmul": "mul",
    "rpow": "pow",
    "rsub": "sub",
    "rtruediv": "div",
    "special_expit": "sigmoid",
    "special_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
    "truediv": "div",
    "idiv": "div_",
    "ifloordiv": "floor_divide_",
    "imod": "remainder_",
    "ipow": "pow_",
    "divide_": "div_",
    "multiply_": "mul_",
    "subtract_": "sub_",
    "true_divide_": "div_",
}


@lru_cache(maxsize=4096)
def call_name(func: Callable[..., Any]) -> str | None:
    """The name of a torch function, operator or tensor method; None for a property such as ``shape``.

    Example:
        >>> [call_name(func) for func in (torch.Tensor.__rsub__, torch.true_divide, F.relu, torch.Tensor.add_)]
        ['sub', 'div', 'relu', 'add_']
    """
    name = getattr(func, "__name__", None)
    if not isinstance(name, str) or name in {"__get__", "__set__", "__delete__"}:
        return None
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.startswith("_") and hasattr(F, name[1:]):  # a half of boolean_dispatch
        name = name[1:]
    return _ALIASES.get(name, name)


def is_torch_name(name: str) -> bool:
    """Whether torch has a function, operator or tensor method that is called ``name`` here."""
    return any(hasattr(holder, each) for holder in (torch, torch.Tensor, F) for each in (name, f"__{name}__"))


@lru_cache(maxsize=1024)
def parameters_of_torch(name: str) -> tuple[str, ...]:
    """The names of the parameters of a function or method of torch by position; empty where nothing says them."""
    if not is_torch_name(name):
        return ()
    described = torch.overrides.get_testing_overrides()
    for holder in (F, torch, torch.Tensor):
        function = getattr(holder, name, None)
        if function is not None:
            return parameters_of_function(described.get(function, function))
    return ()


def parameters_of_function(function: Any) -> tuple[str, ...]:
    """The names of a function's parameters by position; empty where nothing says them."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
