"""The buffer for training: the rows of a harvest, mixed, resumed, and without a trace on the model."""

import threading
from itertools import islice

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from harvesting.harvest_data import SELECT, SITES, Counting, Padded, Tokens, batches_of, encoder, gpt2
from model_state import state_of
from tdcache import ActivationBuffer, harvest
from tdcache.errors import CaptureError, SelectionError, SpecError
from tdcache.store.dtypes import DTYPES

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
OPTIONS = {"select": "first", "rows": 16, "batch_size": 5, "samples": 8}


def together(batches):
    return torch.cat(list(batches))


def in_order(rows):
    """Sorted by sample and place."""
    return rows[(rows["seq"] * 1000 + rows["pos"]).argsort()]


def assert_same_rows(one, other):
    one, other = in_order(one), in_order(other)
    assert sorted(one.keys()) == sorted(other.keys())
    for key in one.keys():  # noqa: SIM118 - iterating a TensorDict iterates its rows
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"drop": "pad|bos"},
        {"positions": [0, -1], "dtype": "bfloat16"},
        {"max_rows": 33},
        {"max_bytes": 2000},
        {"direction": "fwd_pre"},
    ],
)
def test_an_epoch_has_exactly_the_rows_of_a_harvest(tmp_path, options, ahead):
    data = batches_of(Tokens(), 4, Padded("left"))
    store = harvest(encoder(), data, tmp_path / "a.acts", select=SELECT, **options)
    buffer = ActivationBuffer(encoder(), data, select=SELECT, rows=30, batch_size=7, ahead=ahead, **options)
    batches = list(buffer)
    assert [len(batch) for batch in batches[:-1]] == [7] * (len(batches) - 1)
    found = together(batches)
    assert not torch.equal(found["seq"], in_order(found)["seq"])
    assert_same_rows(found, store[...])
    assert {key: found[key].dtype for key in SITES} == {key: store.describe(key)[0] for key in SITES}
    described = {path: (site["dtype"], tuple(site["shape"])) for path, site in buffer.spec["sites"].items()}
    assert {path: (DTYPES[dtype], shape) for path, (dtype, shape) in described.items()} == {
        key: store.describe(key) for key in SITES
    }


