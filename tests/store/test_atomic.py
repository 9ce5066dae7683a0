"""What was under a name survives every failure, and what a dead writer left is swept while a living one's is not."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from tdcache.errors import StoreError
from tdcache.harvesting import load_activations, save_activations
from tdcache.store import StoreWriter
from tdcache.store import atomic as atomic_module
from tdcache.store.atomic import draft_file, new_folder, replacing_file, sweep, write_bytes
from tdcache.store.files import Files

SUFFIXES = [".npz", ".safetensors", ".pt", ".memmap"]
OLD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
NEW = {"a": torch.zeros(50), "c": torch.ones(2)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("operation", ["pwrite", "fsync", "open", "rename", "posix_fallocate"])
def test_a_failed_save_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, suffix, operation):
    target = save_activations(OLD, tmp_path / f"a{suffix}")

    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if operation == "rename":
            patched.setattr(atomic_module, "_exchange", refuse)
            patched.setattr(Files, "replace", refuse)
        elif operation == "pwrite":
            patched.setattr(Files, "write", refuse)
            patched.setattr(torch, "save", refuse)
            patched.setattr("zipfile.ZipFile.open", refuse)
        else:
            patched.setattr(os, operation, refuse)
        if operation == "posix_fallocate" and suffix in (".npz", ".pt"):
            return  # written as streams
        with pytest.raises(StoreError, match=rf"a{suffix} could not be written: No space left .*; what was there"):
            save_activations(NEW, target)
    assert same(load_activations(target), OLD)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_save_replaces_all_of_what_was_there(tmp_path, suffix):
    target = save_activations(OLD, tmp_path / f"a{suffix}")
    before = load_activations(target)
    assert same(load_activations(save_activations(NEW, target)), NEW)
    assert same(before, OLD)  # what was loaded from the old file stays what it was
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic_module, "_exchange_at_once", lambda new, old: False)
    target = save_activations(OLD, tmp_path / "a.memmap")
    assert same(load_activations(save_activations(NEW, target)), NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["a.memmap"]

    rename, refused = type(target).rename, []

    def refuse(path, new):
        if new == target and not refused:
            refused.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, new)

    monkeypatch.setattr(type(target), "rename", refuse)
    with pytest.raises(StoreError, match=r"a.memmap could not be written: Input/output error"):
        save_activations(OLD, target)
    assert len(refused) == 1
    assert same(load_activations(target), NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["a.memmap"]


def test_a_saved_folder_is_a_memory_mapped_tensordict_and_loads_as_private_maps(tmp_path):
    target = save_activations(OLD, tmp_path / "a.memmap")
    assert same(dict(TensorDict.load_memmap(str(target)).items()), OLD)
    loaded = load_activations(target)
    loaded["a"].zero_()
    assert same(load_activations(target), OLD)


def test_names_with_dots_colons_and_percents_are_names_of_files(tmp_path):
    acts = {name: torch.ones(2) for name in ("layers.0", "block:1", "50%", "x y", "%41")}
    target = save_activations(acts, tmp_path / "a.memmap")
    assert same(load_activations(target), acts)
    assert same(dict(TensorDict.load_memmap(str(target)).items()), acts)


def test_the_folder_of_another_version_of_tensordict_is_read(tmp_path):
    TensorDict({"x y%": torch.ones(3), "e": torch.empty(0, 2)}, batch_size=[]).memmap(str(tmp_path / "a.memmap"))
    assert same(load_activations(tmp_path / "a.memmap"), {"x y%": torch.ones(3), "e": torch.empty(0, 2)})


LOCKS_AND_WAITS = """
import sys, time
from pathlib import Path
from tdcache.store.atomic import draft_file
from tdcache.store.files import Files
with draft_file(Path(sys.argv[1]), sys.argv[2], Files()) as (descriptor, path):
    print(path, flush=True)
    time.sleep(60)
"""


def other_writer(folder, stem):
    command = [sys.executable, "-c", LOCKS_AND_WAITS, str(folder), stem]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_the_file_of_a_living_writer_stays_and_that_of_a_killed_one_is_swept(tmp_path):
    process, path = other_writer(tmp_path, "u00000000")
    try:
        sweep(tmp_path, Files())
        assert Path(path).exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert Path(path).exists()
    sweep(tmp_path, Files())
    assert not Path(path).exists()


def test_what_a_killed_save_left_beside_its_target_goes_with_the_next_save_and_nothing_else_does(tmp_path):
    process, path = other_writer(tmp_path, ".a.npz")
    process.kill()
    process.wait()
    process.stdout.close()
    bystanders = [
        tmp_path / name for name in (".a.npz.swp", ".b.npz.0123456789abcdef.tmp", "a.npz.0123456789abcdef.tmp")
    ]
    for each in bystanders:
        each.write_text("mine")
    save_activations(OLD, tmp_path / "a.npz")
    assert not Path(path).exists()
    assert {each.name for each in tmp_path.iterdir()} == {"a.npz", *(each.name for each in bystanders)}


def test_a_draft_that_a_sweep_took_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    class Swept(Files):
        taken = 0

        def create(self, path):
            descriptor = super().create(path)
            if self.taken < 2:
                self.taken += 1
                path.unlink()
            return descriptor

    files = Swept()
    with draft_file(tmp_path, "a", files) as (_, path):
        assert path.exists()
    assert files.taken == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_without_locks_a_file_is_swept_by_its_age(tmp_path, monkeypatch):
    import fcntl

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    old, young = tmp_path / "old", tmp_path / "young"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    sweep(tmp_path, Files())
    assert [path.name for path in tmp_path.iterdir()] == ["young"]
    write_bytes(tmp_path / "b", b"x")
    assert (tmp_path / "b").read_bytes() == b"x"


def test_a_folder_that_fails_leaves_nothing_and_one_that_is_there_is_refused(tmp_path):
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "a") as folder:
        (folder / str(1 // 0)).touch()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(StoreError, match="a is there already; export to another path"), new_folder(tmp_path / "a"):
        pass
    with pytest.raises(ZeroDivisionError), replacing_file(tmp_path / "b"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_scratch_folder_that_is_a_link_is_refused_and_what_it_leads_to_stays(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("all of it")
    folder = tmp_path / "a.acts"
    StoreWriter(folder, {"sites": {}})
    (folder / ".tmp").rmdir()
    (folder / ".tmp").symlink_to(precious)
    with pytest.raises(StoreError, match=r"\.tmp is no folder of the store's own; put a folder in its place"):
        StoreWriter(folder, {"sites": {}})
    assert (precious / "thesis.tex").read_text() == "all of it"
