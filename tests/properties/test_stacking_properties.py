"""Whatever the paths and groups, each stacked entry is the one that a loop over its axes puts together."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
from tdcache import select
from tdcache.cache import StackBy

PATTERN = r"(?P<side>[a-z]+)\.(?P<layer>\d+)\.(?P<expert>\d+)\.(?:[a-z]|\d)"
numbers = st.lists(st.integers(0, 12).map(str), min_size=1, max_size=3, unique=True)


@st.composite
def trees(draw):
    """Modules under every combination of sides, layers, experts and last names, some of which look alike."""
    model = nn.Module()
    names = [draw(values) for values in (st.just(["dec", "enc"]), numbers, numbers, st.just(["1", "2", "w"]))]
    grow(model, names)
    return model


def grow(module, names):
    for name in names[0] if names else ():
        child = nn.Module()
        module.add_module(name, child)
        grow(child, names[1:])


@given(trees(), st.permutations(["side", "layer", "expert"]), st.integers(1, 3))
def test_stacked_entries_are_those_of_loops_over_the_groups(model, names, count):
    names = tuple(names[:count])
    whole_path = PATTERN
    for name in {"side", "layer", "expert"} - set(names):
        whole_path = whole_path.replace(f"(?P<{name}>", "(?:")  # so that keys are paths
    sites = select(model, whole_path)
    entries = {path: torch.tensor([at]) for at, path in enumerate(sites.paths)}
    stacked, wanted = StackBy(names, sites)(entries), reference.stacked(entries, PATTERN, names)
    assert stacked.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(stacked[key], value)
