"""A model inside DistributedDataParallel: one process, gloo, a file for the rendezvous."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model_state import state_of
from small_models import MLP
from tdcache import ActivationCaching, cache_activations

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture
def wrapped(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield DistributedDataParallel(MLP())
    dist.destroy_process_group()


def test_the_paths_are_those_of_the_users_own_model(wrapped, x):
    with ActivationCaching(r"layers\.\d|head").prepare(wrapped) as hooked:
        y = hooked(x)
    assert sorted(hooked.cache.keys()) == ["head", "layers.0", "layers.1", "layers.2"]
    assert torch.equal(hooked.cache["head"], y)


def test_values_and_gradients_are_those_of_the_model_alone(wrapped, x):
    with ActivationCaching("head|layers.0", directions=["fwd", "bwd"]).prepare(wrapped) as hooked:
        wrapped(x).square().sum().backward()
    grads = [parameter.grad.clone() for parameter in wrapped.parameters()]
    wrapped.zero_grad()
    with ActivationCaching("head|layers.0", directions=["fwd", "bwd"]).prepare(wrapped.module) as alone:
        wrapped.module(x).square().sum().backward()
    assert (hooked.cache == alone.cache).all()
    for grad, parameter in zip(grads, wrapped.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)


def test_the_inner_model_can_be_hooked_and_the_wrapper_called(wrapped, x):
    with cache_activations(wrapped.module, "head") as cache:
        y = wrapped(x)
    assert torch.equal(cache["head"], y)


def test_leaving_restores_the_wrapper(wrapped, x):
    before = state_of(wrapped.module)
    with ActivationCaching("head").prepare(wrapped) as hooked, torch.no_grad():
        hooked(x)
    assert state_of(wrapped.module) == before
