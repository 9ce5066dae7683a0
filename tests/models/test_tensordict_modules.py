"""TensorDictModule and TensorDictSequential as models."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from tdcache import ActivationCaching


@pytest.fixture
def model():
    return TensorDictSequential(
        TensorDictModule(nn.Linear(4, 3), in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.Linear(3, 2), in_keys=["h"], out_keys=["y"]),
    )


@pytest.fixture
def data():
    return TensorDict({"x": torch.randn(5, 4)}, batch_size=5)


def test_the_plain_modules_inside_are_sites(model, data):
    with ActivationCaching(r"module\.\d\.module", directions=["fwd", "bwd"]).prepare(model) as hooked:
        out = hooked(data)
        assert out is data
        out["y"].sum().backward()
    assert torch.equal(hooked.cache["fwd", "module.0.module"], out["h"])
    assert torch.equal(hooked.cache["fwd", "module.1.module"], out["y"])
    assert torch.equal(hooked.cache["bwd", "module.1.module"], torch.ones(5, 2))


def test_a_tensordict_modules_value_is_its_first_output(model, data):
    with ActivationCaching(r"module\.\d").prepare(model) as hooked:
        hooked(data)
    assert torch.equal(hooked.cache["module.0"], data["h"])
    assert torch.equal(hooked.cache["module.1"], data["y"])


@pytest.mark.parametrize("pick", ["h", ("h",)])
def test_pick_takes_an_entry_of_a_tensordict_modules_value(model, data, pick):
    with ActivationCaching(r"module\.\d", pick=pick).prepare(model) as hooked:
        hooked(data)
    assert torch.equal(hooked.cache["module.0"], data["h"])


def test_calls_by_keyword_work_as_without_a_context(model, data):
    wanted = model(x=data["x"])
    with ActivationCaching(r"module\.0\.module").prepare(model) as hooked:
        found = hooked(x=data["x"])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_keys_of_the_model_are_those_of_the_hooked_module(model):
    with ActivationCaching(r"module\.0\.module").prepare(model) as hooked:
        assert (hooked.in_keys, hooked.out_keys) == (model.in_keys, model.out_keys)


def test_the_data_can_be_the_cache(model, data):
    with ActivationCaching(r"module\.0\.module", cache=data, clear_cache=False).prepare(model) as hooked:
        hooked(data)
    assert sorted(data.keys()) == ["h", "module.0.module", "x", "y"]


def test_a_plain_call_of_the_model_captures(model, data):
    with ActivationCaching(r"module\.1\.module").prepare(model) as hooked:
        model(data)
    assert torch.equal(hooked.cache["module.1.module"], data["y"])
