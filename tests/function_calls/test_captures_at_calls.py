"""Every option of a capture at calls inside forwards: the entries are those at the modules of the twin model."""

import pytest
import torch
from torch import nn

from call_twins import inputs, pair, twin_name, twin_selector
from harvesting.harvest_data import Padded, Tokens, batches_of, encoder
from tdcache import ActivationCaching, cache_activations
from tdcache.reducers import Concatenate, First, Mean, Stack, Variance

SITES = [r"(?P<path>layers\.(?P<layer>\d))\.attn::(q|v|pattern|z)", r"layers\.(?P<layer>\d)::(gelu|add|add\.1)"]
OPTIONS = {
    "index": {"index": (slice(None), [0, 1])},
    "snapshots": {"hold": "snapshot"},
    "live": {"hold": "live"},
    "dtype": {"dtype": "float64"},
    "device": {"device": "cpu"},
    "first": {"reducer": First()},
    "stacked over calls": {"reducer": Stack()},
    "joined over calls": {"reducer": Concatenate()},
    "mean": {"reducer": Mean()},
    "variance": {"reducer": Variance()},
    "batch size": {"batch_dims": 1},
    "gradients too": {"directions": ["fwd", "bwd"]},
    "values are checked": {"check": "values"},
    "nested": {"use_nested_keys": True},
    "first in line": {"prepend": True},
}


def entries(model, selector, **options):
    with ActivationCaching(selector, **options).prepare(model) as hooked:
        for seed in (1, 2):
            hooked(inputs(seed=seed))[:, -1, 0].sum().backward()
    return dict(hooked.cache.items(include_nested=True, leaves_only=True))


def at_module(key):
    return tuple(map(twin_name, key)) if isinstance(key, tuple) else twin_name(key)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_means_the_same_at_calls(name):
    model, twin = pair()
    mine = entries(model, SITES, **OPTIONS[name])
    its = entries(twin, [twin_selector(each) for each in SITES], **OPTIONS[name])
    assert {at_module(key) for key in mine} == set(its)
    assert len(mine) >= 21
    for key, value in mine.items():
        assert value.requires_grad == its[at_module(key)].requires_grad
        # The kernel sums in another order than the twin.
        torch.testing.assert_close(value, its[at_module(key)], rtol=1e-4, atol=1e-6)


def test_layers_are_stacked_at_calls():
    model, _ = pair()
    stacked = entries(model, r"layers\.(?P<layer>\d)::add\.1", stack_by="layer")
    alone = entries(model, r"layers\.(?P<layer>\d)::add\.1")
    ((_, value),) = stacked.items()
    assert torch.equal(value, torch.stack([alone[f"layers.{layer}::add.1"] for layer in range(3)]))


def test_a_forward_stops_after_the_last_of_several_calls():
    model, _ = pair()
    ran = []
    model.layers[1].down.register_forward_hook(lambda *_: ran.append("down"))
    with ActivationCaching(r"layers\.(0|1)::(gelu|add)", stop_early=True).prepare(model) as hooked:
        assert hooked(inputs()) is None
    assert len(hooked.cache.keys()) == 4
    assert ran == []


@pytest.mark.parametrize("place", ["q", "pattern", "z"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_the_tokens_of_queries(place, side):
    model = encoder()
    batch = batches_of(Tokens(), 4, Padded(side))[0]
    selector = rf"encoder\.layer\.0\.attention\.self::{place}"
    with cache_activations(model, selector) as whole, torch.no_grad():
        model(**batch)
    with cache_activations(model, selector, positions=-1) as last, torch.no_grad():
        model(**batch)
    key = f"encoder.layer.0.attention.self::{place}"
    mask = batch["attention_mask"].bool()
    at = [int(row.nonzero()[-1]) for row in mask]
    expected = torch.stack([whole[key][row, :, column] for row, column in enumerate(at)])
    assert torch.equal(last[key], expected)
    with (
        cache_activations(model, selector, positions=slice(None), reducer=Concatenate(flatten=3)) as every,
        torch.no_grad(),
    ):
        model(**batch)
    assert torch.equal(every[key], whole[key][mask[:, None].expand(whole[key].shape[:3])])


def test_gradients_at_the_arguments_of_one_call_are_its_own():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.relu(x) + x * 3

    model, x = Twice(), torch.randn(4, requires_grad=True)
    with ActivationCaching(["::relu", "::mul"], directions=["grad_in"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    assert torch.equal(hooked.cache["::relu"], (x > 0).float())
    assert torch.equal(hooked.cache["::mul"], torch.full((4,), 3.0))
    assert torch.equal(x.grad, hooked.cache["::relu"] + hooked.cache["::mul"])
