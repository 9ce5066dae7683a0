"""Copies of stores that fail or are killed at any operation can be run again, and leave nothing but what they made."""

import errno
import io
import os
import signal

import pytest
import torch
from tensordict import TensorDict

from store.faulty_files import Counted, ForkServer, contents, disk_full, write_units
from tdcache import harvest
from tdcache.errors import StoreError
from tdcache.store import ActivationDataset
from tdcache.store.files import Files, save_by_torch

COPIES = {
    "repack": lambda ds, path: ds.repack(path, shard_bytes=1000),
    "shuffle": lambda ds, path: ds.repack(path, shuffle=True, seed=1, shard_bytes=1000),
    "merge": lambda ds, path: ds.merge(ds, path=path),
    "memmap": lambda ds, path: ds.export(path, "memmap"),
    "npz": lambda ds, path: ds.export(path, "npz"),
    "pt": lambda ds, path: ds.export(path, "pt"),
}


def run(copy, folder, target, at, then):
    """A copy during which every ``Files`` that is made counts into one, and does something at one operation."""
    one = Counted(int(at), then)
    methods = {name: getattr(Files, name) for name in OPERATIONS_OF_FILES}
    for name in methods:
        setattr(Files, name, counted(name, methods[name], one))
    try:
        COPIES[copy](ActivationDataset.open(folder), target)
    finally:
        for name, method in methods.items():
            setattr(Files, name, method)
    return one


OPERATIONS_OF_FILES = ("make_folder", "create", "reserve", "write", "sync", "link", "replace", "remove", "sync_folder")


def counted(name, method, one):
    def wrapped(files, *args):
        one.before(name, args)
        return method(files, *args)

    return wrapped


@pytest.fixture(scope="module")
def forks():
    server = ForkServer(
        "from store.test_interrupted import run\n"
        "def work(copy, folder, target, at): run(copy, Path(folder), Path(target), at, killed_at_once)\n"
        "def killed_at_once(files, name, args): os.kill(os.getpid(), signal.SIGKILL)"
    )
    yield server
    server.close()


@pytest.fixture
def folder(tmp_path):
    write_units(tmp_path / "a.acts")
    return tmp_path / "a.acts"


def files_of(target):
    return contents(target) if target.is_dir() else target.read_bytes()


