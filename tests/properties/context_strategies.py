"""Hypothesis strategies: runnable module trees of every kind that troubles hooks, and recipes that capture them."""

import torch
from hypothesis import strategies as st
from torch import nn

from tdcache import ActivationCaching, Concatenate, First, Mean, Stack

WIDTH = 3

LEAVES = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    # Overwrites the output of the layer before, which autograd can bear; two in a row it could not.
    "in-place relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)),
    "dropout": lambda: nn.Dropout(0.5),
    "norm": lambda: nn.BatchNorm1d(WIDTH),
    "identity": nn.Identity,
}


class Chain(nn.Module):
    """Calls its children one after another."""

    def __init__(self, children):
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Skip(Chain):
    """Adds what its children make to what they get."""

    def forward(self, x):
        return x + super().forward(x.clone())


class Twice(Chain):
    """Calls its children twice over."""

    def forward(self, x):
        return super().forward(super().forward(x.clone()))


class Idle(Chain):
    """Has children that it never calls."""

    def forward(self, x):
        return x * 1


class Both(Chain):
    """Goes through a tuple and through keyword arguments on the way."""

    def __init__(self, children):
        super().__init__(children)
        self.split, self.join = Split(), Join()

    def forward(self, x):
        left, right = self.split(super().forward(x))
        return self.join(left, right=right)


class Split(nn.Module):
    def forward(self, x):
        return x * 1, x * 2


class Join(nn.Module):
    def forward(self, left, *, right):
        return left + right


KINDS = {
    "sequential": lambda parts: nn.Sequential(*parts),
    "chain": Chain,
    "skip": Skip,
    "twice": Twice,
    "idle": Idle,
    "both": Both,
}


@st.composite
def models(draw, *, in_place=True):
    """A tree of at most nine leaves, some shared, that takes and gives ``(batch, WIDTH)``; flags and hooks vary."""
    names = sorted(LEAVES if in_place else set(LEAVES) - {"in-place relu"})
    leaves = [LEAVES[name]() for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=5))]
    leaf = st.sampled_from(leaves)  # the same module may stand at several places
    tree = st.recursive(
        leaf,
        lambda inner: st.builds(
            lambda kind, parts: KINDS[kind](parts),
            st.sampled_from(sorted(KINDS)),
            st.lists(inner, min_size=1, max_size=3),
        ),
        max_leaves=9,
    )
    model = Chain([nn.Linear(WIDTH, WIDTH), draw(tree)])
    for number, module in enumerate(dict.fromkeys(model.modules())):
        with torch.no_grad():
            for parameter in module.parameters(recurse=False):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + number / 7)
        if draw(st.integers(0, 4)) == 0:
            module.requires_grad_(False)
        if draw(st.integers(0, 4)) == 0:
            module.eval()
        if draw(st.integers(0, 4)) == 0:
            module.register_forward_hook(lambda *args, **kwargs: None, with_kwargs=True, always_call=True)
            module.register_forward_pre_hook(lambda *args: None)
    return model


@st.composite
def recipes(draw, *, gradients=True, **fixed):
    """A caching recipe for any tree of :func:`models`: it copies, so that no in-place operation can hurt it.

    The input gradient of an in-place module is refused by design, and so left out.
    """
    directions = ["fwd", "fwd_pre", *(["bwd", "bwd_pre"] if gradients else [])]
    chosen = draw(st.lists(st.sampled_from(directions), min_size=1, max_size=3, unique=True))
    reducer = draw(st.sampled_from([None, First(), Stack(), Concatenate(), Mean()]))
    pattern = draw(st.sampled_from([".*", r".*\d", "parts.0", nn.Linear, nn.ReLU, lambda path, module: True]))
    options = {"directions": chosen, "reducer": reducer, "hold": "snapshot", "allow_empty": True}
    return ActivationCaching(pattern, **{**options, "prepend": draw(st.booleans()), **fixed})


def batch():
    """The input of every example: fixed, with rows of both signs."""
    return torch.linspace(-2, 2, 4 * WIDTH).reshape(4, WIDTH)
