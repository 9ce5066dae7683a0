"""Small models whose forwards are spelled out, beside copies edited by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """A residual block with a functional activation."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        y = self.norm(x)
        y = F.gelu(self.up(y))
        y = self.down(y)
        return x + y


class Chain(nn.Module):
    def __init__(self, depth=3, width=8):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * 2


class Attention(nn.Module):
    """Attention by torch's kernel, or spelled out."""

    def __init__(self, *, kernel=True, heads=4, groups=4, width=32):
        super().__init__()
        self.kernel, self.heads, self.groups, self.size = kernel, heads, groups, width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, groups * self.size)
        self.v = nn.Linear(width, groups * self.size)
        self.out = nn.Linear(width, width)
        self.edit = None  # the copy edited by hand: called with the pattern

    def split(self, x, heads):
        return x.view(*x.shape[:2], heads, self.size).transpose(1, 2)

    def forward(self, x, mask=None):
        q, k, v = (
            self.split(self.q(x), self.heads),
            self.split(self.k(x), self.groups),
            self.split(self.v(x), self.groups),
        )
        if self.kernel:
            grouped = self.groups != self.heads
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        else:
            k, v = (each.repeat_interleave(self.heads // self.groups, 1) for each in (k, v))
            scores = q @ k.transpose(-1, -2) / self.size**0.5
            if mask is None:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
            pattern = scores.softmax(-1)
            if self.edit is not None:
                pattern = self.edit(pattern)
            z = pattern @ v
        return self.out(z.transpose(1, 2).reshape(x.shape))


class Net(nn.Module):
    """A convolutional block with functional activations and a residual sum."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 3, 3, padding=1)
        self.two = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.one(x))
        y = self.two(y)
        y += x
        return F.relu(y)


def small_llama(num_hidden_layers=3, **settings):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        intermediate_size=48,
        use_cache=False,
        **settings,
    )
    torch.manual_seed(0)
    return transformers.LlamaModel(config).eval()
