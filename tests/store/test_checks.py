"""Damage is found when it is read, and is never copied into a store whose checksums fit."""

import os
import pickle

import pytest
import torch

from store.faulty_files import contents, unit_columns, write_units
from tdcache.errors import DamagedError
from tdcache.store import ActivationDataset, StoreWriter, site_column
from tdcache.store.checksums import BLOCK, BlockSums, crc32
from tdcache.store.shuffle import _Bin


@pytest.fixture
def folder(tmp_path):
    write_units(tmp_path / "a.acts")
    return tmp_path / "a.acts"


def flip(folder, unit, column, place=5):
    shard = ActivationDataset.open(folder).shards[unit]
    at = shard.header.data_start + shard.header.tensors[column].begin + place
    raw = bytearray(shard.path.read_bytes())
    raw[at] ^= 64
    shard.path.write_bytes(raw)


READS = {
    "a row": lambda ds: ds[30],
    "rows": lambda ds: ds[list(range(24, 48)) * 2],
    "a slice": lambda ds: ds[20:60],
    "a column": lambda ds: ds["layers.0"][25],
    "a map": lambda ds: ds.shards[1].column("act/layers.0"),
    "batches": lambda ds: list(ds.batches(7, shuffle="block", block=5)),
    "rows mixed": lambda ds: list(ds.batches(7, shuffle="rows")),
    "another process": lambda ds: pickle.loads(pickle.dumps(ds))[30],
}


@pytest.mark.parametrize("read", READS)
def test_a_flipped_bit_is_found_by_whatever_reads_it_first(folder, read):
    flip(folder, 1, "act/layers.0")
    READS[read](ActivationDataset.open(folder))  # without check nobody looks
    with pytest.raises(DamagedError, match=r"u00000001.safetensors: block 0 of column 'act/layers.0' has crc32"):
        READS[read](ActivationDataset.open(folder, check=True))


def test_what_is_not_read_is_not_checked_and_what_was_checked_is_not_checked_again(folder, monkeypatch):
    flip(folder, 1, "act/layers.0")
    dataset = ActivationDataset.open(folder, check=True)
    assert torch.equal(dataset[:24]["layers.0"], torch.cat(unit_columns(0)["act/layers.0"]))
    assert dataset.select("layers.1")[30]["layers.1"].shape == (2, 3)
    checked = []
    monkeypatch.setattr("tdcache.store.shard_file.crc32", lambda data: checked.append(len(data)) or crc32(data))
    dataset[:20]
    dataset[[1, 2, 3]]
    assert checked == []
    dataset[70]
    assert len(checked) == 5  # one small block per column


def test_blocks_are_checked_one_by_one(tmp_path):
    rows = torch.arange(700 * 1024).reshape(700, 1024).int()  # 2.7 MiB: three blocks
    with StoreWriter(tmp_path / "a.acts", {"sites": {"a": {"dtype": "int32", "shape": [1024]}}}) as writer:
        columns = {"seq": [torch.arange(700)], "pos": [torch.zeros(700).int()], site_column("a"): [rows]}
        writer.write(0, columns, samples=(0, 700), end=True)
    flip(tmp_path / "a.acts", 0, "act/a", BLOCK + 7)  # in row 256
    dataset = ActivationDataset.open(tmp_path / "a.acts", check=True)
    assert torch.equal(dataset[0:256]["a"], rows[:256])
    assert torch.equal(dataset[[0, 255, 512, 699]]["a"], rows[[0, 255, 512, 699]])
    for read in (lambda: dataset[255:257], lambda: dataset[300], lambda: dataset[[0, 511]], lambda: dataset[100:600]):
        with pytest.raises(DamagedError, match="block 1 of column 'act/a'"):
            read()


COPIES = {
    "repack": lambda ds, path: ds.repack(path),
    "shuffle": lambda ds, path: ds.repack(path, shuffle=True, shard_bytes=1000),
    "merge": lambda ds, path: ds.merge(ds, path=path),
    "npz": lambda ds, path: ds.export(path, "npz"),
    "pt": lambda ds, path: ds.export(path, "pt"),
    "memmap": lambda ds, path: ds.export(path, "memmap"),
}


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("column", ["act/layers.1", "tok"])
def test_no_copy_takes_over_a_flipped_bit(folder, tmp_path, copy, column):
    dataset = ActivationDataset.open(folder)
    dataset[...]  # also of a dataset that read it before
    flip(folder, 1, column)
    with pytest.raises(DamagedError, match=rf"u00000001.safetensors: block 0 of column '{column}' has crc32"):
        COPIES[copy](dataset, tmp_path / "copy")
    if (tmp_path / "copy").exists():
        assert not ActivationDataset.open(tmp_path / "copy").complete
    assert {path.name for path in tmp_path.iterdir()} <= {"a.acts", "copy"}


@pytest.mark.parametrize("copy", ["repack", "shuffle", "merge"])
def test_a_copy_that_met_damage_continues_when_it_is_mended(folder, tmp_path, copy):
    dataset = ActivationDataset.open(folder)
    whole = COPIES[copy](dataset, tmp_path / "whole")
    flip(folder, 1, "act/layers.1")
    with pytest.raises(DamagedError):
        COPIES[copy](dataset, tmp_path / "copy")
    flip(folder, 1, "act/layers.1")
    COPIES[copy](dataset, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(whole.path)


def test_bins_that_change_under_a_shuffle_are_damage(folder, tmp_path, monkeypatch):
    append = _Bin.append

    def damaged(each, records, files):
        append(each, records, files)
        os.pwrite(each.descriptor, b"\xa5" * 8, 0)

    monkeypatch.setattr(_Bin, "append", damaged)
    with pytest.raises(DamagedError, match=r"\d+.rows was changed while its rows were mixed; run it again"):
        ActivationDataset.open(folder).repack(tmp_path / "c.acts", shuffle=True, shard_bytes=1000)


def test_the_sums_of_blocks_do_not_depend_on_the_pieces():
    data = memoryview(torch.randint(0, 256, (BLOCK + 100,), dtype=torch.uint8).numpy())
    whole, pieces = BlockSums(), BlockSums()
    whole.update(data)
    for at in range(0, len(data), 70_001):
        pieces.update(data[at : at + 70_001])
    assert whole.digits() == pieces.digits() == f"{crc32(data[:BLOCK]):08x}{crc32(data[BLOCK:]):08x}"
    assert repr(BlockSums()) == "BlockSums(0 blocks)"
