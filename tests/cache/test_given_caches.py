"""Caches that the caller hands in: plain, on a device, locked, memory-mapped, or the very TensorDict of the data."""

import pytest
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import nn

from small_models import MLP
from stable_ids import stable_id
from tdcache import ActivationCaching, CacheWriteError, ContextError, Stack


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))


def test_the_given_cache_is_the_one_that_is_written(model, x):
    cache = TensorDict()
    with ActivationCaching("2", cache=cache).prepare(model) as hooked:
        y = hooked(x)
        assert hooked.cache is cache
        assert hooked.hooking_context.cache is cache
    assert torch.equal(cache["2"], y)


def test_a_given_cache_is_emptied_on_entering_unless_told_otherwise(model, x):
    for clear_cache, keys in ((True, ["2"]), (False, ["2", "before"])):
        cache = TensorDict({"before": torch.zeros(1)})
        with ActivationCaching("2", cache=cache, clear_cache=clear_cache).prepare(model) as hooked:
            hooked(x)
        assert sorted(cache.keys()) == keys


def test_the_context_can_clear_its_cache(model, x):
    with ActivationCaching("2", reducer=Stack()).prepare(model) as hooked:
        hooked(x)
        assert not hooked.cache.is_empty()
        hooked.hooking_context.clear()
        assert hooked.cache.is_empty()
        hooked(x)
        assert hooked.cache["2"].shape == (1, 5, 2)


