"""Models that need no gradients, cannot have them, or do not compute with floats."""

import pytest
import torch
from torch import nn

from model_state import state_of
from small_models import MLP, by_hand
from stable_ids import stable_id
from tdcache import ActivationCaching, UnfiredSiteWarning


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")
def test_a_dynamically_quantised_model_is_kept_and_restored(x):
    float_model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    model = torch.ao.quantization.quantize_dynamic(float_model, {nn.Linear}, dtype=torch.qint8)
    before = {path: list(module._forward_hooks) for path, module in model.named_modules()}
    with ActivationCaching(r"\d").prepare(model) as hooked:
        y = hooked(x)
    for path, (value,) in by_hand(model, ["0", "1", "2"], lambda: model(x)).items():
        assert torch.equal(hooked.cache[path], value)
    assert torch.equal(hooked.cache["2"], y)
    assert {path: list(module._forward_hooks) for path, module in model.named_modules()} == before


def test_a_frozen_model_gives_activations_and_stays_frozen(x):
    model = MLP().requires_grad_(False)
    before = state_of(model)
    with ActivationCaching(r"layers\.\d|head").prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head"], y)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert state_of(model) == before


def test_a_frozen_model_gives_gradients_where_the_input_needs_one(x):
    model = MLP().requires_grad_(False)
    with ActivationCaching("head", directions=["bwd", "grad_in"]).prepare(model) as hooked:
        hooked(x.requires_grad_()).sum().backward()
    assert torch.equal(hooked.cache["bwd", "head"], torch.ones(5, 2))
    assert torch.equal(hooked.cache["grad_in", "head"], torch.ones(5, 2) @ model.head.weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_cannot_come_is_reported_with_the_reason(x):
    with (
        pytest.warns(UnfiredSiteWarning, match="the output of 'head' did not require grad"),
        ActivationCaching("head", directions=["bwd"]).prepare(MLP().requires_grad_(False)) as hooked,
    ):
        hooked(x)


def test_half_a_frozen_model_gives_gradients_where_they_flow(x):
    model = MLP()
    model.layers.requires_grad_(False)
    with (
        pytest.warns(UnfiredSiteWarning, match=r"'layers\.0'"),
        ActivationCaching(r"layers\.0|head", directions=["bwd"]).prepare(model) as hooked,
    ):
        hooked(x).sum().backward()
    assert list(hooked.cache.keys()) == ["head"]


def test_integer_inputs_and_values_are_kept():
    class Buckets(nn.Module):
        def forward(self, x):
            return x // 2

    model = nn.Sequential(Buckets(), nn.Embedding(5, 3), nn.Linear(3, 2))
    ids = torch.arange(10)
    with ActivationCaching(r"\d", directions=["fwd", "fwd_pre"]).prepare(model) as hooked:
        hooked(ids)
    assert torch.equal(hooked.cache["fwd_pre", "0"], ids)
    assert torch.equal(hooked.cache["fwd", "0"], ids // 2)
    assert torch.equal(hooked.cache["fwd_pre", "1"], ids // 2)
    assert torch.equal(hooked.cache["fwd", "1"], model[1](ids // 2))


def test_gradients_of_an_embedding_come_though_its_input_can_have_none():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with ActivationCaching("0|1", directions=["bwd"]).prepare(model) as hooked:
        hooked(torch.arange(5)).sum().backward()
    assert torch.equal(hooked.cache["0"], torch.ones(5, 2) @ model[1].weight)


def test_the_input_gradient_of_integers_is_reported_as_impossible():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with (
        pytest.warns(UnfiredSiteWarning, match="the input of '0' did not require grad .*integer-only"),
        ActivationCaching("0|1", directions=["grad_in"]).prepare(model) as hooked,
    ):
        hooked(torch.arange(5)).sum().backward()
    assert list(hooked.cache.keys()) == ["1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=stable_id)
def test_values_keep_their_dtype(dtype):
    model = nn.Sequential(nn.Linear(4, 3, dtype=dtype))
    with ActivationCaching("0", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(torch.ones(5, 4, dtype=dtype)).abs().sum().backward()
    assert hooked.cache["fwd", "0"].dtype == hooked.cache["bwd", "0"].dtype == dtype
