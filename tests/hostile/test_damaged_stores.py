"""Files that are damaged, forged or out of place are refused by name; nothing is ever read from them silently."""

import json
import os
import random
import struct
import zlib

import pytest
import torch

from store.faulty_files import SPEC, contents, unit_columns, write_units
from tdcache.cli import main
from tdcache.errors import DamagedError, SpecError, StoreError
from tdcache.harvesting import save_activations
from tdcache.store import ActivationDataset, StoreWriter, site_column
from tdcache.store.safetensors import read_tensors, write_tensors
from tdcache.store.shard_header import with_sum
from tdcache.store.verify import find_damage

SHARD = "shards/000/u00000001.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_units(tmp_path / "a.acts")
    return tmp_path / "a.acts"


def test_every_flipped_byte_of_every_file_is_found(folder):
    chooser = random.Random(0)
    for name, data in contents(folder).items():
        places = {*range(min(len(data), 40)), *range(len(data) - 8, len(data))}
        places |= set(chooser.sample(range(len(data)), 60))
        for place in sorted(places):
            raw = bytearray(data)
            raw[place] ^= 1 << chooser.randrange(8)
            (folder / name).write_bytes(raw)
            try:
                found = find_damage(folder)
            except (DamagedError, SpecError):
                found = [True]
            assert found, f"byte {place} of {name}"
        (folder / name).write_bytes(data)
    assert find_damage(folder) == []


def test_every_shorter_or_longer_file_is_found(folder):
    for name, data in contents(folder).items():
        for raw in (b"", data[:7], data[: len(data) // 2], data[:-1], data + b"\0"):
            (folder / name).write_bytes(raw)
            with pytest.raises((DamagedError, SpecError), match=name.rpartition("/")[2].partition(".")[0]):
                ActivationDataset.open(folder).verify()
        (folder / name).write_bytes(data)


def test_a_flipped_byte_names_the_shard_the_column_and_the_block(folder):
    path = folder / SHARD
    shard = ActivationDataset.open(folder).shards[1]
    raw = bytearray(path.read_bytes())
    raw[shard.header.data_start + shard.header.tensors["act/layers.1"].begin + 5] ^= 64
    path.write_bytes(raw)
    with pytest.raises(DamagedError, match=r"u00000001.safetensors: block 0 of column 'act/layers.1' has crc32"):
        ActivationDataset.open(folder).verify()


def test_all_damage_is_reported_and_not_the_first_alone(folder, capsys):
    for unit in (0, 2):
        path = folder / f"shards/000/u0000000{unit}.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    with pytest.raises(DamagedError, match=r"u00000000") as failure:
        ActivationDataset.open(folder).verify()
    assert "u00000002" in failure.value.__notes__[-1]
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().err.count("has crc32") == 2


@pytest.mark.parametrize("unit", [0, 1, 2])
def test_a_missing_shard_is_found_by_its_number(folder, unit):
    (folder / f"shards/000/u0000000{unit}.safetensors").unlink()
    (error,) = find_damage(folder)
    assert f"unit {unit} is missing" in str(error)
    dataset = ActivationDataset.open(folder)
    assert (len(dataset), dataset.complete) == (48, False)


def test_a_shard_under_another_number_is_refused(folder):
    (folder / SHARD).rename(folder / "shards/000/u00000007.safetensors")
    with pytest.raises(DamagedError, match=r"u00000007.safetensors holds unit 1, not 7"):
        ActivationDataset.open(folder)


def test_a_shard_of_another_store_is_refused(folder, tmp_path):
    other = StoreWriter(tmp_path / "b.acts", {**SPEC, "drop": ["bos"]})
    other.write(1, unit_columns(1), samples=(4, 8))
    (folder / SHARD).write_bytes((tmp_path / "b.acts" / SHARD).read_bytes())
    with pytest.raises(StoreError, match=r"belongs to spec \w+, this store has spec"):
        ActivationDataset.open(folder)[...]
    (folder / "index.json").unlink()
    with pytest.raises(StoreError, match=r"belongs to spec \w+, this store has spec"):
        ActivationDataset.open(folder)


def test_links_and_foreign_names_are_not_followed(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / SHARD).read_bytes())
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(secret)
    with pytest.raises(DamagedError, match="cannot be opened as a regular file"):
        ActivationDataset.open(folder)
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)  # opened as a file is, it would keep the reader waiting for ever
    with pytest.raises(DamagedError, match="no regular file"):
        ActivationDataset.open(folder)
    (folder / SHARD).unlink()
    for name in ("u1.safetensors", "u00000001.safetensors.bak", "notes.txt", "u00001001.safetensors"):
        (folder / "shards/000" / name).write_bytes(b"x")
    assert len(ActivationDataset.open(folder)) == 48


