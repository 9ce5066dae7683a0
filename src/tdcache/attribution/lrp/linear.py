"""Linear modules as functions of their input, weight and bias.

Most rules apply a layer with other weights than its own: their positive part, their squares, or those with a batch norm
folded in. Calling the module would need these written into it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

__all__ = ["ELEMENTWISE", "LINEAR", "Linear", "canonised", "is_linear", "linear_function", "transposed"]

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid,
    nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.PReLU,
)  # fmt: skip
"""Modules that act on each number by itself."""

LINEAR: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
"""The classes that rules with weights apply to, besides Hugging Face's ``Conv1D``."""

Linear = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def _transposed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.t(), bias)


def _convolution(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dims = weight.ndim - 2
    padding = module.padding
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0  # noqa: SLF001
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    found: Tensor = convolve(x, weight, bias, module.stride, padding, module.dilation, module.groups)
    return found


def _transposed_convolution(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    padding, out = module.padding, module.output_padding
    found: Tensor = convolve(x, weight, bias, module.stride, padding, out, module.groups, module.dilation)
    return found


def _is_gpt2_linear(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' own, weight transposed


def transposed(linear: Linear, x: Tensor, weight: Tensor, cotangent: Tensor) -> Tensor | None:
    """The transpose of the linear map without its forward, or None where there is no short way."""
    if linear is F.linear:
        return cotangent @ weight
    module = linear.args[0] if isinstance(linear, partial) and linear.func is _convolution else None
    if module is None or x.ndim < weight.ndim or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    backward: Any = (conv1d_input, conv2d_input, conv3d_input)[weight.ndim - 3]
    found: Tensor = backward(x.shape, weight, cotangent, module.stride, module.padding, module.dilation, module.groups)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether rules with weights apply to the module."""
    return isinstance(module, LINEAR) or _is_gpt2_linear(module)


def linear_function(module: nn.Module) -> Linear:
    """The module's function of input, weight and bias."""
    if isinstance(module, nn.Linear):
        return F.linear
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return partial(_convolution, module)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return partial(_transposed_convolution, module)
    return _transposed_linear


def canonised(module: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the module with a batch norm that follows it folded in; the module itself is not changed.

    ``w' = w * gamma / sigma`` and ``b' = (b - mean) * gamma / sigma + beta``.
    """
    linear: Any = module
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if norm is None:
        return weight, bias
    bn: Any = norm
    scale = torch.rsqrt(bn.running_var + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight.detach()
    shift = torch.zeros_like(scale) if bn.bias is None else bn.bias.detach()
    channel = 1 if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d) else 0
    axes = [1] * weight.ndim
    axes[-1 if _is_gpt2_linear(module) else channel] = -1
    moved = (0 if bias is None else bias) - bn.running_mean
    return weight * scale.view(axes), moved * scale + shift
