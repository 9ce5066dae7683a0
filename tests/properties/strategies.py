"""Hypothesis strategies: module trees, selectors for them, and the values that pass a site."""

import torch
from hypothesis import strategies as st
from torch import nn

NAMES = ("a", "b", "attn", "layer", "layers", "mlp", "0", "1", "10", "x_y")


class Holder(nn.Module):
    """A module of named children, any of which may be None."""

    def __init__(self, children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for child in self._modules.values():
            x = x if child is None else child(x)
        return x


def leaf_modules():
    """Small modules that map ``(..., 3)`` to ``(..., 3)``."""
    return st.sampled_from([nn.ReLU, nn.Tanh, nn.Identity, lambda: nn.Linear(3, 3), lambda: nn.LayerNorm(3)]).map(
        lambda make: make()
    )


@st.composite
def module_trees(draw, depth=3):
    """Trees of nested containers with None children and with modules, or whole subtrees, under several names."""
    made = []

    def grow(level):
        if made and draw(st.booleans()) and draw(st.booleans()):
            return draw(st.sampled_from(made))
        if level == 0:
            module = draw(leaf_modules())
        else:
            children = {
                name: grow(level - 1) for name in draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True))
            }
            kind = draw(st.sampled_from(["holder", "list", "dict", "sequential"]))
            module = _container(kind, children, draw(st.booleans()))
        made.append(module)
        return module

    children = {
        name: grow(depth - 1) for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    }
    return Holder(children)


def _container(kind, children, with_none):
    if kind == "list":
        return nn.ModuleList(children.values())
    if kind == "dict":
        return nn.ModuleDict(children)
    if kind == "sequential":
        return nn.Sequential(*children.values())
    return Holder({**children, "absent": None} if with_none else children)


def patterns():
    """Regexes, and parts of them, that match some of the paths of :func:`module_trees`."""
    parts = st.sampled_from([*NAMES, r"\d+", r"\w+", r".*", r"[ab]", r"(attn|mlp)", r"layers?", r"(?P<at>\w)"])
    return st.lists(parts, min_size=1, max_size=3).map(_once_named).map(r"\.".join)


def _once_named(parts):
    named = [at for at, part in enumerate(parts) if part.startswith("(?P")]
    return [part if at not in named[1:] else r"\w" for at, part in enumerate(parts)]


@st.composite
def tensors(draw, shape, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)):
    """Tensors of a shape with distinct entries of moderate size, so that half precision can hold them apart."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    entries = torch.randperm(max(1, torch.Size(shape).numel()), generator=generator)[: torch.Size(shape).numel()]
    return (entries - entries.numel() // 2).reshape(shape).to(draw(st.sampled_from(dtypes)))


@st.composite
def splits(draw, rows, most=5):
    """Lengths that sum up to ``rows``, some of them zero."""
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=most - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, rows], strict=True)]
