"""Mean, Variance and TopK against the same statistic of all rows at once."""

import copy
import math
import weakref

import pytest
import torch
from tensordict import TensorDict

import reference
from stable_ids import stable_id
from tdcache.errors import CaptureError
from tdcache.reducers import Concatenate, Mean, TopK, Variance, statistics, totals

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def fed(reducer, *values):
    for value in values:
        reducer.update(value)
    return reducer


def batches(dtype, *shapes):
    return [torch.randint(0, 200, shape).to(dtype) for shape in shapes]


CLOSE = {"rtol": 1e-6, "atol": 1e-12}  # both are accumulated in float64 and rounded once, at the end


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1, (0, 1), (0, 2), (0, 1, 2)])
def test_mean_and_variance_are_those_of_all_rows(dtype, dim):
    values = batches(dtype, (4, 4, 4), (4, 4, 4), (4, 4, 4))
    mean = fed(Mean(dim), *values).compute()
    torch.testing.assert_close(mean, reference.mean(values, dim), **CLOSE)
    for correction in (0, 1, 2):
        variance = fed(Variance(dim, correction=correction), *values).compute()
        torch.testing.assert_close(variance, reference.variance(values, dim, correction), **CLOSE)


def test_values_may_vary_along_the_dimensions_that_are_reduced():
    values = batches(torch.float64, (2, 5, 3), (4, 1, 3), (1, 7, 3), (0, 2, 3))
    torch.testing.assert_close(fed(Mean((0, 1)), *values).compute(), reference.mean(values, (0, 1)))
    torch.testing.assert_close(fed(Variance((0, 1)), *values).compute(), reference.variance(values, (0, 1)))


def test_numbers_are_rows_of_their_own():
    numbers = torch.tensor([1.0, 2.0, 6.0])
    assert fed(Mean(), *numbers).compute().item() == 3.0
    assert fed(Variance(), *numbers).compute().item() == pytest.approx(7.0)  # exact but for the last bit
    assert fed(TopK(2), *numbers).compute()["values"].tolist() == [6.0, 2.0]


def test_complex_values_have_a_complex_mean_and_a_real_variance():
    values = [torch.randn(5, 2, dtype=torch.complex64) for _ in range(3)]
    rows = torch.cat(values)
    torch.testing.assert_close(fed(Mean(), *values).compute(), rows.mean(0))
    torch.testing.assert_close(fed(Variance(), *values).compute(), rows.var(0))


def test_a_large_offset_does_not_drown_the_variance():
    values = [torch.randn(50, 3, dtype=torch.float64) + 1e9 for _ in range(4)]
    torch.testing.assert_close(
        fed(Variance(), *values).compute(), torch.cat(values).var(0), rtol=1e-6, atol=0
    )  # 1e9 leaves 7 digits


def test_half_precision_does_not_overflow():
    values = [torch.full((4, 2), 60_000.0, dtype=torch.float16) for _ in range(8)]
    assert fed(Mean(), *values).compute().tolist() == [60_000.0, 60_000.0]
    assert fed(Variance(), *values).compute().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("rows", "correction"), [(1, 1), (2, 2), (1, 2)])
def test_a_variance_of_too_few_rows_is_nan(rows, correction):
    variance = fed(Variance(correction=correction), torch.ones(rows, 2)).compute()
    assert all(math.isnan(entry) for entry in variance.tolist())


def test_values_without_rows_count_for_nothing():
    assert fed(Mean(), torch.ones(2, 3), torch.empty(0, 3)).compute().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.complex64])