def test_its_statistics_are_those_of_the_store(tmp_path):
    data = batches_of(Tokens(), 4, Padded())
    store = harvest(gpt2(), data, tmp_path / "a.acts", select=r"h\.\d")
    buffer = ActivationBuffer(gpt2(), data, select=r"h\.\d", rows=30, batch_size=7)
    list(buffer)
    list(buffer)  # a second epoch has the same rows, and counts them no more
    for path, there in store.statistics.items():
        here = buffer.statistics[path]
        assert here.rows == there.rows == len(store)
        # sums of float32 in chunks of other lengths
        torch.testing.assert_close(here.mean, there.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(here.variance, there.variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ahead", [0, 3])
@pytest.mark.parametrize("stop", [1, 4, 9, 10])
def test_a_resumed_stream_is_the_uninterrupted_one(stop, ahead, tmp_path):
    whole = ActivationBuffer(Counting(), X, **OPTIONS, seed=3)
    wanted = [*whole, *whole]
    buffer = ActivationBuffer(Counting(), X, **OPTIONS, seed=3, ahead=ahead)
    before = list(islice(iter(buffer), stop))
    torch.save(buffer.state_dict(), tmp_path / "state.pt")
    model = Counting()
    resumed = ActivationBuffer(model, X, **OPTIONS, seed=3, ahead=ahead)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    after = [*resumed, *(resumed if stop < 10 else ())]
    assert len(before) + len(after) == len(wanted) == 20
    for one, other in zip([*before, *after], wanted, strict=True):
        assert torch.equal(one["seq"], other["seq"])
        assert torch.equal(one["first"], other["first"])


def test_what_a_state_holds_is_not_run_again():
    buffer = ActivationBuffer(Counting(), X, **OPTIONS, ahead=0)
    next(iter(buffer))
    model = Counting()
    resumed = ActivationBuffer(model, X, **OPTIONS, ahead=0)
    resumed.load_state_dict(buffer.state_dict())
    calls = model.calls
    list(resumed)
    assert model.calls - calls == 7 - 2  # seven batches of eight samples; sixteen rows are those of two


def test_a_loop_that_was_left_goes_on_where_it_was_also_over_an_iterator():
    for data in (X.split(8), iter(X.split(8))):
        buffer = ActivationBuffer(Counting(), data, **OPTIONS, ahead=3)
        parts = [next(iter(buffer)) for _ in range(4)]
        found = together([*parts, *buffer])
        assert sorted(found["seq"].tolist()) == list(range(50))


def test_epochs_differ_and_seeds_pin_them():
    one, same, other = (ActivationBuffer(Counting(), X, **OPTIONS, seed=seed) for seed in (0, 0, 1))
    first, second = together(one)["seq"], together(one)["seq"]
    assert torch.equal(first, together(same)["seq"])
    assert not torch.equal(first, together(other)["seq"])
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_a_row_is_mixed_with_those_of_other_forwards():
    rows = torch.arange(4000.0)[:, None].expand(-1, 4)
    buffer = ActivationBuffer(Counting(), rows, select="first", rows=1000, batch_size=100, samples=50)
    found = together(buffer)["seq"]
    same = (found[1:] // 50 == found[:-1] // 50).double().mean()
    assert same < 0.1  # 50 of 1000 would be 0.05; without mixing it is 0.98


def test_shares_are_disjoint_and_together_the_whole_also_with_a_limit():
    for limit, count in ((None, 50), (29, 29)):
        found = []
        for rank in range(3):
            buffer = ActivationBuffer(Counting(), X, **OPTIONS, rank=rank, world=3, max_rows=limit)
            found += together(buffer)["seq"].tolist()
        assert sorted(found) == list(range(count))


def test_the_model_is_as_it_was_after_a_loop_and_after_a_break():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).train()
    before = state_of(model)
    buffer = ActivationBuffer(model, X, **{**OPTIONS, "select": "0"})
    for _ in buffer:
        assert not model[0].training
        break
    assert state_of(model) == before
    list(buffer)
    assert state_of(model) == before
    assert not [each for each in threading.enumerate() if each.name == "tdcache-forwards"]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_forward_that_fails_is_raised_and_its_batch_comes_again(ahead):
    model = Counting(fail_at=5)
    buffer = ActivationBuffer(model, X, **OPTIONS, ahead=ahead)
    found = []
    with pytest.raises(RuntimeError, match="the model failed"):  # noqa: PT012 - the loop is what fails
        for batch in buffer:
            found.append(batch)  # noqa: PERF402 - what came before the failure counts
    other = ActivationBuffer(Counting(), X, **OPTIONS)
    other.load_state_dict(buffer.state_dict())
    rest = list(buffer)
    wanted = [batch["seq"] for batch in ActivationBuffer(Counting(), X, **OPTIONS)]
    for way in (rest, list(other)):
        assert all(map(torch.equal, [batch["seq"] for batch in [*found, *way]], wanted))
        assert len(found) + len(way) == len(wanted)


def test_columns_come_with_the_rows():
    data = [{"x": part, "label": torch.arange(len(part)) + 10} for part in X.split(10)]
    buffer = ActivationBuffer(Counting(), data, select="first", rows=16, batch_size=5, columns=["label"])
    found = together(buffer)
    assert torch.equal(found["label"], found["seq"] % 10 + 10)


def test_what_cannot_be_is_refused():
    with pytest.raises(SelectionError, match=r"a buffer needs 1 <= batch_size <= rows, got batch_size=9, rows=8"):
        ActivationBuffer(Counting(), X, select="first", rows=8, batch_size=9)
    with pytest.raises(SelectionError, match="overflow is 'raise' or 'count', got 'clip'"):
        ActivationBuffer(Counting(), X, select="first", rows=8, batch_size=4, overflow="clip")
    buffer = ActivationBuffer(Counting(), X, **OPTIONS)
    other = ActivationBuffer(Counting(), X, **OPTIONS, seed=1)
    with pytest.raises(SpecError, match="the state is of another buffer: they differ in seed") as caught:
        buffer.load_state_dict(other.state_dict())
    assert caught.value.fields == ("seed",)
    once = ActivationBuffer(Counting(), iter(X.split(8)), **OPTIONS)
    list(once)
    with pytest.raises(
        SelectionError, match=r"the data is an iterator \(tuple_iterator\), which can be gone through once"
    ):
        list(once)
    large = ActivationBuffer(nn.Sequential(nn.Identity()), X * 1e6, select="0", rows=16, batch_size=4, dtype="float16")
    with pytest.raises(CaptureError, match=r"values at '0' in batch 0 cannot be held by torch.float16"):
        list(large)
    assert isinstance(next(iter(buffer)), TensorDict)
