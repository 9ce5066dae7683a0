"""The models of the differential fuzz: small modules of every kind that troubles hooks, and random trees of them."""

import random
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 3


class Part(nn.Module):
    """Has children in a list."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)


class Chain(Part):
    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Residual(Part):
    def forward(self, x):
        return x + self.parts[0](x)


class TwoCalls(Part):
    def forward(self, x):
        return self.parts[0](x) + 2 * self.parts[0](x * 0.5)


class Nested(Part):
    def forward(self, x):
        return self.parts[0](self.parts[0](x))


class Idle(Part):
    """Never calls its children."""

    def forward(self, x):
        return x * 1


class EveryOther(Part):
    """Calls its child in the first forward, the third, and so on."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__(*children)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.parts[0](x) if self.calls % 2 else x * 3


class WithoutGraph(Part):
    def forward(self, x):
        with torch.no_grad():
            y = self.parts[0](x)
        return x + y


class Own(nn.Module):
    """Hands its own parameter on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, x):
        return self.weight


class AddsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x):
        return x + self.own(x)


class Split(nn.Module):
    def forward(self, x):
        return x * 2, (x * 3, 7)


class Join(nn.Module):
    def forward(self, left, *, right):
        return left + right[0]


class Through(nn.Module):
    """Through a tuple and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.join = Split(), Join()

    def forward(self, x):
        left, right = self.split(x)
        return self.join(left, right=right)


class Gives(nn.Module):
    """Hands a keyword argument on, beside what it computes."""

    def forward(self, x, *, state):
        return {"x": x * state, "state": state}


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gives = Gives()

    def forward(self, x):
        state = x * 2
        given = self.gives(x, state=state)
        return given["x"] + 0.5 * given["state"] + 3 * state


class Appends(nn.Module):
    """Writes into the list it is given."""

    def forward(self, x, states):
        states.append(states[0] + x)
        return x * 2


class Collects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.appends = Appends()

    def forward(self, x):
        states = [x * 3]
        y = self.appends(x, states)
        return y + states[-1]


class Entries(nn.Module):
    """A TensorDict module in the middle of a plain one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = TensorDictModule(inner, in_keys=["x"], out_keys=["y"])

    def forward(self, x):
        return self.inner(TensorDict({"x": x * 2}))["y"]


class Transposed(nn.Module):
    def forward(self, x):
        return x.t()


class Views(nn.Module):
    """Through a view of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = Transposed(), Transposed()

    def forward(self, x):
        return self.back(self.there(x)) * 2


class ChangesView(nn.Module):
    """Writes into a view that a module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.view = Transposed()

    def forward(self, x):
        view = self.view(x * 2)
        view.mul_(3)
        return view.t() + 1


class Named(nn.Module):
    """Takes keyword arguments alone."""

    def forward(self, *, x, scale):
        return {"scaled": x * scale, "scale": scale}


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.named = Named()

    def forward(self, x):
        return self.named(x=x, scale=x * 0.5)["scaled"] + x


class Recurrent(nn.Module):
    """Returns a tensor and a tuple of states, of which it uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH)

    def forward(self, x):
        output, (hidden, _) = self.lstm(x)
        return output + hidden


class Checkpointed(Part):
    """Runs its child again in the backward."""

    def forward(self, x):
        return checkpoint(self.parts[0], x, use_reentrant=False)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


LEAVES = {
    "linear": linear,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "wrapped identity": lambda: nn.Sequential(nn.Identity()),
    "in place": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True)),
    "own": AddsOwn,
    "through": Through,
    "keeps": Keeps,
    "collects": Collects,
    "entries": lambda: Entries(linear()),
    "views": Views,
    "keywords": Keywords,
    "recurrent": Recurrent,
    "changes view": ChangesView,
}
NODES = {
    "chain": Chain,
    "sequential": nn.Sequential,
    "residual": Residual,
    "two calls": TwoCalls,
    "nested": Nested,
    "idle": Idle,
    "every other": EveryOther,
    "without graph": WithoutGraph,
    "checkpointed": Checkpointed,
}
CHANGES_IN_PLACE = ("in place", "changes view")


def random_tree(rng: random.Random, depth: int = 2) -> Any:
    """A recipe of a module: the name of a leaf, or a tuple of the name of a node and its children."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(sorted(LEAVES))
    kind = rng.choice(sorted(NODES))
    count = rng.randint(1, 3) if kind in ("chain", "sequential") else 1
    if kind == "checkpointed":  # what it runs twice has to do the same twice, which "every other" does not
        depth = 1
    return (kind, *(random_tree(rng, depth - 1) for _ in range(count)))


def build(tree: Any) -> nn.Module:
    """The module of a recipe."""
    return LEAVES[tree]() if isinstance(tree, str) else NODES[tree[0]](*map(build, tree[1:]))


def model_of(tree: Any) -> nn.Module:
    """The model of a recipe; its parameters are the same each time."""
    model = Chain(linear(), build(tree)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.4)
    return model
