"""The arguments of a forward by name, and the length of each kind of cache."""

import pytest
import torch
from torch import nn

from tdcache.arguments import Cached, cached_in, forward_names, length_of_first, named_arguments, tokens_fed

KEYS = torch.zeros(2, 1, 5, 3)
IDS = torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "length"),
    [
        ({}, 0),
        ({"past_key_values": None}, 0),
        ({"past_key_values": ((KEYS, KEYS), (KEYS, KEYS))}, 5),
        ({"past_key_values": ()}, 0),
        ({"kv_cache": {"k": KEYS}}, 5),
        ({"state": [torch.zeros(2, 3, 9)]}, None),
        ({"mems": [torch.zeros(7, 2, 3)]}, None),
        ({"cache_params": object(), "cache_position": torch.tensor([6])}, 6),
        ({"cache_params": object(), "cache_position": torch.arange(4)}, 0),
        ({"cache_params": object()}, None),
    ],
)
def test_the_length_of_a_cache_is_what_it_tells(arguments, length):
    found = cached_in(arguments)
    assert found.length == length
    assert found.filled == (length != 0)


def test_the_first_cache_by_name_counts():
    both = {"state": [KEYS], "past_key_values": ((KEYS,),)}
    assert cached_in(both) == Cached(both["past_key_values"], 5)


def test_caches_of_transformers_tell_their_length_or_that_they_hold_something():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=8, num_hidden_layers=1, state_size=4, vocab_size=9)
    recurrent, filled = transformers.DynamicCache(config=config), transformers.DynamicCache()
    assert cached_in({"cache_params": recurrent}).length == 0
    with torch.no_grad():
        transformers.MambaForCausalLM(config)(IDS, cache_params=recurrent, use_cache=True)
    assert cached_in({"cache_params": recurrent}).length is None
    filled.update(KEYS, KEYS, 0)
    assert cached_in({"past_key_values": filled}).length == 5


class Reads(nn.Module):
    """Takes arguments of all kinds."""

    def forward(self, ids, mask=None, *rest, scale=1.0, **more):
        return ids


def test_arguments_have_the_names_of_the_signature():
    assert forward_names(Reads()) == ("ids", "mask")
    assert named_arguments(("ids", "mask"), (IDS,), {"scale": 2}) == {"ids": IDS, "mask": None, "scale": 2}


def test_a_forward_without_a_signature_has_no_names():
    module = Reads()
    module.forward = dict.fromkeys  # a builtin whose parameters Python does not know
    assert forward_names(module) in ((), ("iterable", "value"))


def test_keywords_come_before_entries_of_a_mapping():
    found = named_arguments(("batch",), ({"mask": 1, "ids": 2},), {"mask": 3})
    assert (found["mask"], found["ids"]) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"input_ids": 0, "decoder_input_ids": IDS}, "decoder_input_ids"),
        ({"input_ids": IDS + 1, "decoder_input_ids": None, "labels": IDS}, "labels"),
        ({"labels": IDS + 1, "input_ids": IDS}, "input_ids"),
        ({"scale": torch.ones(()), "x": IDS}, "x"),
    ],
)
def test_what_is_fed_is_found(arguments, name):
    assert tokens_fed(arguments) is arguments[name]


def test_what_feeds_nothing_feeds_nothing():
    assert tokens_fed({"x": torch.ones(3), "y": "text"}) is None


def test_the_length_of_a_structure_is_that_of_its_first_tensor():
    assert length_of_first((IDS, KEYS)) == 4
    assert length_of_first({"last_hidden_state": KEYS}) == 1
    assert length_of_first(()) is None
