"""However the rows are split over calls and runs, a reducer gives what one pass over all of them gives."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from properties.strategies import splits, tensors
from tdcache.reducers import Concatenate, First, Last, Mean, Stack, TopK, Variance


@st.composite
def runs(draw):
    """All rows in one tensor, and the same rows as calls that are dealt to two runs, in order."""
    rows = draw(st.integers(1, 12))
    whole = draw(tensors((rows, 3)))
    calls = list(whole.split(draw(splits(rows))))
    cut = draw(st.integers(0, len(calls)))
    return whole, calls[:cut], calls[cut:]


def reduced(reducer, first, second):
    """The result of two runs that were merged."""
    one, other = reducer.fresh(), reducer.fresh()
    for run, values in ((one, first), (other, second)):
        for value in values:
            run.update(value)
    one.merge(other)
    return one.compute()


# Half precision accumulates in float32: at most a dozen rounding steps of 6e-8 each.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@given(runs())
def test_merged_means_and_variances_are_those_of_all_rows(runs):
    whole, first, second = runs
    torch.testing.assert_close(reduced(Mean(), first, second), reference.mean([whole], 0), **CLOSE)
    torch.testing.assert_close(
        reduced(Variance(correction=0), first, second), reference.variance([whole], 0, correction=0), **CLOSE
    )


@given(runs(), st.integers(1, 14), st.booleans())
def test_merged_best_rows_are_those_of_all_rows(runs, k, largest):
    whole, first, second = runs
    best = reduced(TopK(k, largest=largest), first, second)
    values, indices = reference.top_k(whole, k, largest)
    assert torch.equal(best["values"], values)
    assert torch.equal(best["indices"], indices)


@given(runs(), st.none() | st.integers(0, 14))
def test_merged_rows_are_all_rows_up_to_the_budget(runs, budget):
    whole, first, second = runs
    assert torch.equal(reduced(Concatenate(max_rows=budget), first, second), whole[:budget])


@given(runs(), st.none() | st.integers(0, 14))
def test_rows_along_another_dimension_are_joined_there(runs, budget):
    whole, first, second = runs
    turned = [[call.T for call in calls] for calls in (first, second)]
    assert torch.equal(reduced(Concatenate(dim=1, max_rows=budget), *turned), whole.T[:, :budget])


@given(runs())
def test_merged_calls_are_all_calls_in_order(runs):
    _, first, second = runs
    calls = first + second
    assert reduced(Last(), first, second) is calls[-1]
    assert reduced(First(), first, second) is calls[0]
    stacked = reduced(Stack(), first, second)
    dense = stacked if isinstance(stacked, torch.Tensor) else [stacked[str(at)] for at in range(len(calls))]
    assert all(torch.equal(one, other) for one, other in zip(dense, calls, strict=True))


@given(runs())
def test_the_order_of_updates_matters_only_where_a_reducer_says_so(runs):
    _, first, second = runs
    for reducer in (Mean(), Variance(correction=0)):
        assert not reducer.ordered
        there, back = reduced(reducer, first, second), reduced(reducer, second[::-1], first[::-1])
        torch.testing.assert_close(there, back, **CLOSE)
