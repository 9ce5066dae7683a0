"""Options that are refused before anything is written, the index of several processes, and what is said on the way."""

import dataclasses
import gc
import inspect
from typing import ClassVar

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader

from harvesting.harvest_data import Counting
from model_state import state_of
from small_models import MLP
from store.faulty_files import contents
from tdcache import ActivationBuffer, ActivationDataset, harvest
from tdcache.compat import collector
from tdcache.errors import CaptureError, SelectionError, SpecError, TdcacheWarning
from tdcache.harvesting import ActivationStore, collect_activations_from_dataloader, loop, preflight
from tdcache.harvesting.options import HarvestOptions
from tdcache.harvesting.progress import Progress
from tdcache.harvesting.workers import Share
from tdcache.store.layout import StorePaths

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_rows": 0}, "max_rows is at least 1, got 0; leave it out for all rows"),
        ({"max_rows": -3}, "max_rows is at least 1, got -3"),
        ({"max_bytes": 0}, "max_bytes is at least 1, got 0"),
        ({"max_bytes": 27}, "max_bytes=27 holds no row: one has 28 bytes in all columns; allow more"),
        ({"dtype": torch.int8}, "dtype is one of 'float64', .*, or None for the model's; got torch.int8"),
        ({"dtype": "half"}, "dtype is one of 'float64', .*; got 'half'"),
    ],
)
def test_a_budget_or_dtype_that_holds_nothing_is_refused_before_anything_is_written(tmp_path, options, text):
    for call in (harvest, preflight):
        with pytest.raises(SelectionError, match=text):
            call(Counting(), X, tmp_path / "a.acts", select="first", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_can_be_given_by_name_and_one_row_is_a_budget(tmp_path):
    named = harvest(Counting(), X, tmp_path / "a.acts", select="first", dtype="bfloat16", max_bytes=20)
    assert (named["first"].dtype, len(named)) == (torch.bfloat16, 1)
    other = harvest(Counting(), X, tmp_path / "b.acts", select="first", dtype=torch.bfloat16, max_bytes=20)
    assert named.id == other.id


def test_the_index_has_the_shards_of_all_ranks_after_they_met(tmp_path, monkeypatch):
    folder = tmp_path / "a.acts"
    options = {"select": "first", "batch_size": 4, "world": 2}

    def meet(share):
        monkeypatch.setattr(Share, "wait", lambda share: None)
        early = StorePaths(folder).index.read_bytes()
        harvest(Counting(), X, folder, rank=1, **options)
        StorePaths(folder).index.write_bytes(early)  # rank 0 looked before rank 1 had written, and wrote after it

    monkeypatch.setattr(Share, "wait", meet)
    harvest(Counting(), X, folder, rank=0, **options)
    assert sorted(StorePaths(folder).read_index()) == [0, 1, 2, 3, 4]
    assert ActivationDataset.open(folder).complete


class Told(Progress):
    totals: ClassVar[list] = []

    def __init__(self, *, shown, total=None):
        super().__init__(shown=False)
        self.totals.append(total)

    def expect(self, total):
        super().expect(total)
        self.totals.append(total)


@pytest.mark.parametrize(
    ("make", "most", "total"),
    [
        (lambda: DataLoader(X, batch_size=5), 1000, 20),
        (lambda: DataLoader(X, batch_size=5), 12, 12),
        (lambda: iter(X.split(5)), 12, 12),
    ],
)
def test_collecting_says_how_many_rows_there_will_be(monkeypatch, make, most, total):
    monkeypatch.setattr(collector, "Progress", Told)
    monkeypatch.setattr(Told, "totals", [])
    collect_activations_from_dataloader(MLP(), make(), "head", most)
    assert Told.totals[-1] == total


@pytest.mark.parametrize(("options", "total"), [({}, 20), ({"max_rows": 7}, 7), ({"rank": 1, "world": 2}, 10)])
def test_a_harvest_says_how_many_rows_it_will_run(monkeypatch, tmp_path, options, total):
    monkeypatch.setattr(loop, "Progress", Told)
    monkeypatch.setattr(Told, "totals", [])
    harvest(Counting(), X, tmp_path / "a.acts", select="first", batch_size=5, **options)
    assert Told.totals == [total]


def test_progress_counts_the_time_left_by_what_is_expected(capsys):
    with Progress(shown=True) as progress:
        progress.expect(10)
        progress.add(10)
    assert "10" in capsys.readouterr().err


class Odd(nn.Module):
    """Of its parts, one returns no tensor, one now and then, and one is never called."""

    def __init__(self):
        super().__init__()
        self.linear, self.text, self.now, self.never = nn.Linear(4, 2), Text(), Now(), nn.Linear(4, 2)

    def forward(self, x):
        self.text(x)
        self.now(x)
        return self.linear(x)


class Text(nn.Module):
    def forward(self, x):
        return "no tensor"


class Now(nn.Module):
    def forward(self, x):
        return x.sum() if len(x) > 2 else None


def test_where_nobody_names_the_layers_those_without_tensors_are_passed_over():
    model = Odd()
    before = state_of(model)
    with ActivationStore(model) as store:
        model(X)
        assert set(store.activations) == {"linear", "now"}
        model(X[:2])
        assert set(store.activations) == {"linear"}
    assert torch.equal(store.get("linear"), model.linear(X[:2]))
    assert state_of(model) == before


def test_a_store_knows_its_layers_before_it_is_enabled():
    assert ActivationStore(MLP(), ["head", "layers.0"]).layer_names == ["layers.0", "head"]
    assert ActivationStore(MLP(), r"layers\.[01]").layer_names == ["layers.0", "layers.1"]
    assert "head" in ActivationStore(MLP()).layer_names


def test_fault_variables_that_no_launcher_of_torch_has_set_are_said_to_make_a_share(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(TdcacheWarning, match=r"runs share 1 of 2 only, .* RANK=1 .* give rank=0 and world=1"):
        dataset = harvest(Counting(), X, tmp_path / "a.acts", select="first", batch_size=4)
    assert not dataset.complete
    assert harvest(Counting(), X, tmp_path / "a.acts", select="first", batch_size=4, rank=0, world=1).complete
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert harvest(Counting(), X, tmp_path / "b.acts", select="first", batch_size=4).complete


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("one", "2"), ("", "2")])
def test_fault_variables_that_are_no_share_are_refused(tmp_path, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"says RANK='{rank}' and WORLD_SIZE='{world}', which is no share of the work"):
        harvest(Counting(), X, tmp_path / "a.acts", select="first")


