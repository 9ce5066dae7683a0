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


# Both are accumulated in float64; the result is rounded to float32 once (6e-8), or twice for whole numbers.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


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


WAYS = [  # dim, flatten, and the most leading dimensions that a mask covers then
    (0, None, 1),
    (0, 2, 2),
    (0, 3, 3),
    ((0, 1), None, 2),
    ((1, 0), None, 2),
    ((0, 2), None, 1),
    ((0, 1), 2, 3),
]


@st.composite
def masked_values(draw):
    """Two values ``(batch, seq, d)`` with a mask each (or none), and which of their dimensions are rows."""
    dim, flatten, most = draw(st.sampled_from(WAYS))
    covered = draw(st.integers(0, most))
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    pairs = []
    for _ in range(2):
        bits = draw(st.lists(st.booleans(), min_size=27, max_size=27))
        mask = torch.tensor(bits)[: torch.Size(shape[:covered]).numel()].reshape(shape[:covered])
        pairs.append((draw(tensors(shape, (dtype,))), draw(st.sampled_from([mask, None]))))
    return pairs, dim, flatten


def updated(reducer, pairs):
    for value, mask in pairs:
        reducer.update(value, mask)
    return reducer


@given(masked_values())
def test_statistics_under_masks_are_those_of_the_rows_selected(drawn):
    pairs, dim, flatten = drawn
    rows = torch.cat([reference.counted_rows(value, mask, dim, flatten)[0] for value, mask in pairs])
    mean = updated(Mean(dim, flatten=flatten), pairs).compute()
    torch.testing.assert_close(mean, reference.mean([rows], 0), equal_nan=True, **CLOSE)
    variance = updated(Variance(dim, 0, flatten=flatten), pairs).compute()
    if len(rows):  # torch warns of a variance without rows
        torch.testing.assert_close(variance, reference.variance([rows], 0, correction=0), **CLOSE)
    else:
        assert variance.isnan().all()


@given(masked_values(), st.integers(1, 5), st.booleans())
def test_best_rows_under_masks_are_those_of_the_rows_selected(drawn, k, largest):
    pairs, dim, flatten = drawn
    if not isinstance(dim, int):
        dim, flatten = 0, len(dim)
        pairs = [(value, mask if mask is None or mask.dim() <= flatten else None) for value, mask in pairs]
    best = updated(TopK(k, largest=largest, flatten=flatten), pairs).compute()
    rows, numbers, before = [], [], 0
    for value, mask in pairs:
        part, at = reference.counted_rows(value, mask, dim, flatten)
        rows.append(part)
        numbers += [before + number for number in at]
        before += len(reference.counted_rows(value, None, dim, flatten)[0])
    whole = torch.cat(rows)
    assert torch.equal(best["values"], whole.topk(min(k, len(whole)), 0, largest=largest).values)
    places = torch.tensor([numbers.index(number) for number in best["indices"].flatten().tolist()], dtype=torch.int64)
    assert torch.equal(whole.gather(0, places.reshape(best["indices"].shape)), best["values"])


@given(masked_values(), st.none() | st.integers(0, 9))
def test_rows_under_masks_are_the_rows_selected_up_to_the_budget(drawn, budget):
    pairs, dim, flatten = drawn
    if not isinstance(dim, int):
        return
    rows = torch.cat([reference.counted_rows(value, mask, dim, flatten)[0] for value, mask in pairs])
    found = updated(Concatenate(dim, max_rows=budget, flatten=flatten), pairs).compute()
    assert torch.equal(found, rows[:budget])


@given(tensors((2, 3, 4)), st.sampled_from([1, 2, 3, -1, -2, 0]))
def test_flattening_is_reshaping_first(value, flatten):
    merged = flatten if flatten > 0 else 3 + flatten
    flat = value.reshape(-1, *value.shape[merged:])
    for kind in (Mean, Variance, Concatenate):
        one, other = kind(flatten=flatten), kind()
        one.update(value)
        other.update(flat)
        assert torch.equal(one.compute(), other.compute())  # one code path, one shape
    one, other = TopK(2, flatten=flatten), TopK(2)
    one.update(value)
    other.update(flat)
    assert (one.compute() == other.compute()).all()
