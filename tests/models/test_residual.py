"""A residual block whose one in-place ReLU runs twice."""

import pytest
import torch
from torch import nn

from small_models import Residual, by_hand, output_gradients
from tdcache import ActivationCaching, InplaceModificationError, RepeatedCallWarning, Stack


class OutOfPlace(Residual):
    """The same block without the in-place operation: the oracle."""

    def __init__(self, twin):
        super().__init__()
        self.load_state_dict(twin.state_dict())
        self.relu = nn.ReLU()


@pytest.fixture
def model():
    return Residual()


def test_aliases_that_the_relu_overwrites_are_all_named(model, x):
    with pytest.raises(InplaceModificationError) as caught, ActivationCaching("first|second").prepare(model) as hooked:
        hooked(x)
    assert caught.value.paths[0] == "first"


def test_snapshots_are_the_values_before_the_relu(model, x):
    with ActivationCaching("first|second", hold="snapshot").prepare(model) as hooked:
        hooked(x)
    twin = OutOfPlace(model)
    for path, (value,) in by_hand(twin, ["first", "second"], lambda: twin(x)).items():
        assert torch.equal(hooked.cache[path], value)


def test_the_relu_used_twice_warns_and_keeps_the_last(model, x):
    with (
        pytest.warns(RepeatedCallWarning, match="'relu'"),
        ActivationCaching("relu", hold="snapshot").prepare(model) as hooked,
    ):
        y = hooked(x)
    assert torch.equal(hooked.cache["relu"], y)


def test_stack_keeps_both_calls_of_the_relu(model, x):
    with ActivationCaching("relu", reducer=Stack()).prepare(model) as hooked:
        hooked(x)
    assert torch.equal(hooked.cache["relu"], torch.stack(by_hand(model, ["relu"], lambda: model(x))["relu"]))


def test_gradients_are_those_of_the_out_of_place_twin(model, x):
    twin = OutOfPlace(model)
    wanted = output_gradients(twin, ["first", "second"], lambda: twin(x).square().sum())
    with ActivationCaching("first|second", directions=["bwd"]).prepare(model) as hooked:
        y = hooked(x)
        y.square().sum().backward()
    assert torch.equal(y, twin(x))
    for path, grad in wanted.items():
        assert torch.equal(hooked.cache[path], grad)


def test_the_input_gradient_of_an_in_place_module_is_refused_with_the_remedy(model, x):
    with (
        pytest.raises(InplaceModificationError, match=r"'relu' changes its input in place.*direction 'bwd'"),
        ActivationCaching("relu", directions=["grad_in"], reducer=Stack()).prepare(model) as hooked,
    ):
        hooked(x).sum().backward()