def test_statistics_without_any_row_are_nan_as_in_torch(dtype):
    empty = torch.empty(0, 3, 2, dtype=dtype)
    wide = empty if dtype.is_floating_point or dtype.is_complex else empty.float()
    mean, variance = fed(Mean(), empty), fed(Variance(), empty, empty)
    assert not mean.empty
    assert mean.compute().shape == variance.compute().shape == (3, 2)
    assert mean.compute().dtype == (torch.float32 if dtype == torch.bfloat16 else wide.dtype)
    assert variance.compute().dtype == mean.compute().dtype.to_real()
    assert mean.compute().isnan().all()
    assert variance.compute().isnan().all()
    assert wide.mean(0).isnan().all()
    best = fed(TopK(2), empty.real if dtype.is_complex else empty).compute()
    assert best["values"].shape == best["indices"].shape == (0, 3, 2)
    assert best["indices"].dtype == torch.int64


@pytest.mark.parametrize("reducer", [Mean(), Variance(), TopK(2), Concatenate()], ids=stable_id)
def test_a_run_without_rows_merges_with_one_that_has_some(reducer):
    rows, none = torch.randn(4, 3), torch.empty(0, 3)
    alone = fed(reducer.fresh(), rows).compute()
    for first, second in ((rows, none), (none, rows)):
        one, other = fed(reducer.fresh(), first), fed(reducer.fresh(), second)
        one.merge(other)
        assert same(one.compute(), alone)


def same(one, other):
    return bool((one == other).all())


INF = math.inf


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[INF, 1.0], [2.0]], INF),
        ([[2.0], [INF]], INF),
        ([[INF], [INF]], INF),
        ([[-INF], [1.0, 2.0]], -INF),
        ([[INF], [-INF]], math.nan),
        ([[math.nan], [1.0]], math.nan),
    ],
)
def test_infinite_values_count_as_in_torch(values, expected, accumulate):
    parts = [torch.tensor(part) for part in values]
    whole = torch.cat(parts)
    for found, wanted in (
        (fed(Mean(), *parts).compute(), whole.mean()),
        (fed(Mean(), *parts).compute(), torch.tensor(expected)),
        (fed(Variance(), *parts).compute(), whole.var()),
    ):
        assert torch.equal(found, wanted) or (found.isnan() and wanted.isnan())
    one, other = fed(Mean(), parts[0]), fed(Mean(), *parts[1:])
    one.merge(other)
    assert torch.equal(one.compute().nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0))


@pytest.fixture(params=["float64", "float32"])
def accumulate(request, monkeypatch):
    """Accumulates in float64, or as on a device that has none."""
    if request.param == "float32":
        monkeypatch.setattr(totals, "_has_double", lambda device: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex64])
def test_a_row_counts_after_a_hundred_million_others(dtype, accumulate):
    mean, variance = (fed(kind(), torch.full((1, 2), 1.0, dtype=dtype)) for kind in (Mean, Variance))
    for reducer in (mean, variance):
        for _ in range(27):
            reducer.merge(copy.deepcopy(reducer))
    for _ in range(2000):
        mean.update(torch.full((1, 2), 3.0, dtype=dtype))
        variance.update(torch.full((1, 2), 3.0, dtype=dtype))
    total, late = 2**27 + 2000, 2000
    # Either way the sums are exact to 2^-45 or so; what is left is the rounding of the result to float32.
    exact = (2**27 + 3 * late) / total
    assert mean.compute()[0].real.item() == pytest.approx(exact, rel=1e-7)
    assert mean.compute()[0].real.item() > 1.0
    exact = (2**27 * (1 - exact) ** 2 + late * (3 - exact) ** 2) / (total - 1)
    assert variance.compute()[0].item() == pytest.approx(exact, rel=1e-6)


def test_without_double_precision_many_sums_lose_nothing(accumulate):
    values = [torch.randn(3, 5) for _ in range(3000)]
    # A plain float32 sum of 9000 terms is off by 1e-5 of their size; two floats together keep 14 digits.
    torch.testing.assert_close(fed(Mean(), *values).compute(), reference.mean(values, 0), rtol=3e-6, atol=3e-9)


