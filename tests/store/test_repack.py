"""Stores made from stores keep what the samples are: their order, their number, and the end of the data."""

import pytest
import torch
from tensordict import TensorDict

from store.faulty_files import SPEC, unit_columns
from tdcache.errors import StoreError
from tdcache.store import ActivationDataset, StoreWriter


def opened(folder, *, samples=12, rows=24, spec=SPEC):
    """Two units of eight samples with rows, and the rest without."""
    with StoreWriter(folder, spec) as writer:
        for unit in range(2):
            columns = unit_columns(unit) if rows else {k: [v[0][:0]] for k, v in unit_columns(unit).items()}
            last = unit == 1
            writer.write(unit, columns, samples=(4 * unit, samples if last else 4), end=last)
    return ActivationDataset.open(folder)


def test_a_store_merged_with_itself_ends_with_its_last_shard_alone(tmp_path):
    dataset = opened(tmp_path / "a.acts")
    both = ActivationDataset.merge(dataset, dataset, path=tmp_path / "b.acts")
    assert [shard.info.end for shard in both.shards] == [False, False, False, True]
    assert (both.complete, both.sequences, len(both)) == (True, 24, 96)


def test_a_sequence_of_a_shuffled_store_is_in_the_order_of_its_positions(tmp_path):
    dataset = opened(tmp_path / "a.acts")
    mixed = dataset.repack(tmp_path / "b.acts", shuffle=True, seed=1, shard_bytes=1000)
    assert len(mixed.shards) > 2
    for number in range(8):
        for key in dataset.columns:
            assert torch.equal(mixed.sequence(number)[key], dataset.sequence(number)[key])


@pytest.mark.parametrize("shuffle", [False, True])
def test_samples_at_the_end_that_were_wholly_dropped_are_counted(tmp_path, shuffle):
    dataset = opened(tmp_path / "a.acts", samples=12)
    made = dataset.repack(tmp_path / "b.acts", shuffle=shuffle, shard_bytes=1000)
    assert made.sequences == dataset.sequences == 12
    assert len(made.sequence(11)) == 0
    both = made.merge(dataset)
    assert torch.equal(both.sequence(12)["layers.1"], dataset.sequence(0)["layers.1"])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_store_without_rows_becomes_a_complete_store_without_rows(tmp_path, shuffle):
    made = opened(tmp_path / "a.acts", rows=0).repack(tmp_path / "b.acts", shuffle=shuffle, dtype=torch.float16)
    made.verify()
    assert (made.complete, len(made), made.sequences, made.row_keys) == (True, 0, 12, ("seq", "pos", "tok"))
    assert made["layers.1"][...].shape == (0, 2, 3)


def test_a_store_without_rows_is_exported_with_its_columns(tmp_path):
    dataset = opened(tmp_path / "a.acts", rows=0)
    assert torch.load(dataset.export(tmp_path / "a.pt"), weights_only=True)["layers.1"].shape == (0, 2, 3)
    assert TensorDict.load_memmap(dataset.export(tmp_path / "m", "memmap"))["layers.0"].dtype == torch.bfloat16
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_from_disk(str(dataset.export(tmp_path / "h", "hf")))
    assert sorted(loaded.column_names) == sorted(dataset.columns)
    assert len(loaded) == 0


def test_a_repacked_store_says_its_new_dtype(tmp_path):
    dataset = opened(tmp_path / "a.acts", spec={**SPEC, "dtype": "bfloat16"})
    assert dataset.repack(tmp_path / "b.acts", dtype=torch.float16).spec["dtype"] == "float16"
    assert dataset.repack(tmp_path / "c.acts").spec["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["shape", "device", "_type"])
def test_a_site_with_a_name_of_the_memory_mapped_format_is_refused_there(tmp_path, name):
    columns = unit_columns(0)
    columns[f"act/{name}"] = columns.pop("act/layers.0")
    del columns["act/layers.1"]
    dataset = opened_with(tmp_path / "a.acts", {name: SPEC["sites"]["layers.0"]}, columns)
    with pytest.raises(StoreError, match=f"'{name}' is a name that a memory-mapped TensorDict keeps for itself"):
        dataset.export(tmp_path / "m", "memmap")


def opened_with(folder, sites, columns):
    with StoreWriter(folder, {"sites": sites}) as writer:
        writer.write(0, columns, samples=(0, 4), end=True)
    return ActivationDataset.open(folder)
