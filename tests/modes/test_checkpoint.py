"""Activation checkpointing, both variants: the recomputation in the backward is no second capture."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from small_models import output_gradients
from stable_ids import stable_id
from tdcache import ActivationCaching, Stack


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x))


class Net(nn.Module):
    """Two blocks, each of them checkpointed where ``reentrant`` is not None."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


PATHS = ["blocks.0", "blocks.0.inner", "blocks.1", "blocks.1.inner", "head"]
PATTERN = r"blocks\.\d(\.inner)?|head"

variants = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@pytest.fixture
def x():
    return torch.randn(5, 4, requires_grad=True)


def twin_of(model):
    twin = Net(None)
    twin.load_state_dict(model.state_dict())
    return twin


@variants
@pytest.mark.parametrize("directions", [["fwd"], ["bwd"], ["fwd", "bwd"]], ids=stable_id)
def test_every_site_fires_once(reentrant, directions, x):
    model = Net(reentrant)
    with ActivationCaching(PATTERN, directions=directions, reducer=Stack(), use_nested_keys=True).prepare(
        model
    ) as hooked:
        hooked(x).square().sum().backward()
    for direction in directions:
        assert sorted(hooked.cache[direction].keys()) == PATHS
        assert {value.shape[0] for value in hooked.cache[direction].values()} == {1}


@variants
def test_values_and_gradients_are_those_without_checkpointing(reentrant, x):
    model = Net(reentrant)
    twin = twin_of(model)
    with ActivationCaching(PATTERN).prepare(twin) as plain:
        plain(x)
    wanted = output_gradients(twin, PATHS, lambda: twin(x).square().sum())
    with ActivationCaching(PATTERN, directions=["fwd", "bwd"]).prepare(model) as hooked:
        y = hooked(x)
        forward = hooked.cache["fwd"].clone()
        y.square().sum().backward()
    assert (forward == plain.cache).all()
    assert (hooked.cache["fwd"] == plain.cache).all()  # the recomputation wrote nothing
    for path, grad in wanted.items():
        assert torch.equal(hooked.cache["bwd", path], grad)


@variants
def test_input_gradients_are_those_without_checkpointing(reentrant, x):
    model = Net(reentrant)
    with ActivationCaching(PATTERN, directions=["grad_in"]).prepare(twin_of(model)) as plain:
        plain(x.detach().clone().requires_grad_()).square().sum().backward()
    with ActivationCaching(PATTERN, directions=["grad_in"]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    assert sorted(hooked.cache.keys()) == PATHS
    assert (hooked.cache == plain.cache).all()


@variants
def test_parameter_gradients_are_those_without_a_context(reentrant, x):
    model = Net(reentrant)
    twin = twin_of(model)
    twin(x).square().sum().backward()
    with ActivationCaching(PATTERN, directions=["fwd", "bwd", "grad_in"]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@variants
def test_a_backward_after_exit_recomputes_and_writes_nothing(reentrant, x):
    model = Net(reentrant)
    with ActivationCaching(PATTERN).prepare(model) as hooked:
        y = hooked(x)
    before = hooked.cache.clone()
    y.sum().backward()
    assert (hooked.cache == before).all()
    assert model.head.weight.grad is not None


@variants
def test_a_repeated_step_goes_on_capturing(reentrant, x):
    model = Net(reentrant)
    with ActivationCaching("blocks.0.inner", directions=["fwd", "bwd"], reducer=Stack()).prepare(model) as hooked:
        for _ in range(3):
            hooked(x).square().sum().backward()
    assert hooked.cache["fwd", "blocks.0.inner"].shape == hooked.cache["bwd", "blocks.0.inner"].shape == (3, 5, 4)
