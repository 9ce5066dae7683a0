"""Small models with the shapes that trouble hooks, and the slow obvious way to see what flows through them."""

import threading

import torch
from torch import nn


class MLP(nn.Module):
    """Three linear layers in a ModuleList, GELU between them."""

    def __init__(self, width=4, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.act = nn.GELU()
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return self.head(self.act(x))


class Residual(nn.Module):
    """A residual block with one in-place ReLU that runs twice."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))) + x)


class Tied(nn.Module):
    """One linear layer under two names, called once under each."""

    def __init__(self, width=4):
        super().__init__()
        self.encode = nn.Linear(width, width)
        self.decode = self.encode

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Pair(nn.Module):
    """Returns a structure: a tuple, a list or a dict of two tensors."""

    def __init__(self, kind=tuple, width=4):
        super().__init__()
        self.kind = kind
        self.inner = Split(kind, width)

    def forward(self, x):
        first, second = self.inner(x).values() if self.kind is dict else self.inner(x)
        return first + second


class Split(nn.Module):
    def __init__(self, kind, width):
        super().__init__()
        self.kind = kind
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        if self.kind is dict:
            return {"left": self.left(x), "right": self.right(x)}
        return self.kind((self.left(x), self.right(x)))


class UserModel(nn.Module):
    """What a user defines: torch traces its forward and those of its parts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def assert_same(found, wanted):
    """Bit for bit: an alias of the very tensor cannot differ by rounding."""
    assert set(found) == set(wanted)
    for path, value in wanted.items():
        assert torch.equal(found[path], value), path


def by_hand(model, paths, call):
    """What ``call()`` makes each module at ``paths`` return, by plain hooks: ``{path: [one value per call]}``."""
    seen = {path: [] for path in paths}
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [
        modules[path].register_forward_hook(
            lambda module, args, output, path=path: seen[path].append(output.detach().clone())
        )
        for path in paths
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def output_gradients(model, paths, call):
    """The gradient of ``call()`` (a scalar) with respect to the output at each path, by ``torch.autograd.grad``.

    The hooks return the output plus zero, so that what comes after may write in place without changing what is asked.
    """
    outputs = {}

    def keep(path):
        def hook(module, args, output):
            outputs[path] = output * 1  # a node of its own, whose value nothing else holds
            return outputs[path] * 1

        return hook

    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [modules[path].register_forward_hook(keep(path)) for path in paths]
    try:
        scalar = call()
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(outputs, torch.autograd.grad(scalar, list(outputs.values())), strict=True))


def input_gradients(model, paths, call):
    """The gradient of ``call()`` with respect to the first input at each path, by ``torch.autograd.grad``."""
    inputs = {}

    def keep(path):
        def hook(module, args):
            inputs[path] = args[0] * 1
            return (inputs[path], *args[1:])

        return hook

    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [modules[path].register_forward_pre_hook(keep(path)) for path in paths]
    try:
        scalar = call()
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(inputs, torch.autograd.grad(scalar, list(inputs.values())), strict=True))


class Replicated(nn.Module):
    """Runs a replica per part of the batch, each in a thread of its own, as ``nn.DataParallel`` does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        parts, results = x.chunk(2), [None, None]

        def run(at):
            replica = self.inner._replicate_for_data_parallel()
            replica._parameters = dict(self.inner._parameters)
            results[at] = replica(parts[at])

        threads = [threading.Thread(target=run, args=(at,)) for at in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
        return torch.cat(results)


class Wrapper(nn.Module):
    """Hands everything on, as adapters do; generate() calls the inner model and not this forward."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)
