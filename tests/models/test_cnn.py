"""A convolutional net with batch norm, pooling and in-place activations."""

import pytest
import torch
from torch import nn

from rounding import assert_same_but_rounding
from small_models import output_gradients
from tdcache import ActivationCaching


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(45, 2),
    )


@pytest.fixture
def x():
    return torch.randn(2, 3, 12, 12)


def test_every_shape_of_a_cnn_is_kept(model, x):
    with ActivationCaching(r"\d", hold="snapshot").prepare(model) as hooked:
        hooked(x)
    assert {path: tuple(value.shape) for path, value in hooked.cache.items()} == {
        "0": (2, 4, 10, 10),
        "1": (2, 4, 10, 10),
        "2": (2, 4, 10, 10),
        "3": (2, 4, 5, 5),
        "4": (2, 5, 3, 3),
        "5": (2, 5, 3, 3),
        "6": (2, 45),
        "7": (2, 2),
    }


def test_the_gradients_for_grad_cam_are_those_of_autograd(model, x):
    model.eval()
    outplace = nn.Sequential(*[nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in model])
    wanted = output_gradients(outplace, ["0", "1", "4"], lambda: outplace(x)[:, 1].sum())
    with ActivationCaching("0|1|4", directions=["fwd", "bwd"], hold="snapshot").prepare(model) as hooked:
        hooked(x)[:, 1].sum().backward()
    for path, grad in wanted.items():
        assert_same_but_rounding(hooked.cache["bwd", path], grad)  # autograd asked for no gradient of weights


def test_capturing_changes_no_running_statistics(model, x):
    model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.eval()
    with ActivationCaching(nn.BatchNorm2d, hold="snapshot").prepare(model) as hooked:
        hooked(x)
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_channels_last_is_kept_as_it_came_out(model, x):
    model = model[:1].to(memory_format=torch.channels_last)
    with ActivationCaching("0").prepare(model) as alias, ActivationCaching("0", hold="snapshot").prepare(model) as copy:
        y = model(x.to(memory_format=torch.channels_last))
    for hooked in (alias, copy):
        assert torch.equal(hooked.cache["0"], y)
        assert hooked.cache["0"].is_contiguous(memory_format=torch.channels_last)