def test_a_folder_in_the_place_of_a_shard_is_refused(folder):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    with pytest.raises(DamagedError, match=r"no regular file|cannot be opened"):
        ActivationDataset.open(folder)


def test_no_store_at_all_is_said_so(tmp_path):
    with pytest.raises(SpecError, match=r"is no activation store: it has no spec.json; write one with tdcache.harvest"):
        ActivationDataset.open(tmp_path)


def test_an_index_that_lies_is_found_and_not_believed(folder):
    document = json.loads((folder / "index.json").read_bytes())
    document["shards"][1][1] = 1_000_000
    del document["crc32"]
    spelled = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    document["crc32"] = f"{zlib.crc32(spelled):08x}"
    (folder / "index.json").write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    dataset = ActivationDataset.open(folder)
    assert torch.equal(dataset[:24]["layers.0"], torch.cat(unit_columns(0)["act/layers.0"]))
    for read in (lambda: dataset[24], lambda: dataset[20:30], lambda: dataset[[3, 1_000_000]]):
        with pytest.raises(DamagedError, match=r"u00000001.safetensors is not the shard that was known: .* index says"):
            read()
    (error,) = find_damage(folder)
    assert "the index says" in str(error)
    (folder / "index.json").unlink()
    assert len(ActivationDataset.open(folder)) == 72


