"""What masks say, in every form, and which are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdcache.errors import SelectionError
from tdcache.masks import attended_columns, real_columns

FLAGS = torch.tensor([[0, 1, 1], [1, 1, 0]])
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    "mask",
    [FLAGS, FLAGS.bool(), FLAGS.float(), torch.where(FLAGS == 1, 0.0, LOWEST), torch.where(FLAGS == 1, 0.0, -1e4)],
)
def test_flags_and_summands_say_the_same(mask):
    assert torch.equal(real_columns(mask, "attention_mask"), FLAGS == 1)


@pytest.mark.parametrize("mask", [FLAGS == 0, 1 - FLAGS, torch.where(FLAGS == 1, 0.0, -torch.inf)])
def test_padding_masks_are_turned_round(mask):
    assert torch.equal(real_columns(mask, "src_key_padding_mask", marks_padding=True), FLAGS == 1)


@pytest.mark.parametrize("mask", [torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, -1e9]])])
def test_floats_with_two_readings_are_refused(mask):
    with pytest.raises(SelectionError, match=r"mask 'm' holds floats of which it cannot be told whether 0 keeps"):
        real_columns(mask, "m")


def test_numbers_of_packed_sequences_are_refused():
    with pytest.raises(SelectionError, match=r"mask 'm' holds integers other than 0 and 1 \(from 0 to 2\); of packed"):
        real_columns(torch.tensor([[0, 1, 2]]), "m")


@st.composite
def padded(draw):
    """Rows of real tokens with padding on one side, and how many of their columns are cached."""
    width = draw(st.integers(2, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    left = draw(st.booleans())
    rows = [[0] * (width - each) + [1] * each if left else [1] * each + [0] * (width - each) for each in lengths]
    return torch.tensor(rows, dtype=torch.bool)


def slow_square(real, *, causal, opened):
    """Who looks at whom, cell by cell; rows that look at nothing are opened to all, as for torch's fused attention."""
    batch, width = real.shape
    sees = torch.zeros(batch, 1, width, width, dtype=torch.bool)
    for row in range(batch):
        for query in range(width):
            for key in range(width):
                sees[row, 0, query, key] = bool(real[row, key]) and (key <= query or not causal)
            if opened and not sees[row, 0, query].any():
                sees[row, 0, query] = True
    return sees


@given(padded(), st.booleans(), st.booleans(), st.sampled_from(["bool", "int", "add", "half", "no heads"]))
def test_square_masks_tell_the_padding(real, causal, opened, form):
    sees = slow_square(real, causal=causal, opened=opened)
    mask = {
        "bool": sees,
        "int": sees.int().expand(-1, 2, -1, -1),
        "add": torch.where(sees, 0.0, LOWEST),
        "half": torch.where(sees, 0.0, -1e4).half(),
        "no heads": sees[:, 0],
    }[form]
    assert torch.equal(attended_columns(mask, "attention_mask", end=real.shape[1]), real)


def test_a_window_hides_no_fed_token():
    sees = torch.ones(4, 4).tril().triu(-1)[None, None] == 1
    assert attended_columns(sees, "attention_mask", end=4).all()


def test_slots_of_a_static_cache_that_are_still_empty_do_not_count():
    sees = torch.zeros(1, 1, 2, 6, dtype=torch.bool)
    sees[..., 0, 1:3] = True
    sees[..., 1, 1:4] = True
    assert attended_columns(sees, "attention_mask", end=4).tolist() == [[False, True, True, True]]


def test_biases_and_heads_that_differ_are_refused():
    with pytest.raises(SelectionError, match=r"mask 'm' of shape \(1, 1, 2, 2\) adds other values than 0 and very"):
        attended_columns(torch.tensor([[[[0.0, -0.5], [0.0, 0.0]]]]), "m", end=2)
    with pytest.raises(SelectionError, match=r"mask 'm' of shape \(1, 2, 1, 2\) differs between heads"):
        attended_columns(torch.tensor([[[[True, True]], [[True, False]]]]), "m", end=2)
