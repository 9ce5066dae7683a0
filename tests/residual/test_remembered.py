"""Verdicts on sums are remembered, and forgotten as soon as anything that they rest on changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tdcache
from tdcache import ActivationCaching, residual
from tdcache.cache.named_cache import NamedCache
from tdcache.errors import ResidualError
from tdcache.residual import decomposition, pieces
from tdcache.residual.remembered import once


@pytest.fixture(scope="module")
def model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": 20}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **sizes)).eval().double()


@pytest.fixture
def cache(model: nn.Module) -> NamedCache:
    table = tdcache.names(model)
    pattern = residual.needed(table, heads=True, neurons=True)
    with ActivationCaching(pattern, names=table).prepare(model) as hooked, torch.no_grad():
        hooked(torch.arange(10).view(2, 5))
    assert isinstance(hooked.cache, NamedCache)
    return hooked.cache


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an entry with each comparison."""
    calls: list[int] = []
    plain = decomposition.deviation

    def counted(one: Tensor, other: Tensor) -> float:
        calls.append(1)
        return plain(one, other)

    monkeypatch.setattr(decomposition, "deviation", counted)
    monkeypatch.setattr(pieces, "step_between", _counting(calls, pieces.step_between))
    return calls


def _counting(calls: list[int], function: Callable[..., object]) -> Callable[..., object]:
    def counted(*args: object) -> object:
        calls.append(1)
        return function(*args)

    return counted


READERS = {
    "parts": residual.decompose,
    "heads": residual.head_results,
    "heads as parts": lambda cache: residual.decompose(cache, heads=True),
    "neurons": residual.neuron_results,
}


@pytest.mark.parametrize("reader", list(READERS))
def test_a_sum_is_compared_once_per_cache(reader: str, cache: NamedCache, compared: list[int]) -> None:
    first = READERS[reader](cache)
    assert compared
    compared.clear()
    second = READERS[reader](cache)
    assert not compared
    assert list(first.keys()) == list(second.keys())
    assert all(torch.equal(first[key], second[key]) for key in first.keys())  # noqa: SIM118  # of a TensorDict


@pytest.mark.parametrize("reader", list(READERS))
def test_a_value_that_was_written_to_is_compared_again(reader: str, cache: NamedCache) -> None:
    READERS[reader](cache)
    cache["blocks.1.mlp.contribution" if reader in ("parts", "neurons") else "blocks.1.attn.contribution"][..., 0] += (
        0.1
    )
    with pytest.raises(ResidualError, match=r"differs by|is not what"):
        READERS[reader](cache)


def test_a_value_that_was_replaced_is_compared_again(cache: NamedCache) -> None:
    residual.decompose(cache)
    cache["blocks.0.resid_post"] = cache["blocks.0.resid_post"] * 1.01
    for _ in range(2):  # a failure is not remembered either
        with pytest.raises(ResidualError, match=r"'blocks.0.resid_post' differs by"):
            residual.decompose(cache)
    cache["blocks.0.resid_post"] = cache["blocks.0.resid_post"] / 1.01
    residual.decompose(cache)


def test_a_weight_that_changed_is_no_longer_the_one_of_the_cache(model: nn.Module, cache: NamedCache) -> None:
    residual.head_results(cache)
    weight = model.get_parameter("transformer.h.1.attn.c_proj.weight")
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[:, 0] += 0.1
        with pytest.raises(ResidualError, match=r"'blocks.1.attn.contribution' is not what"):
            residual.head_results(cache)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_norm_is_frozen_anew_after_its_eps_changed(model: nn.Module, cache: NamedCache) -> None:
    norm = model.get_submodule("transformer.ln_f")
    parts = residual.decompose(cache)
    before = residual.apply_norm(parts)["embed"]
    assert torch.equal(residual.apply_norm(parts)["embed"], before)
    eps, norm.eps = norm.eps, 1.0
    try:
        assert not torch.allclose(residual.apply_norm(parts)["embed"], before)
    finally:
        norm.eps = eps


def test_values_of_inference_mode_have_no_versions_and_are_compared_each_time(
    model: nn.Module, compared: list[int]
) -> None:
    table = tdcache.names(model)
    with ActivationCaching(residual.needed(table), names=table).prepare(model) as hooked, torch.inference_mode():
        hooked(torch.arange(10).view(2, 5))
        for _ in range(2):
            compared.clear()
            residual.decompose(hooked.cache)
            assert compared


def test_what_is_remembered_keeps_neither_value_nor_module_alive() -> None:
    owner, value = nn.Linear(2, 2), torch.ones(2)
    gone = [weakref.ref(owner), weakref.ref(value)]
    once(lambda: "found", key="it", owner=owner, values=[value], modules=[owner])
    del owner, value
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_module_with_state_of_other_types_is_never_taken_as_unchanged() -> None:
    owner, value, calls = nn.Linear(2, 2), torch.ones(2), []
    owner.adapters = {"one": 1.0}
    for _ in range(2):
        once(lambda: calls.append(1), key="calls", owner=owner, values=[value], modules=[owner])
    assert calls == [1, 1]
