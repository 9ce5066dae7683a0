"""What a harvest stores, beside a loop over tokens written by hand; and what it refuses."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from harvesting.harvest_data import (
    SELECT,
    SITES,
    Counting,
    Padded,
    Tokens,
    batches_of,
    by_hand,
    encoder,
    gpt2,
    llama,
)
from model_state import state_of
from store.faulty_files import Counted, contents, disk_full
from tdcache import ActivationDataset, harvest
from tdcache.errors import CaptureError, SelectionError, SpecError, StoreError
from tdcache.harvesting import preflight
from tdcache.store.files import Files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "a.acts"


def harvest_tokens(folder, model=None, data=None, **options):
    options = {"select": SELECT, "batch_size": 4, "collate": Padded(), **options}
    return harvest(model or encoder(), data or Tokens(), folder, **options)


def assert_rows(dataset, expected, dtype=None):
    rows = dataset[...]
    assert set(rows.keys()) == set(expected)
    for name, values in expected.items():
        wanted = values.to(dtype) if dtype and values.is_floating_point() else values
        assert torch.equal(rows[name], wanted), name


def test_the_rows_are_those_of_a_loop_over_tokens(folder):
    expected = by_hand(encoder(), batches_of(Tokens(), 4, Padded()), SITES)
    dataset = harvest_tokens(folder)
    assert_rows(dataset, expected)
    assert len(dataset) == sum(map(len, Tokens().samples))
    dataset.verify()


@pytest.mark.parametrize(
    ("options", "keep"),
    [
        ({"drop": "pad|bos"}, lambda place, length: place > 0),
        ({"drop": ["bos", "pad"], "positions": slice(None, 4)}, lambda place, length: 0 < place < 4),
        ({"positions": slice(1, -1)}, lambda place, length: 0 < place < length - 1),
        ({"positions": slice(-3, None)}, lambda place, length: place >= length - 3),
        ({"positions": slice(1, 8, 3)}, lambda place, length: place in (1, 4, 7)),
        ({"positions": -1}, lambda place, length: place == length - 1),
        ({"positions": [0, -1]}, lambda place, length: place in (0, length - 1)),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_bos_and_positions_are_dropped_at_capture(folder, options, keep, side):
    batches = batches_of(Tokens(), 4, Padded(side))
    expected = by_hand(encoder(), batches, SITES, keep)
    assert_rows(harvest_tokens(folder, collate=Padded(side), **options), expected)


def test_without_dropping_every_place_of_the_grid_is_a_row(folder):
    dataset = harvest_tokens(folder, drop=None)
    assert len(dataset) == sum(batch["input_ids"].numel() for batch in batches_of(Tokens(), 4, Padded()))


@pytest.mark.parametrize(("make", "select"), [(gpt2, r"h\.\d"), (llama, r"layers\.\d"), (gpt2, r"h\.\d\.attn")])
def test_decoders_and_modules_that_return_tuples(folder, make, select):
    model = make()
    dataset = harvest_tokens(folder, model=model, select=select, collate=Padded("left"))
    assert_rows(dataset, by_hand(model, batches_of(Tokens(), 4, Padded("left")), dataset.keys))


def test_inputs_can_be_stored_in_place_of_outputs(folder):
    inputs = harvest_tokens(folder, select=r"encoder\.layer\.1", direction="fwd_pre")
    outputs = by_hand(encoder(), batches_of(Tokens(), 4, Padded()), ["encoder.layer.0"])
    assert torch.equal(inputs["encoder.layer.1"][...], outputs["encoder.layer.0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_values_are_cast_when_they_are_taken(folder, dtype):
    expected = by_hand(encoder(), batches_of(Tokens(), 4, Padded()), SITES)
    dataset = harvest_tokens(folder, dtype=dtype)
    found = dataset["encoder.layer.1"][...]
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected["encoder.layer.1"].to(dtype).float())


def test_values_that_the_dtype_cannot_hold_are_refused_or_counted(folder, tmp_path):
    model = nn.Sequential(nn.Identity())
    x = torch.tensor([[1.0, 70000.0], [-1e9, float("inf")], [65504.0, float("nan")]])
    with pytest.raises(CaptureError, match=r"2 values at '0' in batch 0 cannot be held by torch.float16; store"):
        harvest(model, [x], folder, select="0", dtype=torch.float16)
    dataset = harvest(model, [x], tmp_path / "b.acts", select="0", dtype=torch.float16, overflow="count")
    assert dataset.shards[0].info.overflow == {"0": 2}
    eights = harvest(model, [x], tmp_path / "c.acts", select="0", dtype=torch.float8_e4m3fn, overflow="count")
    assert eights.shards[0].info.overflow == {"0": 4}  # 65504, and infinity, which becomes 448
    assert harvest(model, [x], tmp_path / "d.acts", select="0", dtype=torch.bfloat16).shards[0].info.overflow == {}


def test_values_are_copies_that_a_later_in_place_operation_does_not_change(folder):
    model, x = Counting(), torch.randn(6, 4)
    dataset = harvest(model, [x], folder, select="first")
    expected = model.first(x).detach()
    assert (expected < 0).any()
    assert torch.equal(dataset["first"][...], expected)


def test_rows_are_samples_where_there_are_no_tokens(folder, tmp_path):
    x = torch.randn(10, 4)
    dataset = harvest(Counting(), DataLoader(TensorDataset(x, torch.arange(10)), batch_size=3), folder, select="second")
    assert torch.equal(dataset["seq"][...], torch.arange(10))
    assert dataset.row_keys == ("seq", "pos")
    pooled = harvest_tokens(tmp_path / "b.acts", select="pooler")
    assert (len(pooled), pooled["pooler"].shape) == (21, (21, 16))
    whole = harvest_tokens(tmp_path / "c.acts", data=Tokens(8, 2), select=SELECT, rows="samples")
    assert whole["encoder.layer.0"].shape == (8, 2, 16)


def test_sites_whose_rows_have_nothing_in_common_are_refused(folder):
    with pytest.raises(CaptureError, match=r"'pooler' cannot stand in one store with the other sites: rows lie along"):
        harvest_tokens(folder, select=[SELECT, "pooler"])
    assert not folder.exists()
    with pytest.raises(SelectionError, match="positions= and drop='bos' choose among tokens"):
        harvest_tokens(folder, select="pooler", positions=0)


def test_a_site_that_sees_nothing_is_an_error_and_not_an_empty_column(folder):
    class Skips(Counting):
        def forward(self, x):
            return self.first(x)

    with pytest.raises(CaptureError, match="'second' saw no value in this forward"):
        harvest(Skips(), [torch.ones(2, 4)], folder, select="first|second", stop_early=False)


@pytest.mark.parametrize("stop_early", [True, False])
def test_the_forward_ends_behind_the_last_site(folder, stop_early):
    model = Counting()
    harvest(model, [torch.ones(2, 4)] * 3, folder, select="first", stop_early=stop_early)
    assert model.calls == 3
    assert model.ends == (0 if stop_early else 3)


def test_the_budget_of_rows_is_exact_and_the_same_for_all_sites(folder, tmp_path):
    whole = harvest_tokens(tmp_path / "whole.acts")
    for budget in (1, 29, 30, 31, 50, len(whole), 10_000):
        dataset = harvest_tokens(tmp_path / f"{budget}.acts", max_rows=budget)
        assert len(dataset) == min(budget, len(whole))
        assert dataset.complete
        assert torch.equal(dataset["encoder.layer.1"][...], whole["encoder.layer.1"][:budget])
        dataset.verify()


def test_the_forward_that_shows_the_shapes_is_not_run_again(folder, tmp_path):
    data = [torch.randn(3, 4) for _ in range(5)]
    for options, forwards in (({}, 5), ({"max_rows": 7}, 3), ({"rank": 1, "world": 2}, 3)):
        model = Counting()
        harvest(model, data, tmp_path / f"{forwards}-{len(options)}.acts", select="first", **options)
        assert model.calls == forwards  # of the second rank: one to see the shapes, and its two units
    model = Counting()
    short = harvest(model, data, folder, select="first", max_rows=2)
    assert model.calls == 1
    assert torch.equal(short["first"][...], model.first(data[0])[:2].detach())


def test_values_that_overflow_in_the_first_forward_are_counted_once(folder, tmp_path):
    data = [torch.full((3, 4), 1e30), torch.zeros(3, 4)]
    kept = harvest(
        Counting(), data, folder, select="", pick=None, dtype=torch.float16, overflow="count", rows="samples"
    )
    assert [sum(shard.info.overflow.values()) for shard in kept.shards] == [12, 0]
    with pytest.raises(CaptureError, match=r"12 values at '' in batch 0 cannot be held by torch.float16"):
        harvest(Counting(), data, tmp_path / "b.acts", select="", dtype=torch.float16)


def test_the_budget_of_bytes_is_exact(folder):
    row = 2 * 16 * 4 + 8 + 4 + 4
    dataset = harvest_tokens(folder, max_bytes=f"{(row * 37 + row - 1) / 1000}KB")
    assert (len(dataset), dataset.nbytes) == (37, row * 37)
    with pytest.raises(ValueError, match=r"max_bytes is a number, or one with B, KB, MB, GB or TB; got '3 apples'"):
        harvest_tokens(folder, max_bytes="3 apples")


def test_a_finished_harvest_does_no_forward_without_a_recheck(folder):
    model = Counting()
    data = [torch.randn(3, 4) for _ in range(5)]
    harvest(model, data, folder, select="first")
    before, calls = contents(folder), model.calls
    harvest(model, data, folder, select="first")
    assert model.calls == calls + 1  # the first batch, for comparison
    dataset = harvest(model, data, folder, select="first", recheck=False)
    assert model.calls == calls + 1
    assert len(dataset) == 15
    assert contents(folder) == before


@pytest.mark.parametrize("fail_at", [1, 2, 7, 20])
def test_a_harvest_that_failed_is_continued_to_the_same_bytes(folder, tmp_path, fail_at):
    data = [torch.randn(3, 4) for _ in range(40)]
    harvest(Counting(), data, tmp_path / "golden.acts", select="first|second")
    with pytest.raises(RuntimeError, match="the model failed"):
        harvest(Counting(fail_at=fail_at), data, folder, select="first|second")
    model = Counting()
    harvest(model, data, folder, select="first|second")
    assert contents(folder) == contents(tmp_path / "golden.acts")
    assert model.calls <= 40 - max(0, fail_at - 4)  # units are of three batches: what was whole is not run again


def test_shares_in_any_number_and_order_give_the_bytes_of_one_process(folder, tmp_path):
    for options in ({}, {"max_rows": 77}):
        golden = tmp_path / f"golden{len(options)}.acts"
        harvest_tokens(golden, **options)
        for world in (2, 3, 5):
            shutil.rmtree(folder, ignore_errors=True)
            for rank in reversed(range(world)):
                dataset = harvest_tokens(folder, rank=rank, world=world, **options)
            assert dataset.complete
            assert contents(folder) == contents(golden)


def test_what_two_of_three_ranks_left_another_number_of_ranks_completes(folder, tmp_path):
    harvest_tokens(tmp_path / "golden.acts")
    for rank in (0, 2):
        assert not harvest_tokens(folder, rank=rank, world=3).complete
    for rank in (1, 0):
        harvest_tokens(folder, rank=rank, world=2)
    assert contents(folder) == contents(tmp_path / "golden.acts")


def test_a_failed_write_reaches_the_caller_with_unit_and_path_and_the_store_can_be_continued(folder, tmp_path):
    harvest_tokens(tmp_path / "golden.acts")
    counted = Counted()
    harvest_tokens(tmp_path / "counted.acts", files=counted)
    reserves = [at for at, name in enumerate(counted.names) if name == "reserve"]
    with pytest.raises(StoreError, match=r"unit 2 could not be written to .*u00000002.safetensors: No space left"):
        harvest_tokens(folder, files=Counted(reserves[2], disk_full))
    assert len(ActivationDataset.open(folder).shards) == 2
    harvest_tokens(folder)
    assert contents(folder) == contents(tmp_path / "golden.acts")


def test_the_error_of_the_model_is_the_one_that_is_seen_although_a_write_failed_too(folder):
    class Full(Files):
        def reserve(self, descriptor, size):
            raise OSError(28, "No space left on device")

    model = Counting(fail_at=4)
    data = [torch.ones(2, 4)] * 4
    with pytest.raises((RuntimeError, StoreError)) as failure:
        harvest(model, data, folder, select="first", files=Full())
    texts = [str(failure.value), *getattr(failure.value, "__notes__", [])]
    assert any("No space left" in text for text in texts)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_what_it_was(folder, failing):
    model = Counting(fail_at=2 if failing else None).train()
    model.second.eval()
    model.first.weight.requires_grad_(False)
    before = state_of(model)
    try:
        harvest(model, [torch.ones(2, 4)] * 5, folder, select="first|relu")
    except RuntimeError:
        assert failing
    after = state_of(model)
    for state in (before, after):
        state["modules"][""].pop("calls"), state["modules"][""].pop("ends")
    assert after == before


def test_the_fields_in_which_another_harvest_differs_are_named(folder):
    harvest_tokens(folder)
    for options, field in [
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"drop": "pad|bos"}, "drop"),
        ({"positions": -1}, "positions"),
        ({"select": r"encoder\.layer\.1"}, "sites.encoder.layer.0"),
        ({"direction": "fwd_pre"}, "direction"),
        ({"data": Tokens(40)}, "data.batches"),
        ({"data": Tokens(21, 9)}, "data.first_batch"),
        ({"shard_bytes": 1 << 20}, "shard_bytes"),
        ({"rows": "samples"}, "rows"),
    ]:
        with pytest.raises(SpecError, match=rf"(?s)was made otherwise than is asked for now:.*  {field}") as failure:
            harvest_tokens(folder, **options)
        assert field in failure.value.fields
    other = encoder()
    nn.init.zeros_(other.embeddings.word_embeddings.weight)
    with pytest.raises(SpecError, match=r"model\.fingerprint"):
        harvest_tokens(folder, model=other)
    with pytest.raises(SpecError, match="holds a store already, and resume=False"):
        harvest_tokens(folder, resume=False)


def test_data_of_every_kind_gives_the_same_rows(folder, tmp_path):
    x = torch.randn(11, 4)
    data = {
        "loader": DataLoader(TensorDataset(x), batch_size=4),
        "dataset": TensorDataset(x),
        "list": [x[:4], x[4:8], x[8:]],
        "uneven": [x[:1], x[1:8], x[8:]],
        "generator": (part for part in x.split(4)),
        "workers": DataLoader(TensorDataset(x), batch_size=4, num_workers=1),
        "dropped": DataLoader(TensorDataset(torch.cat([x, x[:1]])), batch_size=11, drop_last=True),
        "mappings": [{"x": part} for part in x.split(4)],
        "other names": [{"input_ids": part} for part in x.split(4)],
    }
    for name, each in data.items():
        dataset = harvest(Counting(), each, tmp_path / f"{name}.acts", select="first", batch_size=4)
        assert torch.equal(dataset["seq"][...], torch.arange(11)), name
        assert torch.allclose(dataset["first"][...], Counting().first(x).detach(), rtol=0, atol=1e-6), name


def test_data_without_an_order_is_refused(folder):
    data = TensorDataset(torch.ones(8, 4))
    with pytest.raises(StoreError, match=r"draws its samples with RandomSampler.*give it shuffle=False"):
        harvest(Counting(), DataLoader(data, shuffle=True), folder, select="first")
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(
        StoreError, match=r"the loader has a DistributedSampler.*harvest deals units to the ranks itself"
    ):
        harvest(Counting(), DataLoader(data, sampler=sampler), folder, select="first")
    with pytest.raises(SelectionError, match="the data holds no batch"):
        harvest(Counting(), [], folder, select="first")


def test_options_that_mean_nothing_are_refused(folder):
    for options, text in [
        ({"drop": "eos"}, "drop knows 'pad' and 'bos', got 'eos'"),
        ({"positions": slice(None, None, -1)}, "positions is a number, several, or a slice with a positive step"),
        ({"positions": "last"}, "positions is a number, several"),
        ({"select": "encoder.layer.9"}, "matches none of"),
    ]:
        with pytest.raises(SelectionError, match=text):
            harvest_tokens(folder, **options)
    with pytest.raises(ValueError, match="a share needs 0 <= rank < world, got rank=2, world=2"):
        harvest_tokens(folder, rank=2, world=2)
    with pytest.raises(SelectionError, match="no site can be called 'seq': a row's own column has that name"):
        harvest(Named(), [torch.ones(2, 4)], folder, select="seq")
    assert not folder.exists()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.seq = nn.Linear(4, 4)

    def forward(self, x):
        return self.seq(x)


def test_a_model_that_is_called_in_another_way(folder):
    def forward(model, batch):
        return model(batch["features"] * 2)

    x = torch.randn(4, 4)
    dataset = harvest(Counting(), [{"features": x}], folder, select="first", forward=forward)
    assert torch.equal(dataset["first"][...], Counting().first(x * 2).detach())


def test_a_reader_reads_while_it_is_written(folder):
    seen = []

    class Reading(Files):
        def sync_folder(self, path):
            super().sync_folder(path)
            if path.name == "000":
                dataset = ActivationDataset.open(folder)
                dataset.verify()
                seen.append((len(dataset), int(dataset[-1]["seq"])))

    dataset = harvest_tokens(folder, files=Reading())
    assert len(seen) == len(dataset.shards)
    assert seen == sorted(seen)
    assert seen[-1] == (len(dataset), 20)


def test_a_preflight_says_what_will_be_stored_and_writes_nothing(folder):
    found = preflight(encoder(), Tokens(), folder, select=SELECT, batch_size=4, collate=Padded(), dtype=torch.bfloat16)
    assert not folder.exists()
    assert found.row_bytes == 2 * 16 * 2 + 16
    assert (found.batches, found.units) == (6, 6)
    text = str(found)
    assert "2 sites, one row per token" in text
    assert "encoder.layer.0   bfloat16        (16,)       32 B/row" in text
    assert f"rows of {found.row_bytes} bytes" in text
    assert "about 6 batches at" in text
    unknown = preflight(encoder(), iter(batches_of(Tokens(), 4, Padded())), folder, select=SELECT)
    assert (unknown.rows, unknown.nbytes) == (None, None)
    assert "an unknown number of rows" in str(unknown)


def test_progress_is_printed_to_the_error_stream_alone(folder, capsys):
    harvest_tokens(folder, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "harvest to" in captured.err
    assert "row" in captured.err.rpartition("process")[2]
    harvest_tokens(folder)
    assert capsys.readouterr().err == ""
