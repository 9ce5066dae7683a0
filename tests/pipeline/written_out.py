"""A small transformer whose forward calls hooks itself, at every place of the ready tree."""

import math
from copy import deepcopy

import torch
from torch import nn

from tdcache.pipeline import TransformerHooks


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)


class Written(nn.Module):
    """Attention and feed-forward layers around a residual stream; ``forward(ids, hooks)`` binds ``layer`` for each."""

    def __init__(self, layers=3, width=8, hidden=12, words=11):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.head = nn.Linear(width, words)

    def forward(self, ids, hooks=None):
        hooks = TransformerHooks() if hooks is None else hooks
        x = hooks.resid.post_emb(self.embed(ids))
        for number, block in enumerate(self.blocks):
            own = deepcopy(hooks).bind(layer=number)
            x = own.resid.torso.post_attn(x + self.attend(block, normalised(x, own.resid.torso.ln_attn), own))
            x = own.resid.torso.post_mlp(x + self.feed(block, normalised(x, own.resid.torso.ln_mlp), own))
        return hooks.logits(self.head(hooks.resid.post_ln_f(normalised(x, hooks.resid.ln_f))))

    def attend(self, block, x, hooks):
        x = hooks.resid.torso.post_ln_attn(x)
        q, k, v = hooks.attn.q(block.q(x)), hooks.attn.k(block.k(x)), hooks.attn.v(block.v(x))
        weights = hooks.attn.qk_logits(q @ k.mT / math.sqrt(q.shape[-1])).exp()
        pattern = weights / hooks.attn.qk_softmax_denominator(weights.sum(-1, keepdim=True))
        mixed = hooks.attn.v_out(hooks.attn.qk_probs(pattern) @ v)
        return hooks.resid.torso.delta_attn(block.o(mixed))

    def feed(self, block, x, hooks):
        x = hooks.resid.torso.post_ln_mlp(x)
        inner = hooks.mlp.post_act(torch.relu(hooks.mlp.pre_act(block.up(x))))
        return hooks.resid.torso.delta_mlp(block.down(inner))


def normalised(x, hooks):
    x = hooks.post_mean_subtraction(x - x.mean(-1, keepdim=True))
    return hooks.post_scale(x / hooks.scale(x.std(-1, keepdim=True) + 1e-5))


class Save:
    """A hook that keeps what it sees, in order, under the layer."""

    def __init__(self):
        self.seen = {}

    def __call__(self, x, layer=None):
        self.seen[layer] = x.detach().clone()

    def __repr__(self):
        return "Save()"


def sparse_pair(width, latents, dtype=torch.float64):
    """Encoder and decoder of a ReLU dictionary, and their matrices."""
    up, bias = torch.randn(width, latents, dtype=dtype), torch.randn(latents, dtype=dtype)
    down, back = torch.randn(latents, width, dtype=dtype), torch.randn(width, dtype=dtype)
    return (lambda x: torch.relu(x @ up + bias)), (lambda z: z @ down + back), up, down
