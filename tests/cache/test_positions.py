"""``positions=`` of a capture: real tokens, wherever the padding stands."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tdcache import ActivationCaching, Concatenate, Mean, Stack, TopK, Variance
from tdcache.errors import CaptureError, SelectionError

BLOCK = r"transformer\.h\.0\.mlp"


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=39)
    return GPT2LMHeadModel(config).eval()


def padded(side, lengths=(2, 5, 4)):
    wide = max(lengths)
    ids = torch.arange(len(lengths) * wide).reshape(len(lengths), wide) % 37 + 1
    count = torch.arange(wide)
    mask = torch.stack([count < n if side == "right" else count >= wide - n for n in lengths]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def seen(model, batch):
    kept = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return kept[0]


def captured(model, batch, **options):
    with torch.no_grad(), ActivationCaching(BLOCK, **options).prepare(model) as hooked:
        model(**batch)
    return hooked.cache["transformer.h.0.mlp"]


def rows_of(mask, row):
    return mask[row].nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("at", [0, 1, -1, -2])
def test_a_number_is_a_real_token_of_each_row(model, side, at):
    batch = padded(side)
    whole = seen(model, batch)
    expected = torch.stack([whole[row, rows_of(batch["attention_mask"], row)[at]] for row in range(3)])
    assert torch.equal(captured(model, batch, positions=at), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_several_numbers_keep_their_axis_and_order(model, side):
    batch = padded(side)
    whole = seen(model, batch)
    places = [rows_of(batch["attention_mask"], row) for row in range(3)]
    expected = torch.stack([whole[row, [places[row][-1], places[row][0]]] for row in range(3)])
    assert torch.equal(captured(model, batch, positions=[-1, 0]), expected)


def test_without_a_mask_key_positions_are_columns(model):
    batch = padded("left")
    assert torch.equal(captured(model, batch, positions=0, mask_key=None), seen(model, batch)[:, 0])


def test_a_slice_needs_rows_that_have_as_many(model):
    batch = padded("right")
    whole = seen(model, batch)
    assert torch.equal(captured(model, batch, positions=slice(0, 2)), whole[:, :2])
    with pytest.raises(CaptureError) as refused:
        captured(model, batch, positions=slice(None))
    assert str(refused.value) == (
        "positions=slice(None, None, None) keep 2 to 5 tokens of a row at 'transformer.h.0.mlp', which make no tensor; "
        "gather rows with a reducer such as Concatenate(flatten=2) or Mean(flatten=2), or ask for positions that every "
        "row has"
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_statistics_over_real_tokens_are_one_argument(model, side):
    batch = padded(side)
    real = seen(model, batch)[batch["attention_mask"].bool()]
    every = {"positions": slice(None)}
    torch.testing.assert_close(captured(model, batch, reducer=Mean(flatten=2), **every), real.mean(0))
    torch.testing.assert_close(captured(model, batch, reducer=Mean(dim=(0, 1)), **every), real.mean(0))
    torch.testing.assert_close(captured(model, batch, reducer=Variance(flatten=2), **every), real.var(0))
    assert torch.equal(captured(model, batch, reducer=Concatenate(flatten=2), **every), real)
    best = captured(model, batch, reducer=TopK(2, flatten=2), **every)
    assert torch.equal(best["values"], real.topk(2, dim=0).values)
    flat = seen(model, batch).flatten(0, 1)
    assert torch.equal(flat.gather(0, best["indices"]), best["values"])  # row numbers count padding, to find the token


def test_the_last_token_of_every_forward_of_generate(model):
    batch = padded("left")
    with torch.no_grad(), ActivationCaching(BLOCK, positions=-1, reducer=Stack()).prepare(model) as hooked:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert hooked.cache["transformer.h.0.mlp"].shape == (3, 3, 8)


def test_a_prompt_token_is_kept_once_in_generate(model):
    batch = padded("left")
    with torch.no_grad(), ActivationCaching(BLOCK, positions=1, reducer=Stack()).prepare(model) as hooked:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert hooked.cache["transformer.h.0.mlp"].shape == (1, 3, 8)


def test_gradients_are_kept_at_the_same_tokens(model):
    batch = padded("left")
    with ActivationCaching(BLOCK, positions=-1, directions=["fwd", "bwd"]).prepare(model) as hooked:
        model(**batch).logits[:, -1].sum().backward()
    assert hooked.cache["bwd", "transformer.h.0.mlp"].shape == (3, 8)
    assert hooked.cache["bwd", "transformer.h.0.mlp"].abs().sum() > 0


def test_what_cannot_be_counted_is_an_error(model):
    batch = padded("left")
    with pytest.raises(SelectionError, match="need 4 real tokens, but rows 0 "):
        captured(model, batch, positions=3)
    with pytest.raises(SelectionError, match="mask_key='attention_maks' is no argument of this call; did you mean"):
        captured(model, batch, positions=0, mask_key="attention_maks")
    with pytest.raises(SelectionError, match="positions is a number, several, a slice"):
        ActivationCaching(BLOCK, positions="last")
    with torch.no_grad(), ActivationCaching(BLOCK, positions=0).prepare(model):
        model(**batch)
        with pytest.raises(CaptureError, match="ran outside of one; call the model itself, or use index="):
            model.transformer.h[0].mlp(torch.randn(3, 5, 8))
    with (
        pytest.raises(CaptureError, match=r"has shape \(3,\) and no axis 1 of positions; choose position_dim="),
        ActivationCaching("0", positions=0).prepare(nn.Sequential(nn.Flatten(0))) as hooked,
    ):
        hooked(torch.randn(3))
