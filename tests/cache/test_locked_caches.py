"""Caches hold nothing stale: locked, lazily stacked, with a batch size, and with direct calls of modules."""

import pytest
import torch
from tensordict import TensorDict, lazy_stack
from torch import nn

from small_models import MLP
from tdcache import ActivationCaching, CaptureError, UnfiredSiteWarning


class Sometimes(nn.Module):
    """Runs its second module only when it is told to."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Linear(3, 3), nn.Linear(3, 3)
        self.both = True

    def forward(self, x):
        x = self.always(x)
        return self.sometimes(x) if self.both else x


@pytest.mark.parametrize(
    ("dtype", "void"),
    [(torch.float32, float("nan")), (torch.complex64, complex("nan")), (torch.int64, -(2**63)), (torch.bool, False)],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_locked_entry_without_a_value_is_void_and_named(dtype, void, mapped, tmp_path):
    model = Sometimes()
    cache = TensorDict({"always": torch.zeros(2, 3, dtype=dtype), "sometimes": torch.ones(2, 3, dtype=dtype)})
    cache = cache.memmap_(tmp_path) if mapped else cache.lock_()
    factory = ActivationCaching("always|sometimes", cache=cache, callback=lambda output, **rest: output.to(dtype))
    with factory.prepare(model) as hooked, torch.no_grad():
        hooked(torch.ones(2, 3))
        assert torch.equal(cache["sometimes"], model.sometimes(model.always(torch.ones(2, 3))).to(dtype))
        model.both = False
        with pytest.warns(UnfiredSiteWarning, match="no value for 'sometimes' of the locked cache.*they are NaN now"):
            hooked(torch.ones(2, 3))
        expected = torch.full((2, 3), void, dtype=dtype)
        assert torch.allclose(cache["sometimes"].real, expected.real, equal_nan=True)
        hooked(torch.ones(2, 3))  # told once
        model.both = True
        hooked(torch.ones(2, 3))
        assert torch.equal(cache["sometimes"], model.sometimes(model.always(torch.ones(2, 3))).to(dtype))


def test_a_locked_gradient_is_void_from_the_next_forward_on():
    model = nn.Sequential(nn.Linear(3, 3))
    cache = TensorDict({"bwd": TensorDict({"0": torch.zeros(2, 3)})}).lock_()
    with ActivationCaching("0", directions=["bwd"], use_nested_keys=True, cache=cache).prepare(model) as hooked:
        hooked(torch.ones(2, 3)).sum().backward()
        assert torch.equal(cache["bwd", "0"], torch.ones(2, 3))
        y = hooked(torch.ones(2, 3))
        assert cache["bwd", "0"].isnan().all()
        y.sum().backward()
    assert torch.equal(cache["bwd", "0"], torch.ones(2, 3))


def test_a_given_cache_keeps_its_batch_size_when_it_is_emptied():
    cache = TensorDict({"before": torch.zeros(5, 1)}, batch_size=[5])
    with ActivationCaching("head", cache=cache).prepare(MLP()) as hooked:
        assert cache.is_empty()
        hooked(torch.ones(5, 4))
        assert cache.batch_size == (5,)
        hooked.hooking_context.clear()
    assert cache.batch_size == (5,)


@pytest.mark.parametrize("directions", [["fwd"], ["fwd", "bwd"]])
def test_a_lazily_stacked_cache_is_written(directions):
    cache = lazy_stack([TensorDict(), TensorDict()])
    with ActivationCaching("head", cache=cache, directions=directions).prepare(MLP()) as hooked:
        for _ in range(2):
            y = hooked(torch.randn(2, 4))
            y.sum().backward()
    assert torch.equal(cache["head"] if len(directions) == 1 else cache["fwd", "head"], y)
    if len(directions) == 2:
        assert torch.equal(cache["bwd", "head"], torch.ones(2, 2))


def test_a_locked_lazily_stacked_cache_is_written_in_place():
    cache = lazy_stack([TensorDict({"head": torch.zeros(2)}), TensorDict({"head": torch.zeros(2)})]).lock_()
    with ActivationCaching("head", cache=cache).prepare(MLP()) as hooked:
        y = hooked(torch.randn(2, 4))
    assert torch.equal(cache["head"], y)


def test_direct_calls_with_batch_dims_must_agree_in_their_batch():
    model = MLP()
    with ActivationCaching(r"layers\.0|head", batch_dims=1).prepare(model) as hooked:
        model.head(torch.ones(5, 4))
        assert hooked.cache.batch_size == (5,)
        with pytest.raises(CaptureError, match=r"batch_dims=1 needs the same leading dims.*'head' \(5, 2\)"):
            model.layers[0](torch.ones(3, 4))
        hooked(torch.ones(3, 4))
        assert hooked.cache.batch_size == (3,)


def test_direct_calls_are_stacked_once_all_have_come():
    model, x = MLP(), torch.ones(5, 4)
    with ActivationCaching(r"layers\.(?P<at>\d)", stack_by="at").prepare(model) as hooked:
        values = []
        for layer in model.layers:
            assert hooked.cache.is_empty()
            values.append(layer(x))
        assert torch.equal(hooked.cache["layers.*"], torch.stack(values))
        assert list(hooked.cache.keys()) == ["layers.*"]


def test_direct_calls_that_cannot_be_stacked_are_named():
    model = MLP()
    with (
        pytest.warns(UnfiredSiteWarning, match=r"'layers\.1' ran outside a forward of the model, without the others"),
        ActivationCaching(r"layers\.(?P<at>\d)", stack_by="at").prepare(model) as hooked,
    ):
        model.layers[1](torch.ones(5, 4))
    assert hooked.cache.is_empty()


def test_several_values_of_a_site_cannot_be_stacked():
    with pytest.raises(CaptureError, match="stack_by='at' stacks one value per site, and pick='all' keeps several"):
        ActivationCaching(r"layers\.(?P<at>\d)", stack_by="at", pick="all")