def test_values_move_to_the_device_of_the_cache(model, x):
    cache = TensorDict(device="meta")
    with ActivationCaching("0|2", cache=cache, directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    assert cache["fwd", "0"].device.type == cache["bwd", "0"].device.type == "meta"
    assert cache["fwd", "0"].shape == (5, 3)


def test_a_cache_on_the_cpu_takes_values_as_they_are(model, x):
    cache = TensorDict(device="cpu")
    with ActivationCaching("2", cache=cache).prepare(model) as hooked:
        y = hooked(x)
        assert cache["2"].data_ptr() == y.data_ptr()


# Locked


def test_a_locked_cache_is_written_in_place(model, x):
    there = torch.zeros(5, 2)
    cache = TensorDict({"2": there}).lock_()
    with ActivationCaching("2", cache=cache).prepare(model) as hooked:
        for scale in (1, 2):
            y = hooked(scale * x)
            assert torch.equal(there, y)
    assert cache.is_locked
    assert cache["2"] is there


def test_a_locked_cache_with_directions_is_written_in_place(model, x):
    cache = TensorDict({"fwd": {"2": torch.zeros(5, 2)}, "bwd": {"2": torch.zeros(5, 2)}}).lock_()
    with ActivationCaching("2", cache=cache, directions=["fwd", "bwd"]).prepare(model) as hooked:
        y = hooked(x)
        y.sum().backward()
    assert torch.equal(cache["fwd", "2"], y)
    assert torch.equal(cache["bwd", "2"], torch.ones(5, 2))


@pytest.mark.parametrize("options", [{"hold": "snapshot"}, {"hold": "live"}, {"reducer": Stack()}], ids=stable_id)
def test_a_locked_cache_takes_values_however_they_are_held(model, x, options):
    shape = (1, 5, 2) if "reducer" in options else (5, 2)
    cache = TensorDict({"2": torch.zeros(shape)}).lock_()
    with ActivationCaching("2", cache=cache, **options).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(cache["2"].reshape(5, 2), y)


def test_a_locked_cache_without_the_entries_is_refused_on_entering(model):
    cache = TensorDict({"0": torch.zeros(5, 3)}).lock_()
    with pytest.raises(CacheWriteError, match="'2'") as caught, ActivationCaching("0|2", cache=cache).prepare(model):
        pass
    assert caught.value.paths == ("2",)
    assert not model[0]._forward_hooks


def test_a_locked_cache_keeps_its_own_gradient_graph_out(model, x):
    cache = TensorDict({"2": torch.zeros(5, 2)}).lock_()
    with ActivationCaching("2", cache=cache).prepare(model) as hooked:
        hooked(x)
    assert not cache["2"].requires_grad


# Memory-mapped


def test_a_memory_mapped_cache_is_written_in_place_and_read_back_from_disk(model, x, tmp_path):
    cache = TensorDict({"0": torch.zeros(5, 3), "2": torch.zeros(5, 2)}).memmap_(tmp_path)
    with ActivationCaching("0|2", cache=cache).prepare(model) as hooked:
        y = hooked(x)
    assert isinstance(cache["2"], MemoryMappedTensor)
    assert torch.equal(TensorDict.load_memmap(tmp_path)["2"], y)


@pytest.mark.parametrize(
    ("there", "complaint"),
    [(torch.zeros(5, 3), r"shape \(5, 3\)"), (torch.zeros(5, 2, dtype=torch.float64), "torch.float64")],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_another_shape_or_dtype_is_an_error_that_names_the_key(model, x, tmp_path, there, complaint, mapped):
    cache = TensorDict({"2": there})
    cache = cache.memmap_(tmp_path) if mapped else cache.lock_()
    with (
        pytest.raises(CacheWriteError, match=complaint) as caught,
        ActivationCaching("2", cache=cache).prepare(model) as hooked,
    ):
        hooked(x)
    assert "'2'" in str(caught.value)
    assert caught.value.paths == ("2",)
    assert torch.equal(cache["2"], there)


def test_dtype_makes_a_value_fit_a_preallocated_entry(model, x, tmp_path):
    cache = TensorDict({"2": torch.zeros(5, 2, dtype=torch.float16)}).memmap_(tmp_path)
    with ActivationCaching("2", cache=cache, dtype=torch.float16).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(cache["2"], y.detach().half())


# The TensorDict of the data itself


def test_the_data_can_be_the_cache(model, x):
    data = TensorDict({"input": x})
    with ActivationCaching("0", cache=data, clear_cache=False).prepare(model) as hooked:
        assert hooked(data) is data
    assert sorted(data.keys()) == ["0", "input", "output"]
    assert torch.equal(data["0"], model[0](x))
    assert torch.equal(data["output"], model(x))


def test_a_cache_key_that_is_an_output_key_is_refused(model, x):
    data = TensorDict({"input": x})
    with (
        ActivationCaching("0|2", cache=data, clear_cache=False).prepare(model, out_keys=["2"]) as hooked,
        pytest.raises(CacheWriteError, match="'2'") as caught,
    ):
        hooked(data)
    assert caught.value.paths == ("2",)
    assert sorted(data.keys()) == ["input"]


def test_a_cache_key_that_is_an_input_key_is_refused(x):
    model = nn.ModuleDict({"input": nn.Linear(4, 4)})
    model.forward = lambda x: model["input"](x)
    data = TensorDict({"input": x})
    with (
        ActivationCaching("input", cache=data, clear_cache=False).prepare(model) as hooked,
        pytest.raises(CacheWriteError, match="'input'"),
    ):
        hooked(data)
    assert torch.equal(data["input"], x)


# Batch size


def test_batch_dims_gives_the_cache_a_batch_size(x):
    model = MLP()
    with ActivationCaching(r"layers\.\d|head", batch_dims=1).prepare(model) as hooked:
        hooked(x)
        assert hooked.cache.batch_size == (5,)
        hooked(x[:3])  # a batch of another size replaces the one before
        assert hooked.cache.batch_size == (3,)
    assert torch.equal(hooked.cache[1]["head"], model(x[:3])[1])


def test_batch_dims_with_directions_gives_every_node_the_batch_size(x):
    model = MLP()
    with ActivationCaching(r"layers\.\d", batch_dims=2, directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    assert hooked.cache["fwd"].batch_size == hooked.cache["bwd"].batch_size == (5, 4)
    assert hooked.cache.batch_size == (5, 4)


def test_leading_dims_that_disagree_are_an_error_that_names_the_entries(x):
    model = MLP()
    with (
        ActivationCaching(r"layers\.\d|head", batch_dims=2).prepare(model) as hooked,
        pytest.raises(RuntimeError, match=r"'head' \(5, 2\)") as caught,
    ):
        hooked(x)
    assert caught.value.paths == ("head",)


def test_a_second_use_keeps_the_entries_of_the_first_under_nested_keys():
    model, cache = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), TensorDict()
    for pattern in ("0", "1"):
        factory = ActivationCaching(pattern, cache=cache, clear_cache=False, use_nested_keys=True)
        with factory.prepare(model) as hooked:
            hooked(torch.ones(1, 2))
    assert sorted(cache["fwd"].keys()) == ["0", "1"]


def test_a_node_of_the_cache_that_is_an_output_key_is_refused():
    data = TensorDict({"input": torch.ones(1, 2)})
    factory = ActivationCaching("0", cache=data, clear_cache=False, use_nested_keys=True)
    with (
        factory.prepare(nn.Sequential(nn.Linear(2, 2)), out_keys=["fwd"]) as hooked,
        pytest.raises(CacheWriteError, match="'fwd'"),
    ):
        hooked(data)


def test_a_cache_that_is_no_tensordict_is_refused():
    with pytest.raises(ContextError, match=r"cache= is a TensorDict, got dict"):
        ActivationCaching("0", cache={}).prepare(nn.Sequential(nn.Linear(2, 2)))


def test_a_cache_that_is_locked_inside_the_block_is_refused_and_no_output_is_overwritten():
    model = nn.Sequential(nn.Linear(2, 2))
    with ActivationCaching("0").prepare(model) as hooked:
        y = hooked(torch.ones(1, 2))
        kept = y.clone()
        hooked.cache.lock_()
        with pytest.raises(CacheWriteError, match="locked inside the block"):
            hooked(torch.zeros(1, 2))
        assert torch.equal(y, kept)
        hooked.cache.unlock_()
        hooked(torch.zeros(1, 2))
