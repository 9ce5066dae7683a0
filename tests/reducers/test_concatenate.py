"""Concatenate: rows joined exactly as ``torch.cat`` joins them, within the budget, in bounded memory."""

import subprocess
import sys

import pytest
import torch

from tdcache.errors import CaptureError
from tdcache.reducers import Concatenate


def fed(reducer, *values):
    for value in values:
        reducer.update(value)
    return reducer


def batches(*lengths, shape=(3,), dim=0, dtype=torch.float32):
    shapes = [(*shape[:dim], length, *shape[dim:]) for length in lengths]
    return [torch.randint(-99, 99, each).to(dtype) for each in shapes]


@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_values_are_joined_along_dim(dim, dtype):
    values = [torch.randint(-9, 9, (2, 2, 2)).to(dtype) for _ in range(3)]
    joined = fed(Concatenate(dim=dim), *values).compute()
    assert joined.dtype == dtype
    assert torch.equal(joined, torch.cat(values, dim))


def test_rows_that_outgrow_their_room_many_times_are_those_of_cat():
    values = batches(*range(1, 60), shape=(5000,))  # 35 MB, with room for one at first
    reducer = fed(Concatenate(), *values)
    assert torch.equal(reducer.compute(), torch.cat(values))
    assert reducer.rows == sum(range(60))


def test_rows_can_be_read_between_two_calls_and_stay_what_they_were():
    values = batches(2, 3, 4)
    reducer = fed(Concatenate(), values[0])
    first = reducer.compute()
    copy = first.clone()
    fed(reducer, values[1])
    assert torch.equal(reducer.compute(), torch.cat(values[:2]))
    fed(reducer, values[2])
    assert torch.equal(reducer.compute(), torch.cat(values))
    assert torch.equal(first, copy)


@pytest.mark.parametrize("budget", [0, 1, 4, 5, 6, 11, 12, 13, 100])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_row_budget_is_exact(budget, dim):
    values = batches(5, 1, 6, shape=(3,), dim=dim)
    reducer = fed(Concatenate(dim=dim, max_rows=budget), *values)
    assert torch.equal(reducer.compute(), torch.cat(values, dim).narrow(dim, 0, min(budget, 12)))
    assert reducer.rows == min(budget, 12)
    assert reducer.full is (budget <= 12)


def test_a_merge_stays_within_the_budget():
    values = batches(3, 4)
    one, other = fed(Concatenate(max_rows=5), values[0]), fed(Concatenate(max_rows=5), values[1])
    one.merge(other)
    assert torch.equal(one.compute(), torch.cat(values)[:5])


def test_a_budget_that_memory_cannot_hold_is_grown_towards():
    values = batches(3, 4)
    reducer = fed(Concatenate(max_rows=10**15), *values)
    assert torch.equal(reducer.compute(), torch.cat(values))
    assert not reducer.full


def test_values_are_copied_so_that_nothing_pins_a_batch():
    value = torch.ones(2, 3)
    reducer = fed(Concatenate(), value)
    value.zero_()
    assert reducer.compute().sum() == 6


@pytest.mark.parametrize(
    ("flatten", "shape", "flat"),
    [
        (2, (2, 3, 4), (6, 4)),
        (1, (2, 3, 4), (2, 3, 4)),
        (3, (2, 3, 4), (24,)),
        (-1, (2, 3, 4), (6, 4)),
        (-2, (2, 3, 4), (2, 3, 4)),
        (-1, (5,), (5,)),
        (0, (2, 3), (6,)),
    ],
)
def test_leading_dimensions_become_rows(flatten, shape, flat):
    values = [torch.randn(shape) for _ in range(2)]
    joined = fed(Concatenate(flatten=flatten), *values).compute()
    assert torch.equal(joined, torch.cat([value.reshape(flat) for value in values]))


def test_flattening_makes_rows_of_values_that_vary_in_length():
    values = [torch.randn(2, length, 3) for length in (5, 1, 7)]
    joined = fed(Concatenate(flatten=2), *values).compute()
    assert torch.equal(joined, torch.cat([value.reshape(-1, 3) for value in values]))


def test_numbers_are_rows_of_their_own():
    assert torch.equal(fed(Concatenate(), *torch.arange(4.0)).compute(), torch.arange(4.0))


def test_a_result_that_somebody_holds_is_not_changed_by_later_rows():
    first, second = batches(3000, 9000, shape=(100,))
    reducer = fed(Concatenate(), first)
    held = reducer.compute()
    assert torch.equal(fed(reducer, second).compute(), torch.cat([first, second]))
    assert torch.equal(held, first)


def test_the_storage_of_a_result_holds_its_rows_and_no_more():
    (rows,) = batches(5000, shape=(100,))
    for reducer in (Concatenate(), Concatenate(max_rows=50_000)):
        assert fed(reducer, rows).compute().untyped_storage().nbytes() == rows.nbytes


def test_values_without_rows_are_taken():
    reducer = fed(Concatenate(), torch.empty(0, 768))
    assert reducer.compute().shape == (0, 768)
    (rows,) = batches(2, shape=(768,))
    assert torch.equal(fed(reducer, rows, torch.empty(0, 768)).compute(), rows)


def test_the_result_is_contiguous_where_dim_is_the_first():
    assert fed(Concatenate(), *batches(2, 3)).compute().is_contiguous()
    assert fed(Concatenate(max_rows=50), *batches(2, 3)).compute().is_contiguous()


@pytest.mark.parametrize("other", [torch.ones(2, 4), torch.ones(2, 3, 1), torch.ones(2)])
def test_rows_of_another_shape_are_refused_and_nothing_is_lost(other):
    values = batches(2)
    reducer = fed(Concatenate(), *values)
    with pytest.raises(CaptureError):
        reducer.update(other)
    assert torch.equal(reducer.compute(), values[0])


def test_rows_of_another_dtype_are_refused_rather_than_cast():
    reducer = fed(Concatenate(), torch.ones(1, 2, dtype=torch.int64))
    with pytest.raises(CaptureError):
        reducer.update(torch.full((1, 2), 0.5))
    assert reducer.compute().tolist() == [[1, 1]]


# For each kind, the peak above what was there before, in units of the payload, as the kernel counts it for the process.
MEASURE = """
import torch
from tdcache.reducers import Concatenate
rows, width, steps = 57_344, 1024, 112
batch = torch.ones(rows // steps, width)

def resident(name):
    with open("/proc/self/status") as status:
        return int(dict(line.split(":", 1) for line in status)[name].split()[0]) * 1024

def peak(reducer):
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # the peak starts anew
    before = resident("VmRSS")
    for step in range(steps):
        reducer.update(batch)
    result = reducer.compute()
    assert result.shape == (rows, width) and result[-1, -1] == 1
    return (resident("VmHWM") - before) / result.nbytes

print(peak(Concatenate(max_rows=rows)), peak(Concatenate()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_is_kept_and_little_more():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    preallocated, grown = map(float, run.stdout.split())  # 224 MiB in batches of 2 MiB
    assert 0.98 < preallocated <= 1.03  # the payload itself is counted, or else this measures nothing
    assert 0.98 < grown <= 1.15


def test_results_taken_while_rows_grow_keep_their_values():
    values = batches(*[700] * 60, shape=(50,))
    reducer, held = Concatenate(), []
    for value in values:
        reducer.update(value)
        held.append(reducer.compute())
    whole = torch.cat(values)
    assert all(torch.equal(part, whole[: len(part)]) for part in held)
