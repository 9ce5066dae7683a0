"""Small nets that attribution is tried on, and how often they run."""

import torch
from torch import nn

from tdcache.introspect import in_backward


class ConvNet(nn.Module):
    def __init__(self, inplace=False, bias=True):
        super().__init__()
        self.c1, self.r1 = nn.Conv2d(1, 4, 3, bias=bias), nn.ReLU(inplace)
        self.c2, self.r2 = nn.Conv2d(4, 6, 3, bias=bias), nn.ReLU(inplace)
        self.pool, self.flat, self.head = nn.AvgPool2d(2), nn.Flatten(), nn.Linear(24, 3, bias=bias)

    def forward(self, x):
        return self.head(self.flat(self.pool(self.r2(self.c2(self.r1(self.c1(x)))))))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.pattern = nn.Identity()

    def forward(self, x):
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        pattern = self.pattern(logits.masked_fill(mask, -torch.inf).softmax(-1))
        return self.o((pattern @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """A small decoder-only transformer whose every part is a module."""

    def __init__(self, vocabulary=11, width=8, heads=2, layers=2, length=5):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f, self.unembed = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embed(ids) + self.position(torch.arange(ids.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.ln_f(x))


WRITERS = r"embed|position|blocks\.\d+\.(attn|mlp)"
READERS = r"blocks\.\d+\.ln\d|ln_f"


class Counter:
    """How often a model ran forward, and autograd ran backward, inside a block."""

    def __init__(self, model, monkeypatch):
        self.forwards = self.backwards = 0
        forward, grad = type(model).forward, torch.autograd.grad

        def counted_forward(module, *args, **kwargs):
            self.forwards += module is model
            return forward(module, *args, **kwargs)

        def counted_grad(*args, **kwargs):
            self.backwards += not in_backward()  # a rule goes backward through its own layer alone
            return grad(*args, **kwargs)

        monkeypatch.setattr(type(model), "forward", counted_forward)
        monkeypatch.setattr(torch.autograd, "grad", counted_grad)

    @property
    def counts(self):
        return self.forwards, self.backwards
