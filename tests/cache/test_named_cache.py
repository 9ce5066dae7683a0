import copy
import re

import pytest
import torch
from tensordict import TensorDict

from tdcache import CanonicalNameError, Names
from tdcache.cache.named_cache import NamedCache, new_node
from tdcache.points.point_cache import PointCache

ROLES = ("resid_post", "attn.pattern", "attn.q")


def table(blocks=3, prefix=""):
    return Names({f"{prefix}blocks.{layer}.{role}": f"h.{layer}.{role}" for layer in range(blocks) for role in ROLES})


def filled(names=None):
    names = table() if names is None else names
    cache = NamedCache.of(names)
    for at, name in enumerate(names):
        cache[name] = torch.tensor([float(at)])
    return cache


def test_an_entry_is_asked_for_by_role_and_layer():
    cache = filled()
    assert cache["resid_post", 1] is cache["blocks.1.resid_post"]
    assert cache["attn.pattern", -1] is cache["blocks.2.attn.pattern"]
    assert cache["pattern", 0] is cache["blocks.0.attn.pattern"]
    assert cache["pattern", 0, "attn"] is cache["blocks.0.attn.pattern"]
    assert cache.get(("resid_post", 1)) is cache["blocks.1.resid_post"]
    assert cache.get(("resid_post", 9), None) is None
    assert cache.get(("resid_post", 9), default=3) == 3


def test_an_entry_of_a_stack_with_a_prefix_is_asked_for_with_the_prefix():
    names = Names({**table(2, "encoder."), **table(1, "decoder.")})
    cache = filled(names)
    assert cache["encoder.resid_post", -1] is cache["encoder.blocks.1.resid_post"]
    assert cache["decoder.attn.q", -1] is cache["decoder.blocks.0.attn.q"]


def test_other_spellings_are_found_by_the_end_of_their_name():
    cache = filled(Names({"blocks.0.attn.hook_q": "q", "blocks.0.hook_resid_pre": "x"}))
    assert cache["q", 0, "attn"] is cache["blocks.0.attn.hook_q"]
    assert cache["resid_pre", 0] is cache["blocks.0.hook_resid_pre"]


def test_a_direction_comes_first():
    cache = NamedCache.of(table())
    cache["bwd"] = new_node(cache)
    cache["bwd"]["blocks.1.resid_post"] = torch.ones(2)
    assert torch.equal(cache["bwd", "resid_post", 1], torch.ones(2))
    assert torch.equal(cache["bwd"]["resid_post", -2], torch.ones(2))


def test_what_the_model_or_the_cache_lacks_is_named():
    cache = filled().exclude("blocks.0.attn.q")
    with pytest.raises(
        CanonicalNameError, match=r"^'blocks.0.attn.q' is not kept in this cache, which keeps 'blocks.0"
    ):
        cache["attn.q", 0]
    with pytest.raises(
        CanonicalNameError, match=re.escape("('resid_post', 3) means nothing in this model, which has 3")
    ):
        cache["resid_post", 3]
    with pytest.raises(
        CanonicalNameError, match=r"'blocks.0.resid_pst' is none of .* did you mean 'blocks.0.resid_post'"
    ):
        cache["resid_pst", 0]
    twice = filled(Names({"blocks.0.attn.out": "a", "blocks.0.mlp.out": "b"}))
    with pytest.raises(
        CanonicalNameError, match=re.escape("('out', 0) may be 'blocks.0.attn.out', 'blocks.0.mlp.out'")
    ):
        twice["out", 0]
    refused = filled(Names({"blocks.0.attn.q": "a"}, refused={"blocks.0.resid_mid": "it is parallel"}))
    with pytest.raises(CanonicalNameError, match=r"'blocks.0.resid_mid' is refused for this model: it is parallel"):
        refused["resid_mid", 0]


def test_it_is_a_tensordict_and_copies_carry_the_table():
    cache = filled()
    assert isinstance(cache, TensorDict)
    names = cache.table
    copies = [cache.clone(), cache.to("cpu"), cache.detach(), cache.select("blocks.2.resid_post"), copy.deepcopy(cache)]
    for each in copies:
        assert each.table is names
        assert torch.equal(each["resid_post", -1], cache["blocks.2.resid_post"])
    assert torch.equal((cache * 2)["resid_post", -1], 2 * cache["blocks.2.resid_post"])
    batched = NamedCache({"blocks.0.attn.q": torch.arange(3)}, batch_size=[3])
    assert batched[1:]["attn.q", 0].tolist() == [1, 2]
    assert batched[1]["attn.q", 0].item() == 1


@pytest.mark.parametrize("kind", [NamedCache, PointCache])
def test_a_cache_takes_in_what_a_tensordict_would(kind):
    for given in (
        {"a": torch.ones(2), "b.c": torch.zeros(3)},
        {"a": 2 * torch.ones(2)},
        {"n": {"x": torch.ones(1)}},
        {},
    ):
        cache, plain = kind({"a": torch.zeros(2)}), TensorDict({"a": torch.zeros(2)})
        assert cache.update(given) is cache
        plain.update(given)
        assert list(cache.keys(include_nested=True)) == list(plain.keys(include_nested=True))
        assert all(torch.equal(cache[key], value) for key, value in plain.items(leaves_only=True))


@pytest.mark.parametrize("kind", [NamedCache, PointCache])
def test_a_cache_refuses_what_a_tensordict_would(kind):
    locked = kind({"a": torch.zeros(2)}).lock_()
    with pytest.raises(RuntimeError, match="locked"):
        locked.update({"a": torch.ones(2)})
    with pytest.raises(RuntimeError, match="batch dimension mismatch"):
        kind({}, batch_size=[2]).update({"a": torch.ones(3)})
    assert kind({}, device="meta").update({"a": torch.ones(3)})["a"].device.type == "meta"


def test_of_stacked_blocks_the_error_says_where_they_are():
    cache = NamedCache.of(table())
    cache["blocks.*.resid_post"] = torch.ones(3, 2)
    with pytest.raises(
        CanonicalNameError,
        match=re.escape("first axis of 'blocks.*.resid_post', in order of their numbers among those that the pattern")
        + r".*cache\['blocks\.\*\.resid_post'\]\[-1\] if it matched all",
    ):
        cache["resid_post", -1]
