"""Positions among real tokens, against a twin that walks over each row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdcache.errors import SelectionError
from tdcache.tokens import Tokens, check_positions

LEFT_AND_RIGHT = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])


def slow_select(rows, positions, *, cached=(), begins=None):
    """For each row of 0 and 1 the columns meant: a list of its tokens is indexed as Python indexes lists."""
    selected = []
    for number, row in enumerate(rows):
        sequences = [[None] * (cached[number] if cached else 0)]
        for column, real in enumerate(row):
            if real:
                if begins and begins[number][column]:
                    sequences.append([])
                sequences[-1].append(column)
        meant = set()
        for each in sequences:
            if isinstance(positions, slice):
                meant |= set(each[positions])
            else:
                meant |= {each[at] for at in positions if -len(each) <= at < len(each)}
        selected.append([column in meant for column in range(len(row))])
    return torch.tensor(selected)


@st.composite
def batches(draw):
    """Rows of one length, each padded left, right or in places; how many tokens of each are cached."""
    length, count = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=count, max_size=count))
    return rows, draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))


bounds = st.none() | st.integers(-9, 9)
slices = st.builds(slice, bounds, bounds, st.sampled_from([None, 1, 2, 3]))
numbers = st.lists(st.integers(-6, 6), min_size=1, max_size=4)


@given(batches(), slices | numbers)
def test_positions_mean_what_indexing_a_list_of_the_real_tokens_means(batch, positions):
    rows, cached = batch
    tokens = Tokens(torch.tensor(rows) == 1, torch.tensor(cached), more=True)
    assert torch.equal(tokens.select(positions), slow_select(rows, positions, cached=cached))


@given(
    batches(), st.integers(1, 6), numbers | slices.filter(lambda each: (each.start or 0) >= 0 and (each.stop or 0) >= 0)
)
def test_chunks_select_what_the_whole_prompt_does_from_the_start(batch, size, positions):
    rows, _ = batch
    if isinstance(positions, list):
        positions = [abs(each) for each in positions]
    mask = torch.tensor(rows)
    whole = Tokens(mask == 1, torch.zeros(len(rows), dtype=torch.long), more=True).select(positions)
    parts, begin = [], 0
    for chunk in mask.split(size, dim=1):
        parts.append(Tokens(chunk == 1, mask[:, :begin].sum(1), more=True).select(positions))
        begin += chunk.shape[1]
    assert torch.equal(torch.cat(parts, 1), whole)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3), slices | numbers)
def test_packed_rows_count_in_each_sequence(lengths, positions):
    width = max(map(sum, lengths))
    rows = [[1] * sum(each) + [0] * (width - sum(each)) for each in lengths]
    ids = [[at for size in each for at in range(size)] + [0] * (width - sum(each)) for each in lengths]
    begins = [[column > 0 and at == 0 for column, at in enumerate(each)] for each in ids]
    tokens = Tokens.of_mask(torch.tensor(rows), position_ids=torch.tensor(ids))
    found = Tokens(tokens.real, tokens.before, tokens.sequence, more=True).select(positions)
    assert torch.equal(found, slow_select(rows, positions, begins=begins))


def test_place_counts_real_tokens_after_cached_ones():
    tokens = Tokens.of_mask(LEFT_AND_RIGHT, before=torch.tensor([3, 0]))
    assert tokens.place.tolist() == [[-1, 3, 4, 5], [0, 1, -1, -1]]
    assert tokens.lengths.tolist() == [3, 2]


def test_a_packed_sequence_goes_on_in_the_next_forward():
    tokens = Tokens.of_mask(torch.ones(1, 4), before=torch.tensor([2]), position_ids=torch.tensor([[2, 3, 0, 1]]))
    assert tokens.place.tolist() == [[2, 3, 0, 1]]


def test_position_ids_of_left_padding_are_no_packed_sequences():
    ids = torch.tensor([[1, 0, 1, 2], [0, 1, 1, 1]])
    assert Tokens.of_mask(LEFT_AND_RIGHT, position_ids=ids).sequence is None


def test_columns_are_in_the_order_asked_for():
    tokens = Tokens.of_mask(LEFT_AND_RIGHT)
    assert tokens.columns([-1, 0]).tolist() == [[3, 1], [1, 0]]
    assert tokens.columns(1).tolist() == [[2], [1]]
    assert tokens.columns(torch.tensor([[2], [0]])).tolist() == [[3], [0]]


def test_a_mask_of_columns_leaves_padding_out():
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(Tokens.of_mask(LEFT_AND_RIGHT).select(everywhere), LEFT_AND_RIGHT == 1)


def test_each_row_can_have_positions_of_its_own():
    chosen = Tokens.of_mask(LEFT_AND_RIGHT).select(torch.tensor([[0, -1], [1, 1]]))
    assert chosen.int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_without_a_mask_positions_are_columns():
    assert Tokens.columns_of(2, 3).select([0, -1]).int().tolist() == [[1, 0, 1], [1, 0, 1]]


def test_a_cached_token_is_no_column_of_a_decode_step():
    tokens = Tokens(torch.ones(2, 1, dtype=torch.bool), torch.tensor([4, 2]), more=True)
    assert tokens.select(0).int().tolist() == [[0], [0]]
    assert tokens.select(4).int().tolist() == [[1], [0]]
    assert tokens.select(-1).int().tolist() == [[1], [1]]


def test_counting_from_the_end_needs_no_cached_tokens():
    tokens = Tokens(torch.ones(1, 2, dtype=torch.bool), None)
    assert tokens.select(-2).int().tolist() == [[1, 0]]
    assert tokens.select(slice(-1, None)).int().tolist() == [[0, 1]]
    with pytest.raises(SelectionError, match=r"positions from the beginning need the number of cached tokens"):
        tokens.select(0)


def test_rows_with_too_few_tokens_are_named():
    with pytest.raises(SelectionError) as error:
        Tokens.of_mask(LEFT_AND_RIGHT).select(-3)
    assert str(error.value) == (
        "positions [-3] need 3 real tokens, but rows 1 (counted from 0) have [2]; a slice takes what there is"
    )


def test_a_row_without_tokens_has_no_last_one():
    with pytest.raises(SelectionError, match=r"need 1 real tokens, but rows 0, 1 and 5 more|rows 0 \(counted"):
        Tokens.of_mask(torch.tensor([[0, 0], [1, 1]])).select(-1)


@pytest.mark.parametrize("positions", [1.5, "last", [], [0, None], True, slice(0, 3, -1), torch.tensor([0.5])])
def test_what_are_no_positions_is_refused(positions):
    with pytest.raises(SelectionError, match=r"positions is a number, several, a slice with a positive step"):
        check_positions(positions)


@pytest.mark.parametrize(
    ("positions", "text"),
    [
        (
            torch.ones(2, 3, dtype=torch.bool),
            r"positions of shape \(2, 3\) do not fit tokens of shape \(2, 4\): a bool",
        ),
        (torch.zeros(3, 1, dtype=torch.long), r"positions of shape \(3, 1\) do not .*: an integer tensor has \(2, k\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(positions, text):
    with pytest.raises(SelectionError, match=text):
        Tokens.of_mask(LEFT_AND_RIGHT).select(positions)


def test_columns_refuses_what_is_not_one_column():
    tokens = Tokens.of_mask(LEFT_AND_RIGHT)
    with pytest.raises(SelectionError, match=r"one column per position needs numbers, got slice\(0, 1, None\)"):
        tokens.columns(slice(0, 1))
    with pytest.raises(SelectionError, match=r"positions of shape \(1, 1\) do not fit"):
        tokens.columns(torch.tensor([[0]]))
    with pytest.raises(SelectionError, match=r"positions \[0\] are not one column each in rows 0: a token is cached"):
        Tokens.of_mask(LEFT_AND_RIGHT, before=torch.tensor([1, 0])).columns(0)