def test_fault_a_store_that_is_dropped_while_it_is_enabled_leaves_no_hook():
    model = MLP()
    before = state_of(model)
    for layers in (None, ["head"]):
        store = ActivationStore(model, layers)
        store.enable()
        assert state_of(model) != before
        del store
        gc.collect()
        assert state_of(model) == before


@pytest.mark.parametrize("first", [3, 7, 8, 12])
@pytest.mark.parametrize("then", [13, 16, 20, 1000, None])
def test_fault_a_limit_can_be_raised_later_and_the_bytes_are_those_of_one_run(tmp_path, first, then):
    options = {"select": "first", "batch_size": 4, "shard_bytes": 200}
    whole = harvest(Counting(), X, tmp_path / "whole.acts", max_rows=then, **options)
    folder = tmp_path / "a.acts"
    assert len(harvest(Counting(), X, folder, max_rows=first, **options)) == first
    assert len(harvest(Counting(), X, folder, max_rows=first, **options)) == first
    model = Counting()
    found = harvest(model, X, folder, max_rows=then, recheck=False, **options)
    assert found.complete
    assert model.calls == -(-len(whole) // 4) - (first - 1) // 4  # the units that were whole are not run again
    assert contents(folder) == contents(tmp_path / "whole.acts")


def test_a_limit_is_raised_by_several_processes(tmp_path):
    options = {"select": "first", "batch_size": 4, "shard_bytes": 200}
    folder = tmp_path / "a.acts"
    for limit in (10, 17):
        for rank in (1, 0, 2):
            harvest(Counting(), X, folder, max_rows=limit, rank=rank, world=3, **options)
    harvest(Counting(), X, tmp_path / "whole.acts", max_rows=17, **options)
    assert contents(folder) == contents(tmp_path / "whole.acts")


def test_a_limit_cannot_be_lowered(tmp_path):
    harvest(Counting(), X, tmp_path / "a.acts", select="first", max_rows=9)
    with pytest.raises(SpecError, match=r"holds 9 rows, and at most 5 are asked for now; a limit can be raised later"):
        harvest(Counting(), X, tmp_path / "a.acts", select="first", max_rows=5)


def test_the_options_are_those_of_the_signature_with_the_same_defaults():
    spelled = inspect.signature(harvest).parameters
    inside = [each for each in dataclasses.fields(HarvestOptions) if each.name != "held_on"]
    assert {each.name for each in inside} <= spelled.keys()
    for each in inside:
        missing = each.default is dataclasses.MISSING
        assert spelled[each.name].default is (inspect.Parameter.empty if missing else each.default), each.name
        assert spelled[each.name].annotation == each.type, each.name


def test_a_buffer_names_an_option_that_it_does_not_have():
    with pytest.raises(TypeError, match="ActivationBuffer has no option 'dytpe'; there are 'match', 'direction'"):
        ActivationBuffer(Counting(), X, select="first", rows=8, batch_size=4, dytpe=torch.bfloat16)


def test_a_pick_that_gives_several_tensors_is_refused(tmp_path):
    def both(value):
        return TensorDict({"a": value, "b": value}, batch_size=[len(value)])

    with pytest.raises(CaptureError, match=r"pick=<function .* gives TensorDict, no tensor, at '0'"):
        harvest(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(3, 2), tmp_path / "a", select="0", pick=both)
