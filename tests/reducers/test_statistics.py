"""Mean, Variance and TopK against the same statistic of all rows at once."""

import math

import pytest
import torch

import reference
from stable_ids import stable_id
from tdcache.errors import CaptureError
from tdcache.reducers import Mean, TopK, Variance

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def fed(reducer, *values):
    for value in values:
        reducer.update(value)
    return reducer


def batches(dtype, *shapes):
    return [torch.randint(0, 200, shape).to(dtype) for shape in shapes]


def accuracy(dtype):
    """Half precision accumulates in float32, where every step rounds; the rest is rounded once, at the end."""
    return {"rtol": 1e-5, "atol": 0.0} if dtype in (torch.float16, torch.bfloat16) else {"rtol": 1e-6, "atol": 1e-12}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1, (0, 1), (0, 2), (0, 1, 2)])
def test_mean_and_variance_are_those_of_all_rows(dtype, dim):
    values = batches(dtype, (4, 4, 4), (4, 4, 4), (4, 4, 4))
    mean = fed(Mean(dim), *values).compute()
    torch.testing.assert_close(mean, reference.mean(values, dim), **accuracy(dtype))
    for correction in (0, 1, 2):
        variance = fed(Variance(dim, correction=correction), *values).compute()
        torch.testing.assert_close(variance, reference.variance(values, dim, correction), **accuracy(dtype))


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
    empty = fed(Mean(), torch.empty(0, 3))
    assert empty.empty
    with pytest.raises(CaptureError):
        empty.compute()


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
                    value.untyped_storage().nbytes()
                    for value in vars(reducer).values()
                    if isinstance(value, torch.Tensor)
                )
            )
        assert len(set(held)) == 1
