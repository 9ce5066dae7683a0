"""Calling a model with a batch: by what its forward takes, in eval mode, on its device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

__all__ = ["Inputs", "as_evaluated", "call_model", "model_device", "to_device"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model's forward takes."""

    names: frozenset[str] | None
    """The keyword arguments; None for any."""
    needed: int
    """How many positional arguments it cannot do without."""

    @classmethod
    def of(cls, model: nn.Module) -> Inputs:
        """Read from the signature of ``forward``."""
        own = getattr(model, "_orig_mod", model)  # a compiled model's signature is anything
        parameters = inspect.signature(own.forward).parameters.values()
        needed = [each for each in parameters if each.default is each.empty and each.kind in _POSITIONAL]
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        return cls(None if takes_any else frozenset(each.name for each in parameters), len(needed))


def call_model(called: Callable[..., Any], batch: Any, inputs: Inputs) -> None:
    """Call a model with a batch: the first of a tuple or list, or as many as it needs; a mapping's tensors by name.

    Args:
        called: the model, or a hooked module around it.
        batch: on the model's device.
        inputs: what the model takes.
    """
    if isinstance(batch, tuple | list):
        called(*batch[: max(1, inputs.needed)])  # behind the inputs are labels, as a supervised dataset has them
        return
    if not isinstance(batch, Mapping) or isinstance(batch, TensorDictBase):
        called(batch)
        return
    named = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    taken = {name: value for name, value in named.items() if inputs.names is None or name in inputs.names}
    if taken or not named:
        called(**taken)
    else:
        called(named.get("input_ids", next(iter(named.values()))))  # a model that calls its input otherwise


@contextmanager
def as_evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside a block; every module's own flag is put back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def model_device(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer is; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    if isinstance(batch, Tensor | TensorDictBase):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [to_device(each, device) for each in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
