"""Tied modules answer to each of their names; tied parameters are no matter."""

import warnings

import pytest
import torch
from torch import nn

from small_models import Tied, by_hand
from tdcache import ActivationCaching, RepeatedCallWarning, Stack, select


def test_a_tied_module_is_a_site_under_each_of_its_names():
    assert select(Tied(), ".*").paths == ("encode", "decode")


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd_pre", "grad_in"])
def test_each_name_has_an_entry_with_every_call(x, direction):
    model = Tied()
    with ActivationCaching("encode|decode", reducer=Stack(), directions=[direction]).prepare(model) as hooked:
        hooked(x.requires_grad_()).sum().backward()
    assert hooked.cache["encode"].shape == (2, 5, 4)
    assert torch.equal(hooked.cache["encode"], hooked.cache["decode"])
    if direction == "fwd":
        assert torch.equal(hooked.cache["encode"], torch.stack(by_hand(model, ["encode"], lambda: model(x))["encode"]))


def test_one_name_of_a_tied_module_can_be_selected_alone(x):
    with ActivationCaching("decode").prepare(Tied()) as hooked, warnings.catch_warnings():
        warnings.simplefilter("ignore", RepeatedCallWarning)
        y = hooked(x)
    assert list(hooked.cache.keys()) == ["decode"]
    assert torch.equal(hooked.cache["decode"], y)


def test_tied_parameters_change_nothing(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with ActivationCaching("0|2").prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["0"], model[0](x))
    assert torch.equal(hooked.cache["2"], y)


def test_a_tied_container_gives_its_children_under_both_names(x):
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.ModuleDict({"left": shared, "right": shared})
    model.forward = lambda x: model["left"](x)
    with ActivationCaching(r"(left|right)\.0").prepare(model) as hooked:
        hooked(x)
    assert sorted(hooked.cache.keys()) == ["left.0", "right.0"]
