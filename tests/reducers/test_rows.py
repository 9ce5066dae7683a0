"""Which dimensions are rows, and which rows a mask selects, alike in every reducer over rows."""

import pytest
import torch

from stable_ids import stable_id
from tdcache.errors import CaptureError
from tdcache.reducers import Concatenate, First, Mean, RowReducer, Stack, TopK, Variance

TOKENS = torch.tensor([[True, True, False], [False, True, True]])


def fed(reducer, *values):
    for value in values:
        reducer.update(*value) if isinstance(value, tuple) else reducer.update(value)
    return reducer


def of(computed):
    """Whatever was computed, as one tensor."""
    return (
        computed if isinstance(computed, torch.Tensor) else torch.stack([part.double() for part in computed.values()])
    )


KINDS = [Mean(flatten=2), Variance(flatten=2), TopK(3, flatten=2), Concatenate(flatten=2)]


@pytest.mark.parametrize("reducer", KINDS, ids=stable_id)
def test_padding_counts_for_nothing(reducer):
    values = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(2)]
    padded = [value.masked_fill(~TOKENS[..., None], torch.nan) for value in values]
    found = fed(reducer.fresh(), *((value, TOKENS) for value in padded)).compute()
    alone = fed(
        type(reducer)(3) if isinstance(reducer, TopK) else type(reducer)(), *(value[TOKENS] for value in values)
    )
    if isinstance(reducer, TopK):
        numbers = torch.cat([TOKENS.flatten()] * 2).nonzero().squeeze(1)
        assert torch.equal(found["values"], alone.compute()["values"])
        assert torch.equal(found["indices"], numbers[alone.compute()["indices"]])
    else:
        assert torch.equal(found, alone.compute())  # one code path, one shape


def test_the_number_of_a_best_row_finds_the_token_again():
    values = [torch.randn(2, 3, 4) for _ in range(3)]
    best = fed(TopK(5, flatten=2), *((value, TOKENS) for value in values)).compute()
    rows = torch.cat([value.flatten(0, 1) for value in values])
    assert torch.equal(rows.gather(0, best["indices"]), best["values"])
    assert TOKENS.repeat(3, 1).flatten()[best["indices"]].all()


def test_a_best_row_after_a_merge_is_found_by_its_number_too():
    values = [torch.randn(2, 3, 4) for _ in range(2)]
    one, other = (fed(TopK(5, flatten=2), (value, TOKENS)) for value in values)
    one.merge(other)
    rows = torch.cat([value.flatten(0, 1) for value in values])
    assert one.rows == 12
    assert torch.equal(rows.gather(0, one.compute()["indices"]), one.compute()["values"])


@pytest.mark.parametrize("reducer", [Mean((0, 1)), Variance((0, 1))], ids=stable_id)
def test_a_mask_may_cover_several_dimensions_or_the_first_of_them(reducer):
    value = torch.randint(0, 9, (2, 3, 4)).double()
    wanted = value[TOKENS].mean(0) if isinstance(reducer, Mean) else value[TOKENS].var(0)
    # Sums of small whole numbers are exact in any order, so that only divisions round.
    torch.testing.assert_close(fed(reducer.fresh(), (value, TOKENS)).compute(), wanted, rtol=1e-12, atol=0)
    samples = torch.tensor([False, True])
    wanted = value[1].mean(0) if isinstance(reducer, Mean) else value[1].var(0)
    torch.testing.assert_close(fed(reducer.fresh(), (value, samples)).compute(), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reducer", KINDS, ids=stable_id)
def test_a_mask_that_selects_nothing_leaves_no_rows(reducer):
    value = torch.randn(2, 3, 4)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    found = of(fed(reducer.fresh(), (value, nothing)).compute())
    assert found.isnan().all() if isinstance(reducer, Mean | Variance) else found.numel() == 0
    after = fed(reducer.fresh(), (value, nothing), (value, ~nothing)).compute()
    if not isinstance(reducer, TopK):  # whose numbers count the rows that were left out
        assert torch.equal(of(after), of(fed(reducer.fresh(), value).compute()))


def test_row_numbers_count_rows_that_were_left_out():
    value = torch.tensor([[1.0], [9.0], [5.0]])
    best = fed(TopK(2), (value, torch.tensor([True, False, True])), value).compute()
    assert best["values"].flatten().tolist() == [9.0, 5.0]
    assert best["indices"].flatten()[0].item() == 4
    assert best["indices"].flatten()[1].item() in (2, 5)


def test_masked_rows_do_not_use_up_the_budget():
    value = torch.arange(6.0).reshape(2, 3)
    reducer = fed(Concatenate(flatten=2, max_rows=3), (value, TOKENS))
    assert reducer.compute().tolist() == [0.0, 1.0, 4.0]
    assert reducer.full


def test_a_mask_moves_to_the_value_and_a_number_can_be_masked():
    assert (
        fed(Mean(), (torch.tensor(2.0), torch.tensor(True)), (torch.tensor(9.0), torch.tensor(False))).compute() == 2.0
    )


MASKS = {
    "numbers": (
        Mean(flatten=2),
        torch.ones(2, 3, dtype=torch.int64),
        "Mean(dim=0, flatten=2) takes a boolean mask, got torch.int64; write mask.bool() if 1 means that "
        "the row counts",
    ),
    "another shape": (
        Concatenate(flatten=2),
        torch.ones(2, 1, dtype=torch.bool),
        "Concatenate(dim=0, max_rows=None, flatten=2) got a mask of (2, 1) for a value of (2, 3, 4); the mask has the "
        "shape of the value's leading dimensions, (2, 3)",
    ),
    "dimensions that are no rows": (
        Variance(),
        torch.ones(2, 3, dtype=torch.bool),
        "Variance(dim=0, flatten=None, correction=1) got a mask over 2 leading dimensions of (2, 3, 4), but rows lie "
        "along 0; make rows of all that it covers with flatten=2",
    ),
    "rows along another dimension": (
        TopK(1, dim=1),
        torch.ones(2, dtype=torch.bool),
        "TopK(k=1, dim=1, largest=True, flatten=None) got a mask over 1 leading dimensions of (2, 3, 4), but rows lie "
        "along 1; make rows of all that it covers with flatten=1",
    ),
}


@pytest.mark.parametrize(("reducer", "mask", "text"), MASKS.values(), ids=MASKS)
def test_a_mask_that_does_not_fit_is_refused(reducer, mask, text):
    with pytest.raises(CaptureError) as caught:
        reducer.fresh().update(torch.zeros(2, 3, 4), mask)
    assert str(caught.value) == text


@pytest.mark.parametrize("reducer", [Mean(), Variance(), TopK(1), Concatenate()], ids=stable_id)
def test_flatten_comes_after_the_arguments_that_were_there_before(reducer):
    assert isinstance(reducer, RowReducer)
    assert type(reducer)(**{"k": 1} if isinstance(reducer, TopK) else {}, flatten=2).flatten == 2
    assert Variance(0, 0) == Variance(correction=0)
    assert TopK(1, 1, False) == TopK(1, dim=1, largest=False)


def test_a_reducer_says_when_it_wants_no_further_value():
    value = torch.ones(2, 3)
    assert not First().full
    assert fed(First(), value).full
    for reducer in (Stack(), Mean(), Variance(), TopK(1), Concatenate()):
        assert not fed(reducer, value).full
    assert fed(Concatenate(max_rows=2), value).full