def forged(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


FORGERIES = {
    "an empty file": b"",
    "a short length": b"\x10\0\0",
    "a header longer than the file": struct.pack("<Q", 1 << 62) + b"{}",
    "a header of a gigabyte": struct.pack("<Q", 1 << 30) + b"{}" * 100,
    "no JSON": forged(b"{not json"),
    "no mapping": forged([1, 2]),
    "nesting without end": forged(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "invalid UTF-8": forged(b'{"a\xff": 1}'),
    "a name twice": forged(b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}"),
    "metadata that is no mapping": forged({"__metadata__": [1], "a": tensor()}),
    "metadata that is no string": forged({"__metadata__": {"a": 1}, "a": tensor()}),
    "no fields": forged({"a": 3}),
    "an unknown dtype": forged({"a": tensor(dtype="F33")}),
    "a dtype that is no string": forged({"a": tensor(dtype=[1])}),
    "a negative size": forged({"a": tensor(shape=(-4,))}),
    "a size that is a fraction": forged({"a": tensor(shape=(4.0,))}),
    "a size that is true": forged({"a": tensor(shape=(True, 4))}),
    "sizes whose product overflows": forged({"a": tensor(shape=(1 << 62, 1 << 62))}),
    "offsets the wrong way round": forged({"a": tensor(16, 0)}),
    "offsets behind the end": forged({"a": tensor(0, 1 << 20, (1 << 18,))}),
    "three offsets": forged({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}),
    "offsets that overlap": forged({"a": tensor(0, 16), "b": tensor(8, 16, (2,))}),
    "a hole": forged({"a": tensor(0, 4, (1,)), "b": tensor(8, 16, (2,))}),
    "bytes left over": forged({"a": tensor(0, 8, (2,))}),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_forged_safetensors_file_is_refused(folder, tmp_path, what):
    path = tmp_path / "forged.safetensors"
    path.write_bytes(FORGERIES[what])
    with pytest.raises(DamagedError, match=r"forged.safetensors"):
        read_tensors(path)
    (folder / SHARD).write_bytes(FORGERIES[what])
    with pytest.raises(DamagedError, match=r"u00000001.safetensors"):
        ActivationDataset.open(folder)


def test_a_sound_safetensors_file_that_is_no_shard_is_refused(folder):
    write_tensors({"a": torch.ones(3)}, folder / SHARD)
    with pytest.raises(DamagedError, match="is a safetensors file, but no shard of a store"):
        ActivationDataset.open(folder)


def test_a_header_that_was_changed_is_refused_by_its_checksum(folder):
    raw = bytearray((folder / SHARD).read_bytes())
    at = raw.index(b'"samples') if b'"samples' in raw else raw.index(b"unit")
    raw[at + 1 : at + 3] = b"xy"
    (folder / SHARD).write_bytes(raw)
    (folder / "index.json").unlink()
    with pytest.raises(DamagedError, match=r"u00000001.safetensors: the header has crc32 \w{8}, not \w{8}: it was cha"):
        ActivationDataset.open(folder)


def forge_header(path, change):
    """Change what a shard says of itself, with a checksum that fits: what a liar would write."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    described = json.loads(raw[8 : 8 + length])
    info = json.loads(described["__metadata__"]["tdcache"])
    change(info, described)
    described["__metadata__"]["tdcache"] = json.dumps(info, separators=(",", ":"), sort_keys=True)
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (length - len(text))
    zeroed = with_sum(raw[:8] + text, "00000000")
    path.write_bytes(with_sum(zeroed, f"{zlib.crc32(zeroed):08x}") + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda info, described: info.update(rows=23),
        lambda info, described: info.update(rows=-1),
        lambda info, described: info.update(unit="1"),
        lambda info, described: info.update(last=0),
        lambda info, described: info.update(sums={}),
        lambda info, described: info.update(surprise=1),
        lambda info, described: info["sums"].update({"act/layers.0": ""}),
        lambda info, described: described.update({"act/layers.9": described.pop("act/layers.0")}),
        lambda info, described: described["act/layers.1"].update(dtype="I32"),
    ],
)
def test_a_shard_that_lies_about_itself_is_refused(folder, change):
    forge_header(folder / SHARD, change)
    with pytest.raises(DamagedError, match=r"u00000001.safetensors"):
        ActivationDataset.open(folder)[...]
    assert find_damage(folder)
    (folder / "index.json").unlink()
    with pytest.raises(DamagedError, match=r"u00000001.safetensors"):
        ActivationDataset.open(folder)


NAMES = ["../../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b", "nul\0byte", "~root"]


@pytest.mark.parametrize("name", NAMES)
def test_a_site_named_like_a_path_is_a_name_inside_files_and_cannot_lead_out_of_a_folder(tmp_path, name):
    spec = {"sites": {name: SPEC["sites"]["layers.0"]}}
    columns = unit_columns(0)
    del columns[site_column("layers.1")]
    columns[site_column(name)] = columns.pop(site_column("layers.0"))
    writer = StoreWriter(tmp_path / "in" / "a.acts", spec)
    writer.write(0, columns, samples=(0, 4), end=True)
    writer.finish()
    dataset = ActivationDataset.open(tmp_path / "in" / "a.acts")
    dataset.verify()
    assert dataset[name].shape == (24, 8)
    for kind in ("npz", "memmap", "pt"):
        with pytest.raises(StoreError, match="cannot be the name of a file"):
            dataset.export(tmp_path / "in" / "exported", kind)
    with pytest.raises(StoreError, match="cannot be the name of a file"):
        save_activations({name: torch.ones(2)}, tmp_path / "in" / "a.memmap")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert {path.name for path in (tmp_path / "in").iterdir()} == {"a.acts"}


def test_no_file_of_a_store_is_a_pickle(folder):
    assert all(data[:1] == b"{" or data[8:9] == b"{" for data in contents(folder).values())
