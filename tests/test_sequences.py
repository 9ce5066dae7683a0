"""Which mask belongs to a site, in calls of every kind; and the same positions through real models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdcache.arguments import forward_names, named_arguments
from tdcache.errors import SelectionError
from tdcache.sequences import Sequences

IDS = torch.tensor([[0, 0, 5, 6], [3, 4, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
PLACE = [[-1, -1, 0, 1], [0, 1, -1, -1]]


def place(arguments, *, path="h.0", batch=2, length=4, **options):
    return Sequences(arguments, **options).at(path, batch=batch, length=length).place.tolist()


def cache(length, batch=2):
    """A cache as tuples of keys and values."""
    return tuple((torch.zeros(batch, 1, length, 2), torch.zeros(batch, 1, length, 2)) for _ in range(2))


@pytest.mark.parametrize(
    ("name", "mask", "key"),
    [
        ("attention_mask", MASK, "auto"),
        ("attention_mask", MASK.bool(), "auto"),
        ("mask", MASK, "auto"),
        ("src_key_padding_mask", MASK == 0, "auto"),
        ("key_padding_mask", torch.where(MASK == 1, 0.0, -torch.inf), "auto"),
        ("padding_mask", MASK == 0, "~padding_mask"),
        ("padding_mask", MASK, "padding_mask"),
        ("mine", MASK, "mine"),
        (("in", "mask"), MASK, ("in", "mask")),
    ],
)
def test_masks_are_found_by_name(name, mask, key):
    assert place({"input_ids": IDS, name: mask}, mask_key=key) == PLACE


def test_no_mask_and_no_mask_wanted_are_columns():
    columns = [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert place({"input_ids": IDS}) == columns
    assert place({"input_ids": IDS, "attention_mask": MASK}, mask_key=None) == columns


def test_a_key_that_is_absent_is_an_error_with_near_names():
    with pytest.raises(SelectionError) as error:
        Sequences({"input_ids": IDS, "attention_mask": MASK}, mask_key="atention_mask")
    assert str(error.value) == (
        "mask_key='atention_mask' is no argument of this call; did you mean 'attention_mask'? (mask_key=None counts "
        "columns)"
    )
    with pytest.raises(
        SelectionError, match=r"mask_key='zzz' is no argument of this call; the call has 'input_ids' \("
    ):
        Sequences({"input_ids": IDS, "attention_mask": None}, mask_key="zzz")


def test_a_padding_mask_of_unknown_sense_is_refused():
    with pytest.raises(
        SelectionError, match=r"whether 1 in 'padding_mask' marks a token or padding is not told by its"
    ):
        Sequences({"input_ids": IDS, "padding_mask": MASK})


def test_a_square_mask_called_mask_is_refused():
    with pytest.raises(
        SelectionError, match=r"'mask' of shape \(4, 4\) can be one of rows and tokens or one of queries"
    ):
        Sequences({"x": torch.zeros(4, 4, 2), "mask": torch.ones(4, 4, dtype=torch.bool)})


def test_attention_between_tokens_is_not_padding():
    layer = {"src": torch.zeros(4, 4, 2), "mask": torch.ones(4, 4, dtype=torch.bool).triu(1)}
    assert place(layer, batch=4) == [[0, 1, 2, 3]] * 4


def test_decode_steps_have_the_last_columns_of_the_mask():
    longer = torch.cat([MASK, torch.ones(2, 1)], 1)
    step = {"input_ids": IDS[:, :1], "attention_mask": longer, "past_key_values": cache(4)}
    assert place(step, length=1) == [[2], [2]]


def test_a_mask_over_a_whole_static_cache_is_read_where_the_tokens_are():
    longest = torch.cat([MASK, torch.ones(2, 1), torch.zeros(2, 3)], 1)
    step = {"input_ids": IDS[:, :1], "attention_mask": longest, "past_key_values": cache(4)}
    assert place(step, length=1) == [[2], [2]]


def test_without_a_mask_cached_columns_are_counted():
    assert place({"input_ids": IDS[:, :1], "past_key_values": cache(4)}, length=1) == [[4], [4]]


def test_a_mask_of_the_fed_tokens_alone_counts_from_the_end():
    step = {"input_ids": IDS, "attention_mask": MASK, "past_key_values": cache(4)}
    tokens = Sequences(step).at("h", batch=2, length=4)
    assert tokens.select(-1).int().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    with pytest.raises(SelectionError, match=r"positions from the beginning need the number of cached tokens"):
        tokens.select(0)
    ids = torch.tensor([[1, 1, 7, 8], [9, 10, 1, 1]])
    assert place(step | {"position_ids": ids}) == [[-1, -1, 7, 8], [9, 10, -1, -1]]


def test_a_state_of_unknown_length_counts_the_columns_of_its_mask():
    longer = torch.cat([MASK, torch.ones(2, 1)], 1)
    step = {"input_ids": IDS[:, :1], "attention_mask": longer, "state": [torch.zeros(2, 3)]}
    assert place(step, length=1) == [[2], [2]]


def test_packed_rows_begin_again():
    ids = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])
    assert place({"input_ids": IDS, "position_ids": ids}) == ids.tolist()


def test_one_row_of_mask_is_that_of_all_rows():
    assert place({"input_ids": IDS, "attention_mask": MASK[:1]}) == [PLACE[0]] * 2


def test_a_mask_over_queries_and_keys_is_understood():
    sees = MASK[:, None, None].bool() & torch.ones(4, 4).tril().bool()
    assert place({"input_ids": IDS, "attention_mask": sees}) == PLACE
    assert place({"input_ids": IDS, "attention_mask": {"full_attention": torch.where(sees, 0.0, -1e9)}}) == PLACE


@pytest.mark.parametrize(
    ("name", "mask", "key", "got"),
    [
        ("attention_mask", torch.ones(2, 3), "auto", r"shape \(2, 3\)"),
        ("attention_mask", torch.ones(3, 4), "auto", r"shape \(3, 4\)"),
        ("attention_mask", torch.ones(2, 1, 3, 4) == 1, "auto", r"shape \(2, 1, 3, 4\)"),
        ("attention_mask", {"sliding_attention": MASK}, "auto", r"a dict"),
        ("attn_mask", torch.ones(2, 4, 4) == 1, "attn_mask", r"shape \(2, 4, 4\)"),
    ],
)
def test_masks_that_do_not_tell_are_refused(name, mask, key, got):
    with pytest.raises(
        SelectionError, match=rf"mask '{name}' \({got}\) does not tell the real tokens of the value at 'h"
    ):
        place({"input_ids": IDS, name: mask}, mask_key=key)


def test_a_mask_between_both_lengths_is_refused():
    step = {"input_ids": IDS[:, :1], "attention_mask": MASK, "past_key_values": cache(9)}
    with pytest.raises(SelectionError, match=r"shape \(2, 4\) beside 9 cached tokens"):
        place(step, length=1)


def test_a_value_of_another_length_is_refused():
    with pytest.raises(
        SelectionError, match=r"does not tell the real tokens of the value at 'pool', which has 2 rows of 2"
    ):
        place({"input_ids": IDS, "attention_mask": MASK}, path="pool", length=2)


BOTH = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long),
    "decoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
}


@pytest.mark.parametrize("path", ["encoder.block.0", "shared", "decoder.block.0.layer.1.EncDecAttention.k"])
def test_the_length_tells_the_encoders_sequence(path):
    assert place(BOTH, path=path) == PLACE


def test_the_length_tells_the_decoders_sequence():
    assert place(BOTH, path="lm_head", length=3) == [[0, 1, 2], [0, 1, -1]]


def test_of_equal_lengths_the_path_tells():
    same = BOTH | {"decoder_input_ids": IDS, "decoder_attention_mask": 1 - MASK}
    assert place(same, path="model.encoder.layers.0") == PLACE
    assert place(same, path="model.decoder.layers.0") == [[0, 1, -1, -1], [-1, -1, 0, 1]]
    for path in ("lm_head", "decoder.layers.0.encoder_attn.k_proj"):
        with pytest.raises(SelectionError, match=r"has 4 positions, the length of more than one sequence of this call"):
            place(same, path=path)


def test_a_length_of_no_sequence_is_refused():
    with pytest.raises(SelectionError) as error:
        place(BOTH, path="encoder.conv", length=7)
    assert str(error.value) == (
        "the value at 'encoder.conv' has 7 positions, the length of no sequence of this call (encoder: 4, decoder: 3), "
        "so it cannot be told which mask is its own; name it by mask_key=, or count columns with mask_key=None"
    )


def test_cross_attention_has_the_mask_of_the_encoder():
    call = {"input_ids": IDS[:, :3], "encoder_hidden_states": torch.zeros(2, 4, 2), "encoder_attention_mask": MASK}
    assert place(call, path="crossattention.k") == PLACE
    assert place(call, path="h.0", length=3) == [[0, 1, 2]] * 2


def test_torchs_transformer_has_a_padding_mask_for_each_side():
    call = {
        "src": torch.zeros(4, 2, 8), "tgt": torch.zeros(3, 2, 8),
        "src_key_padding_mask": MASK == 0, "tgt_key_padding_mask": torch.tensor([[False] * 3, [False, False, True]]),
    }  # fmt: skip
    assert place(call, path="encoder.layers.0") == PLACE
    assert place(call, path="decoder.layers.0", length=3) == [[0, 1, 2], [0, 1, -1]]


def test_arguments_are_named_by_the_forward():
    names = forward_names(nn.TransformerEncoder.__new__(nn.TransformerEncoder))
    found = named_arguments(names, (IDS,), {"src_key_padding_mask": MASK == 0})
    assert found["src"] is IDS
    assert found["mask"] is None
    assert place(found) == PLACE


def test_entries_of_a_mapping_are_arguments():
    assert place(named_arguments((), ({"input_ids": IDS, "attention_mask": MASK},), {})) == PLACE


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([{}, {"prefill_chunk_size": 2}, {"use_cache": False}, {"num_beams": 2}, {"static": True}]),
)
def test_generate_numbers_the_real_tokens_of_each_row_one_after_the_other(lengths, left, options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=40)
    model, width = transformers.GPT2LMHeadModel(config).eval(), max(lengths)
    pads = [[0] * (width - each) for each in lengths]
    mask = torch.tensor([pad + [1] * n if left else [1] * n + pad for pad, n in zip(pads, lengths, strict=True)])
    if "static" in options:
        options = {"cache_implementation": "static", "disable_compile": True}
    seen, names = [], forward_names(model)

    def watch(_, args, kwargs):
        arguments = named_arguments(names, args, kwargs)
        fed = arguments["input_ids"]
        seen.append(Sequences(arguments).at("h", batch=fed.shape[0], length=fed.shape[1]).place)

    model.register_forward_pre_hook(watch, with_kwargs=True)
    if "cache_implementation" in options:
        mask = mask.flip(1) if not left else mask  # see the next test for right padding
    plain = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    model.generate(torch.ones_like(mask), attention_mask=mask, **plain, **options)
    rows = torch.cat([mask, mask.new_ones(len(lengths), 2)], 1).repeat_interleave(options.get("num_beams", 1), 0)
    expected = torch.where(rows == 1, rows.cumsum(1) - 1, -1)
    found = seen[-1] if "use_cache" in options else torch.cat(seen, 1)
    assert torch.equal(found, expected)


def test_a_square_mask_beside_a_cache_needs_position_ids_that_agree():
    sees = torch.tensor([[[[False, True, True, True]]], [[[True, True, True, True]]]])
    step = {"input_ids": IDS[:, :1], "attention_mask": sees, "past_key_values": cache(3)}
    assert place(step | {"position_ids": torch.tensor([[2], [3]])}, length=1) == [[2], [3]]
    for ids in (None, torch.tensor([[3], [3]])):  # a window, or padding: who knows
        tokens = Sequences(step | {"position_ids": ids}).at("h", batch=2, length=1)
        assert tokens.select(-1).int().tolist() == [[1], [1]]
        with pytest.raises(SelectionError, match=r"positions from the beginning need the number of cached tokens"):
            tokens.select(2)


def test_a_mask_that_is_named_belongs_to_its_own_sequence():
    both = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long),
        "decoder_attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
    }
    decoder = Sequences(both, mask_key="decoder_attention_mask").at("lm_head", batch=2, length=3)
    assert decoder.place.tolist() == [[0, 1, -1], [-1, 0, 1]]
    encoder = Sequences(both, mask_key="attention_mask").at("shared", batch=2, length=5)
    assert encoder.place.tolist() == [[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    states = {
        "input_ids": both["input_ids"], "encoder_hidden_states": torch.zeros(2, 3, 4),
        "encoder_attention_mask": both["decoder_attention_mask"],
    }  # fmt: skip
    cross = Sequences(states, mask_key="encoder_attention_mask").at("crossattention.key", batch=2, length=3)
    assert cross.place.tolist() == [[0, 1, -1], [-1, 0, 1]]


def test_the_norm_before_cross_attention_is_in_the_decoders_stream():
    speech = {
        "input_features": torch.zeros(2, 7, 12), "decoder_input_ids": torch.zeros(2, 3, dtype=torch.long),
        "decoder_attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
    }  # fmt: skip
    found = Sequences(speech).at("decoder.layers.0.encoder_attn_layer_norm", batch=2, length=3)
    assert found.place.tolist() == [[0, 1, -1], [-1, 0, 1]]
    with pytest.raises(SelectionError, match="the length of more than one sequence of this call"):
        Sequences(speech).at("decoder.layers.0.encoder_attn.k_proj", batch=2, length=3)
