"""The shard file: a valid safetensors file, byte for byte determined by what is in it."""

import json
import struct
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_ids import stable_id
from store.faulty_files import unit_columns, write_units
from tdcache.errors import DamagedError, StoreError
from tdcache.store import ActivationDataset, StoreWriter, site_column
from tdcache.store.safetensors import read_tensors, write_tensors
from tdcache.store.shard import BLOCK
from tdcache.store.shard_header import IndexRow

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def joined(columns):
    return {name: torch.cat(parts) for name, parts in columns.items()}


def test_the_safetensors_package_reads_what_was_written(tmp_path):
    write_units(tmp_path / "a.acts")
    found = load_file(tmp_path / "a.acts" / "shards" / "000" / "u00000001.safetensors")
    expected = joined(unit_columns(1))
    statistics = {"stat/layers.0", "stat/layers.1"}
    assert found.keys() == expected.keys() | statistics
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_data_begins_at_a_page_and_every_column_at_a_multiple_of_its_item_size(tmp_path):
    write_units(tmp_path / "a.acts")
    raw = (tmp_path / "a.acts" / "shards" / "000" / "u00000000.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 4096 == 0
    sizes = {"F64": 8, "I64": 8, "I32": 4, "F32": 4, "BF16": 2}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)


def test_the_same_rows_in_other_pieces_give_the_same_bytes(tmp_path):
    write_units(tmp_path / "pieces.acts", [0], last=0)
    writer = write_units(tmp_path / "whole.acts", [], last=0)
    columns = {name: [tensor] for name, tensor in joined(unit_columns(0)).items()}
    writer.write(0, columns, samples=(0, 4), end=True)
    name = "shards/000/u00000000.safetensors"
    assert (tmp_path / "pieces.acts" / name).read_bytes() == (tmp_path / "whole.acts" / name).read_bytes()


def test_there_is_one_checksum_for_each_mebibyte_of_each_column(tmp_path):
    spec = {"sites": {"a": {"dtype": "float32", "shape": [1024]}}}
    writer = StoreWriter(tmp_path / "a.acts", spec)
    rows = torch.randn(600, 1024)  # 2.34 MiB
    columns = {"seq": [torch.arange(600)], "pos": [torch.zeros(600).int()], site_column("a"): [rows[:100], rows[100:]]}
    writer.write(0, columns, samples=(0, 600), end=True)
    shard = ActivationDataset.open(tmp_path / "a.acts").shards[0]
    assert rows.nbytes > 2 * BLOCK
    assert len(shard.info.sums["act/a"]) == 3 * 8
    shard.verify()


def test_pieces_that_do_not_fit_together_are_refused_and_leave_nothing(tmp_path):
    writer = write_units(tmp_path / "a.acts", [])
    columns = unit_columns(0)
    columns[site_column("layers.0")][1] = columns[site_column("layers.0")][1].float()
    with pytest.raises(
        StoreError, match=r"'act/layers.0' changes from rows of \(8,\), torch.bfloat16 to \(8,\), torch.f"
    ):
        writer.write(0, columns, samples=(0, 4))
    columns = unit_columns(0)
    columns["pos"][0] = columns["pos"][0][1:]
    with pytest.raises(StoreError, match="'pos' has 23 rows where the shard has 24"):
        writer.write(0, columns, samples=(0, 4))
    with pytest.raises(StoreError, match="unit 0 has columns"):
        writer.write(0, {"seq": columns["seq"]}, samples=(0, 4))
    assert writer.committed() == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=stable_id)
def test_tensors_of_every_dtype_come_back_and_agree_with_the_package(tmp_path, dtype):
    values = torch.randint(0, 2, (5, 3)).to(dtype)
    tensors = {"a.b/c": values, "": values[0], "empty": values[:0], "scalar": values[0, 0]}
    write_tensors(tensors, tmp_path / "ours.safetensors", metadata={"k": "v"})
    for found in (read_tensors(tmp_path / "ours.safetensors"), load_file(tmp_path / "ours.safetensors")):
        assert found.keys() == tensors.keys()
        assert all(found[name].dtype == dtype and torch.equal(bits(found[name]), bits(tensors[name])) for name in found)
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"k": "v"}
    save_file({name: each.clone() for name, each in tensors.items()}, tmp_path / "theirs.safetensors")
    theirs = read_tensors(tmp_path / "theirs.safetensors")
    assert all(torch.equal(bits(theirs[name]), bits(tensors[name])) for name in tensors)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_a_dtype_that_the_format_does_not_know_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"tensor 'a' of torch.complex128 cannot be stored"):
        write_tensors({"a": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_of_the_other_byte_order_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(StoreError, match=r"safetensors files hold little-endian numbers, and this machine's are big-"):
        write_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0, 0, 3, 3, True, False, 100], "is no row of an index"),
        ([0, 0, 3, 3, True, 0, 100, "abc"], "is no row of an index"),
        ([0, 0, -3, 3, True, False, 100, "abc"], "holds a negative number"),
    ],
)
def test_a_row_of_an_index_has_its_kinds_of_values(values, text):
    with pytest.raises(ValueError, match=text):
        IndexRow.parsed(values)


def test_a_failed_overwrite_leaves_the_file_that_was_there(tmp_path):
    target = tmp_path / "a.safetensors"
    write_tensors({"a": torch.ones(3)}, target)
    with pytest.raises(StoreError):
        write_tensors({"a": torch.zeros(2, dtype=torch.complex128)}, target)
    assert torch.equal(read_tensors(target)["a"], torch.ones(3))


def test_reading_never_changes_a_file_not_even_through_a_column_that_is_written_to(tmp_path):
    folder = tmp_path / "a.acts"
    write_units(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    dataset = ActivationDataset.open(folder)
    dataset.shards[0].column("act/layers.0").zero_()
    dataset[0]["layers.1"].zero_()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_shard_that_was_cut_is_refused_when_it_is_opened_and_is_not_grown_again(tmp_path):
    folder = tmp_path / "a.acts"
    write_units(folder)
    path = folder / "shards" / "000" / "u00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    size = path.stat().st_size
    with pytest.raises(DamagedError, match=r"u00000001.*it was cut or grown"):
        ActivationDataset.open(folder)
    assert path.stat().st_size == size