def everything(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_that_was_killed_at_any_operation_is_run_again_and_leaves_nothing_else(folder, tmp_path, forks, copy):
    golden = tmp_path / "golden" / "b"
    golden.parent.mkdir()
    total = run(copy, folder, golden, -1, None).count
    assert total >= (5 if copy in ("npz", "pt") else 15)
    expected = files_of(golden)
    for at in range(0, total, 1 + total // 12):
        place = tmp_path / f"{at}"
        place.mkdir()
        assert forks.run(copy, folder, place / "b", at) == -signal.SIGKILL
        if not is_export_done(place, copy):
            COPIES[copy](ActivationDataset.open(folder), place / "b")
        assert files_of(place / "b") == expected
        assert everything(place) == everything(golden.parent)


def is_export_done(place, copy):
    """An export that was killed after its renaming is whole, and a second one is refused as before."""
    return copy in ("memmap", "npz", "pt") and (place / "b").exists()


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_for_which_the_disk_is_full_says_so_and_leaves_nothing_hidden(folder, tmp_path, copy):
    golden = tmp_path / "golden" / "b"
    golden.parent.mkdir()
    total = run(copy, folder, golden, -1, None).count
    for at in range(0, total, 1 + total // 12):
        place = tmp_path / f"{at}"
        place.mkdir()
        with pytest.raises(StoreError, match="No space left on device"):
            run(copy, folder, place / "b", at, disk_full)
        assert not [name for name in everything(place) if name.startswith(".")]
        if not is_export_done(place, copy):
            COPIES[copy](ActivationDataset.open(folder), place / "b")
        assert files_of(place / "b") == files_of(golden)


@pytest.mark.parametrize("copy", ["repack", "shuffle", "merge"])
def test_a_finished_copy_is_not_made_again(folder, tmp_path, copy):
    COPIES[copy](ActivationDataset.open(folder), tmp_path / "b.acts")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b.acts").rglob("*.*")}
    again = COPIES[copy](ActivationDataset.open(folder), tmp_path / "b.acts")
    assert again.complete
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "b.acts").rglob("*.*")} == before


@pytest.mark.parametrize("copy", ["repack", "merge"])
def test_a_finished_copy_is_found_on_a_disk_that_is_read_only(folder, tmp_path, monkeypatch, copy):
    COPIES[copy](ActivationDataset.open(folder), tmp_path / "b.acts")
    (tmp_path / "b.acts" / ".tmp").rmdir()  # as in a copy of the folder
    write_protect(monkeypatch)
    assert COPIES[copy](ActivationDataset.open(folder), tmp_path / "b.acts").complete


def write_protect(monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("create", "reserve", "write", "link", "replace", "remove", "sync_folder"):
        monkeypatch.setattr(Files, name, refuse)


def test_a_finished_store_on_a_disk_that_is_read_only_opens_and_is_finished_again_for_free(folder, monkeypatch):
    before = contents(folder)
    (folder / ".tmp" / "left").touch()  # by a writer that died
    write_protect(monkeypatch)
    writer = write_units(folder)
    assert sorted(writer.committed()) == [0, 1, 2]
    assert len(ActivationDataset.open(folder)[...]) == 72
    assert contents(folder) == before


def test_errors_of_the_disk_name_what_could_not_be_written(folder, monkeypatch):
    (folder / "index.json").unlink()
    write_protect(monkeypatch)
    with pytest.raises(StoreError, match=r"index.json could not be written: Read-only file system; what was there"):
        write_units(folder)
    with pytest.raises(StoreError, match=r"b.acts could not be written: Read-only file system"):
        write_units(folder.with_name("b.acts"))


def test_names_that_cannot_be_written_to_are_named(folder, tmp_path):
    store = ActivationDataset.open(folder)
    (tmp_path / "file").touch()
    taken, too_long = "file is there already; write to another folder", "could not be written: File name too long"
    for call in (lambda path: store.repack(path), lambda path: store.merge(store, path=path)):
        with pytest.raises(StoreError, match=taken):
            call(tmp_path / "file")
        with pytest.raises(StoreError, match="could not be written: File exists"):
            call(tmp_path / "file" / "b.acts")
        with pytest.raises(StoreError, match=too_long):
            call(tmp_path / ("x" * 300))
    with pytest.raises(StoreError, match=too_long):
        harvest(torch.nn.Linear(2, 2), torch.ones(3, 2), tmp_path / ("x" * 300), select="")


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_torch_save_shows_why_the_disk_did_not_take_it(fails_at):
    class Full(io.BytesIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes > fails_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left on device"):
        save_by_torch({"a": torch.ones(3)}, Full())


def test_a_model_that_changes_the_working_directory_does_not_move_the_store(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model.register_forward_pre_hook(lambda *_: os.chdir(tmp_path / "elsewhere"))
    store = harvest(model, torch.ones(30, 2), "m.acts", select="0", batch_size=2, shard_bytes=1)
    assert (store.path, len(store), store.complete) == (tmp_path / "m.acts", 30, True)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_memory_mapped_export_reserves_its_space_before_it_writes(folder, tmp_path):
    names = run("memmap", folder, tmp_path / "m", -1, None).names
    writes = [at for at, name in enumerate(names) if name == "write"]
    assert [names[at - 1] for at in writes] == ["reserve"] * 5  # one part in each of five columns
    assert torch.equal(
        TensorDict.load_memmap(tmp_path / "m")["layers.1"], ActivationDataset.open(folder)["layers.1"][...]
    )


def test_a_copy_is_at_the_same_place_whatever_the_working_directory_is_later(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    dataset = ActivationDataset.open("a.acts")
    batches = iter(dataset.batches(10, shuffle="block"))
    first = next(batches)
    made = dataset.repack("b.acts")
    exported = dataset.export("c.npz")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(first) + sum(map(len, batches)) == 72
    assert torch.equal(made[70]["layers.0"], dataset[70]["layers.0"])
    assert dataset.refresh().complete
    assert exported.is_absolute()
    assert {path.name for path in tmp_path.iterdir()} == {"a.acts", "b.acts", "c.npz", "elsewhere"}
