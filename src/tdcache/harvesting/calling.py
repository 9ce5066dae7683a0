"""Calling a model with a batch: by what its forward takes, in eval mode, on its device."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import SelectionError, listed

__all__ = ["Inputs", "as_evaluated", "call_model", "model_device", "to_device"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model's forward takes."""

    names: frozenset[str] | None
    """The keyword arguments; None for any."""
    needed: int
    """How many positional arguments it cannot do without."""
    in_keys: tuple[Any, ...] = ()
    """The entries of a mapping that are the positional arguments, in order; none to find them by their names."""
    takes_tensordicts: bool = False

    @classmethod
    def of(cls, model: nn.Module, in_keys: Sequence[Any] | None = None) -> Inputs:
        """Read from the signature of ``forward``."""
        own = getattr(model, "_orig_mod", model)  # a compiled model's signature is anything
        parameters = inspect.signature(own.forward).parameters.values()
        needed = [each for each in parameters if each.default is each.empty and each.kind in _POSITIONAL]
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
        names = None if takes_any else frozenset(each.name for each in parameters)
        return cls(names, len(needed), tuple(in_keys or ()), hasattr(own, "in_keys"))


def call_model(called: Callable[..., Any], batch: Any, inputs: Inputs) -> None:
    """Call a model with a batch: the first of a tuple or list, or as many as it needs; a mapping's tensors by name.

    A list of strings is one argument. A TensorDict is one where the model has ``in_keys``, or takes no entry of it.

    Args:
        called: the model, or a hooked module around it.
        batch: on the model's device.
        inputs: what the model takes.

    Raises:
        SelectionError: one of ``in_keys`` is not in the batch.
    """
    if inputs.in_keys:
        called(*_entries(batch, inputs.in_keys))
        return
    if isinstance(batch, tuple | list) and batch and all(isinstance(each, str) for each in batch):
        called(batch)
        return
    if isinstance(batch, tuple | list):
        called(*batch[: max(1, inputs.needed)])  # behind the inputs are labels, as a supervised dataset has them
        return
    whole = isinstance(batch, TensorDictBase) and (inputs.takes_tensordicts or not _takes_entries(batch, inputs))
    if not isinstance(batch, Mapping) or whole:
        called(batch)
        return
    named = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    taken = {name: value for name, value in named.items() if inputs.names is None or name in inputs.names}
    if taken or not named:
        called(**taken)
    else:
        called(named.get("input_ids", next(iter(named.values()))))  # a model that calls its input otherwise


def _takes_entries(batch: Any, inputs: Inputs) -> bool:
    """Whether the entries of a TensorDict have the names of arguments, all those that are needed among them."""
    return inputs.names is not None and len(inputs.names.intersection(batch.keys())) >= max(1, inputs.needed)


def _entries(batch: Any, in_keys: Sequence[Any]) -> list[Any]:
    there = list(batch.keys(True, True)) if isinstance(batch, TensorDictBase) else list(batch)
    missing = [key for key in in_keys if key not in there] if isinstance(batch, Mapping) else list(in_keys)
    if missing:
        raise SelectionError(
            f"in_keys= asks for {missing[0]!r}, and the batch, a {type(batch).__name__}, has "
            f"{listed(there) if isinstance(batch, Mapping) else 'no keys'}",
            selector=missing[0],
        )
    return [batch[key] for key in in_keys]


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
