"""The models that are measured."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import types
from typing import Any

import torch
from torch import Tensor, nn

CHAIN_PATTERN = r"layers\.\d+"
WIDTH = 8
GPT2_PATTERN = r"h\.\d+(\.attn|\.mlp)?"


class Chain(nn.Module):
    """Tiny linear modules in a row: hardly anything but what a call of a module costs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Pointwise(nn.Module):
    """A block that a compiler can fuse with its neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale) + torch.sigmoid(x)


class PointwiseChain(nn.Module):
    """What torch.compile is good at: elementwise blocks in a row."""

    def __init__(self, count: int = 12, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Pointwise(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


_serial = itertools.count()


def own_pointwise_chain(count: int) -> nn.Module:
    """A chain that shares no code object with another one.

    torch.compile keeps its graphs by code object, and does not look at hooks: a second model of the same class would
    run the graph of the first.
    """
    forward = PointwiseChain.forward
    number = next(_serial)
    code = forward.__code__.replace(co_name=f"forward_{number}")
    own = types.FunctionType(code, forward.__globals__, code.co_name, forward.__defaults__, forward.__closure__)
    return type(f"PointwiseChain{number}", (PointwiseChain,), {"forward": own})(count)


def tiny_input() -> Tensor:
    """The input of a chain."""
    torch.manual_seed(1)
    return torch.randn(4, WIDTH)


@functools.cache
def _gpt2(**config: Any) -> nn.Module:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(bos_token_id=0, eos_token_id=0, use_cache=False, **config)).eval()


def gpt2(**config: Any) -> nn.Module:
    """A copy of its own of GPT-2 from its configuration, with random weights."""
    return copy.deepcopy(_gpt2(**config))


def small_gpt2(layers: int = 12) -> nn.Module:
    """The shape of GPT-2 small, up to its vocabulary."""
    return gpt2(n_layer=layers, n_embd=768, n_head=12, vocab_size=1000)


def narrow_gpt2() -> nn.Module:
    """GPT-2's depth at a width of 64, where overhead shows."""
    return gpt2(n_layer=12, n_embd=64, n_head=4, vocab_size=1000)


def token_ids(batch: int, length: int) -> Tensor:
    """Input of either GPT-2."""
    torch.manual_seed(1)
    return torch.randint(0, 1000, (batch, length))


def hooked_chain(count: int, *, loss: bool = False) -> nn.Module:
    """The chain as TransformerLens wants it: with a HookPoint behind every module.

    With ``loss`` it returns the sum of its output, for a library that calls ``backward()`` on what the model returns.
    """
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class HookedChain(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Chain(count).layers
            self.points = nn.ModuleList(HookPoint() for _ in range(count))
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            for layer, point in zip(self.layers, self.points, strict=True):
                x = point(layer(x))
            return x.sum() if loss else x

    return HookedChain()
