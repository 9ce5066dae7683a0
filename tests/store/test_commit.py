"""Whatever fails at whichever operation, a store holds complete shards only, and can be continued to the same bytes."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from store.faulty_files import SPEC, Counted, ForkServer, contents, disk_full, unit_columns, write_units
from tdcache.errors import SpecError, StoreError
from tdcache.store import ActivationDataset, StoreWriter
from tdcache.store.checksums import crc32
from tdcache.store.spec import canonical, write_spec


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden") / "a.acts"
    write_units(folder)
    return contents(folder)


def operations(tmp_path):
    files = Counted()
    write_units(tmp_path / "counted.acts", files=files)
    return files.names


def test_a_store_is_written_in_the_order_that_makes_it_durable(tmp_path):
    names = operations(tmp_path)
    first = names.index("reserve")
    assert names[first - 1 : first + 16] == [
        "create",
        "reserve",
        *["write"]
        * 10,  # seq, pos, tok, two columns in two pieces, the statistics of each: data first, the header last
        "sync",
        "link",
        "sync_folder",
        "remove",
        "close",  # which frees the lock that kept the file from being swept
    ]


def test_a_disk_that_is_full_at_any_operation_leaves_complete_shards_and_can_be_continued(tmp_path, golden):
    total = len(operations(tmp_path))
    assert total > 50
    for at in range(total):
        folder = tmp_path / f"{at}.acts"
        with pytest.raises((OSError, StoreError), match="No space left"):
            write_units(folder, files=Counted(at, disk_full))
        there = contents(folder) if folder.exists() else {}
        assert all(golden[name] == data for name, data in there.items() if name != "index.json")
        write_units(folder)
        assert contents(folder) == golden


def test_a_failed_write_names_the_unit_and_the_path(tmp_path):
    at = operations(tmp_path).index("reserve")
    with pytest.raises(
        StoreError, match=r"unit 0 could not be written to .*u00000000.safetensors: No space"
    ) as failure:
        write_units(tmp_path / "a.acts", files=Counted(at, disk_full))
    assert Path(failure.value.path).name == "u00000000.safetensors"


def test_a_process_killed_at_any_operation_leaves_complete_shards_and_can_be_continued(tmp_path, golden, forks):
    total = len(operations(tmp_path))
    for at in range(0, total, 3):
        folder = tmp_path / f"{at}.acts"
        assert forks.run(folder, at) == -signal.SIGKILL
        there = contents(folder) if folder.exists() else {}
        assert all(golden[name] == data for name, data in there.items() if name != "index.json")
        if (folder / "spec.json").exists():
            opened = ActivationDataset.open(folder)
            opened.verify()
            assert len(opened) == 24 * len(opened.shards)
        write_units(folder)
        assert contents(folder) == golden
        assert list((folder / ".tmp").iterdir()) == []  # what the dead left behind is swept


@pytest.fixture(scope="module")
def forks():
    server = ForkServer("def work(folder, at): write_units(Path(folder), files=Counted(int(at), killed))")
    yield server
    server.close()


def test_a_unit_that_is_there_is_never_written_over(tmp_path, golden):
    folder = tmp_path / "a.acts"
    writer = write_units(folder)
    other = unit_columns(7)
    other["seq"] = unit_columns(0)["seq"]
    assert writer.write(0, other, samples=(0, 4)) is False
    assert contents(folder) == golden


def test_two_writers_of_one_unit_leave_one_complete_shard(tmp_path, golden):
    folder = tmp_path / "a.acts"
    files = Counted()
    slow = StoreWriter(folder, SPEC, made_by={"torch": "any"}, files=files)
    count = files.before

    def fast_one_comes_first(name, args):
        count(name, args)
        if name == "link":
            write_units(folder, [0])

    files.before = fast_one_comes_first
    assert slow.write(0, unit_columns(0), samples=(0, 4)) is False
    name = "shards/000/u00000000.safetensors"
    assert contents(folder)[name] == golden[name]
    assert sorted(path.name for path in (folder / ".tmp").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_and_reservations_takes_a_store(tmp_path, golden, monkeypatch, code):
    def refuse(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    folder = tmp_path / "a.acts"
    writer = write_units(folder)
    assert contents(folder) == golden
    assert list((folder / ".tmp").iterdir()) == []
    assert writer.write(0, unit_columns(0), samples=(0, 4)) is False


def test_a_store_that_was_made_otherwise_is_refused_with_the_fields_that_differ(tmp_path):
    write_units(tmp_path / "a.acts")
    other = {"sites": {**SPEC["sites"], "layers.0": {"dtype": "float16", "shape": [8]}}, "drop": ["bos"]}
    with pytest.raises(SpecError, match=r"(?s)drop: nothing there, \[\"bos\"\] asked for.*layers.0.dtype") as failure:
        StoreWriter(tmp_path / "a.acts", other)
    assert failure.value.fields == ("drop", "sites.layers.0.dtype")


def test_a_spec_that_another_wrote_meanwhile_is_compared(tmp_path):
    folder = tmp_path / "a.acts"
    writer = StoreWriter(folder, SPEC)
    (folder / "spec.json").rename(folder / "moved")

    class Slow(Counted):
        def link(self, source, target):
            (folder / "moved").rename(target)
            super().link(source, target)

    assert write_spec(folder, SPEC, made_by={}, files=Slow()) == writer.spec


def test_the_index_can_be_made_again_from_the_shards(tmp_path, golden):
    folder = tmp_path / "a.acts"
    writer = write_units(folder)
    (folder / "index.json").unlink()
    assert len(ActivationDataset.open(folder)) == 72
    assert not (folder / "index.json").exists()  # a reader writes nothing
    writer.finish()
    assert contents(folder) == golden


def test_a_reader_sees_the_shards_that_come_while_it_is_open(tmp_path):
    folder = tmp_path / "a.acts"
    write_units(folder, [0])
    dataset = ActivationDataset.open(folder)
    assert (len(dataset), dataset.complete) == (24, False)
    write_units(folder, [1, 2])
    assert len(dataset) == 24
    assert (len(dataset.refresh()), dataset.complete) == (72, True)
    assert torch.equal(dataset[30]["layers.1"], torch.cat(unit_columns(1)["act/layers.1"])[6])


def test_a_stale_file_that_another_starting_writer_removes_first_is_no_error(tmp_path):
    class Late(Counted):
        def remove(self, path):
            path.unlink()  # the other writer was here
            super().remove(path)

    write_units(tmp_path / "a.acts")
    stale = tmp_path / "a.acts" / ".tmp" / "old"
    stale.touch()
    os.utime(stale, (0, 0))
    StoreWriter(tmp_path / "a.acts", SPEC, files=Late())
    assert not stale.exists()


def test_advice_that_the_system_does_not_take_is_no_reason_to_fail(tmp_path, golden, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    write_units(tmp_path / "a.acts")
    assert contents(tmp_path / "a.acts") == golden


def test_the_index_of_an_earlier_version_is_left_aside_and_made_anew(tmp_path, golden):
    folder = tmp_path / "a.acts"
    write_units(folder)
    document = json.loads((folder / "index.json").read_bytes())
    old = {"shards": [[*row[:4], row[6]] for row in document["shards"]], "spec": document["spec"]}
    old["crc32"] = f"{crc32(canonical(old)):08x}"
    (folder / "index.json").write_bytes(canonical(old) + b"\n")
    dataset = ActivationDataset.open(folder)
    dataset.verify()
    assert len(dataset[...]) == 72
    write_units(folder)
    assert contents(folder) == golden
