"""Capture on a GPU: what stays there, and what moves to the CPU behind the computation's back."""

import pytest
import torch
from tensordict import TensorDict

from small_models import MLP
from stable_ids import stable_id
from tdcache import ActivationCaching, Concatenate, InplaceModificationError, Stack

pytestmark = pytest.mark.gpu


@pytest.fixture
def model():
    return MLP(width=256).cuda()


@pytest.fixture
def x():
    return torch.randn(512, 256, device="cuda")


def test_values_stay_on_the_gpu_as_aliases(model, x):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        y = hooked(x)
        y.sum().backward()
    assert hooked.cache["fwd", "head"].data_ptr() == y.data_ptr()
    assert hooked.cache["bwd", "head"].is_cuda


@pytest.mark.parametrize("reducer", [None, Stack(), Concatenate()], ids=stable_id)
@pytest.mark.parametrize("by", ["device", "cache"])
def test_values_moved_to_the_cpu_have_arrived_when_they_can_be_read(model, x, reducer, by):
    options = {"device": "cpu"} if by == "device" else {"cache": TensorDict(device="cpu")}
    factory = ActivationCaching(r"layers\.\d|head", directions=["fwd", "bwd"], reducer=reducer, **options)
    with factory.prepare(model) as hooked:
        for scale in (1, 2, 3):
            y = hooked(scale * x)
            y.square().sum().backward()
            kept = hooked.cache["fwd", "head"]
            assert not kept.is_cuda
            assert torch.equal(kept.reshape(-1, 512, 2)[-1], y.detach().cpu())
            assert torch.equal(hooked.cache["bwd", "head"].reshape(-1, 512, 2)[-1], 2 * y.detach().cpu())


def test_values_moved_to_the_cpu_are_pinned_and_cast_first(model, x):
    with ActivationCaching(r"layers\.0", device="cpu", dtype=torch.float16).prepare(model) as hooked:
        hooked(x)
    assert hooked.cache["layers.0"].is_pinned()
    assert torch.equal(hooked.cache["layers.0"], model.layers[0](x).detach().half().cpu())


def test_a_moved_slice_is_no_larger_than_itself(model, x):
    with ActivationCaching(r"layers\.0", device="cpu", index=(slice(None), 0)).prepare(model) as hooked:
        hooked(x)
    assert hooked.cache["layers.0"].untyped_storage().size() == 512 * 4


def test_a_side_stream_is_waited_for(model, x):
    stream = torch.cuda.Stream()
    with ActivationCaching("head", device="cpu").prepare(model) as hooked:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                x = torch.tanh(x @ model.layers[0].weight)
            y = hooked(x)
        found = hooked.cache["head"].clone()
    stream.synchronize()
    assert torch.equal(found, y.detach().cpu())


def test_a_moved_value_cannot_be_overwritten_and_an_alias_is_watched(model, x):
    with ActivationCaching("head", device="cpu").prepare(model) as moved, torch.no_grad():
        y = moved(x)
        before = y.cpu()
        y.zero_()
    assert torch.equal(moved.cache["head"], before)
    with pytest.raises(InplaceModificationError), ActivationCaching("head").prepare(model) as alias, torch.no_grad():
        alias(x).zero_()


def test_a_preallocated_cache_on_the_cpu_takes_values_from_the_gpu(model, x):
    cache = TensorDict({"head": torch.zeros(512, 2)}).lock_()
    with ActivationCaching("head", cache=cache).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(cache["head"], y.detach().cpu())
