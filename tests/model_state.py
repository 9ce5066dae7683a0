"""Everything about a model that a context must leave as it was, as plain data that two moments can be compared by."""

import torch
from torch.nn.modules import module as torch_module


def state_of(model):
    """Hooks, attributes, flags and tensors of every module, and torch's global hooks, as comparable data."""
    return {
        "modules": {path: _attributes(module) for path, module in model.named_modules(remove_duplicate=False)},
        "training": {path: module.training for path, module in model.named_modules(remove_duplicate=False)},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "tensors": {name: _bits(tensor) for name, tensor in model.state_dict().items()},
        "global hooks": {
            name: dict(vars(torch_module)[name])
            for name in vars(torch_module)
            if name.startswith("_global_") and "hooks" in name
        },
    }


def _attributes(module):
    """Each entry of ``__dict__``: hook and other dicts by their items in order, everything else by identity."""
    return {name: _spell(value) for name, value in module.__dict__.items()}


def _spell(value):
    if isinstance(value, dict):
        return [(key, id(item)) for key, item in value.items()]
    if isinstance(value, str | int | float | bool | None):
        return value
    return sorted(value) if isinstance(value, set) else id(value)


def _bits(tensor):
    if not isinstance(tensor, torch.Tensor):
        return repr(tensor)
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
