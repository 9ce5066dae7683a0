"""A small transformer whose calls are functions, and its twin: the same model with a module in place of every call.

What a method of this library gives at ``"layers.0.attn::pattern"`` of the one, it has to give at
``"layers.0.attn.pattern"`` of the other, where the place is a module like any other.
"""

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn

WIDTH, HEADS = 8, 2


class Softmax(nn.Module):
    def forward(self, x):
        return x.softmax(-1)


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class Add(nn.Module):
    def forward(self, x, y):
        return x + y


class Masked(nn.Module):
    def forward(self, q, k):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~causal, float("-inf"))


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (heads_of(part) for part in self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class TwinAttention(Attention):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.z = (nn.Identity() for _ in range(4))
        self.q_flat, self.k_flat = nn.Identity(), nn.Identity()
        self.scores, self.pattern = Masked(), Softmax()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = self.q(heads_of(self.q_flat(q))), self.k(heads_of(self.k_flat(k))), self.v(heads_of(v))
        z = self.z(self.pattern(self.scores(q, k)) @ v)
        return self.out(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.down(F.gelu(self.up(x)))


class TwinBlock(Block):
    def __init__(self):
        super().__init__()
        self.attn = TwinAttention()
        self.add, self.add_1, self.gelu = Add(), Add(), Gelu()

    def forward(self, x):
        x = self.add(x, self.attn(x))
        return self.add_1(x, self.down(self.gelu(self.up(x))))


class Net(nn.Module):
    def __init__(self, block=Block):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pair():
    """The model and its twin, with the same weights."""
    model, twin = Net().eval(), Net(TwinBlock).eval()
    twin.load_state_dict(model.state_dict())
    return model, twin


def inputs(rows=3, seed=1):
    torch.manual_seed(seed)
    return torch.randn(rows, 5, WIDTH)


def data(rows=3, seed=1, **more):
    return TensorDict({"input": inputs(rows, seed), **more}, batch_size=[rows])


def twin_name(name):
    """Where a call of the model is in the twin: ``layers.0::add.1`` is ``layers.0.add_1``."""
    path, _, label = name.partition("::")
    return f"{path}.{label.replace('.', '_')}" if label else name


def twin_selector(selector):
    """The same for a selector, whose dots are escaped."""
    return selector.replace(r"add\.1", "add_1").replace("::", r"\.")