def test_a_value_that_is_large_is_widened_in_parts(monkeypatch):
    values = batches(torch.float64, (7, 3), (1, 3), (0, 3), (8, 3))
    monkeypatch.setattr(statistics, "_ELEMENTS_ON_CPU", 6)
    torch.testing.assert_close(fed(Mean(), *values).compute(), reference.mean(values, 0), **CLOSE)
    torch.testing.assert_close(fed(Variance(), *values).compute(), reference.variance(values, 0), **CLOSE)


@pytest.mark.parametrize(
    "reducer", [Mean(), Variance(), TopK(2), Concatenate(), Concatenate(max_rows=9)], ids=stable_id
)
@pytest.mark.parametrize("rows", [3, 90_000])  # few rows and many are kept in different kinds of memory
def test_what_is_computed_over_rows_holds_no_graph(reducer, rows):
    reducer = reducer.fresh()
    leaf = torch.ones(rows, 4, requires_grad=True)
    held = weakref.ref(leaf)  # by the graph
    value = 2 * leaf
    fed(reducer, value, value[:1])
    del leaf, value
    assert held() is None
    found = reducer.compute()
    for kept in found.values() if isinstance(found, TensorDict) else [found]:
        assert not kept.requires_grad


@pytest.mark.parametrize("kind", [Mean, Variance])
def test_rows_lie_along_one_dimension_at_least(kind):
    with pytest.raises(ValueError, match=r"^dim=\(\) names no dimension along which rows lie; give one, or several as"):
        kind(())


@pytest.mark.parametrize("reducer", [Mean(), Variance(), TopK(1)], ids=stable_id)
def test_values_that_reduce_to_another_shape_are_refused(reducer):
    fed(reducer.fresh(), torch.ones(2, 3), torch.ones(5, 3))
    with pytest.raises(CaptureError):
        fed(reducer.fresh(), torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(CaptureError):
        fed(reducer.fresh(), torch.ones(2, 3), torch.ones(2, 3, 1))


def distinct(*lengths):
    rows = sum(lengths)
    return torch.randperm(rows * 3).reshape(rows, 3).float().split(lengths)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5, 9, 50])
def test_the_best_rows_are_those_of_all_rows_sorted(k, largest):
    values = distinct(2, 5, 1, 0, 1)
    best = fed(TopK(k, largest=largest), *values).compute()
    expected = reference.top_k(torch.cat(values), k, largest)
    assert torch.equal(best["values"], expected[0])
    assert torch.equal(best["indices"], expected[1])
    assert best.batch_size == ()


@pytest.mark.parametrize("dim", [1, -1])
def test_rows_may_lie_along_any_dimension(dim):
    values = distinct(4, 3, 2)
    best = fed(TopK(3, dim=dim), *(value.T for value in values)).compute()
    expected = reference.top_k(torch.cat(values), 3)
    assert torch.equal(best["values"], expected[0].T)
    assert torch.equal(best["indices"], expected[1].T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_best_values_keep_their_dtype(dtype):
    values = [each.to(dtype) for each in distinct(4, 3)]
    best = fed(TopK(2), *values).compute()
    assert best["values"].dtype == dtype
    assert torch.equal(best["values"], torch.cat(values).topk(2, dim=0).values)


def test_row_numbers_go_on_after_a_merge():
    values = distinct(4, 3, 5)
    one, other = fed(TopK(4), *values[:2]), fed(TopK(4), values[2])
    one.merge(other)
    assert torch.equal(one.compute()["indices"], reference.top_k(torch.cat(values), 4)[1])
    assert one.rows == 12


def test_statistics_hold_as_much_after_many_values_as_after_one():
    for reducer in (Mean(), Variance(), TopK(2)):
        held = []
        for _ in range(3):
            fed(reducer, *[torch.randn(50, 8) for _ in range(4)])
            held.append(
                sum(
                    tensor.untyped_storage().nbytes()
                    for value in vars(reducer).values()
                    for tensor in (vars(value).values() if isinstance(value, totals.Total) else [value])
                    if isinstance(tensor, torch.Tensor)
                )
            )
        assert len(set(held)) == 1
        assert held[0] > 0
