"""Shards that are sent elsewhere when they are written: the copy is the store, and an interrupted upload continues."""

import pytest
import torch
from torch import nn

from tdcache import ActivationDataset, harvest
from tdcache.errors import SpecError, StoreError
from tdcache.store.remote import RemotePath

fsspec = pytest.importorskip("fsspec")

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
OPTIONS = {"select": "0", "batch_size": 4, "recheck": False}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3))


@pytest.fixture
def url(request):
    yield f"memory://{request.node.name}/a.acts"
    system = fsspec.filesystem("memory")
    if system.exists(f"/{request.node.name}"):
        system.rm(f"/{request.node.name}", recursive=True)


@pytest.fixture
def sent(monkeypatch):
    """The names of what was sent, in order."""
    names, put = [], RemotePath.put
    monkeypatch.setattr(RemotePath, "put", lambda self, path: put(self, path) or names.append(path.name))
    return names


def copy_of(url):
    system = fsspec.filesystem("memory")
    base = url.removeprefix("memory:/")
    return {name.removeprefix(f"{base}/"): system.cat_file(name) for name in system.find(base)}


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_shard_is_sent_when_it_is_written_and_the_index_last(tmp_path, url, sent):
    store = harvest(model(), X, tmp_path / "a.acts", upload=url, **OPTIONS)
    assert copy_of(url) == files_of(tmp_path / "a.acts")
    assert sent == ["spec.json", *(f"u{unit:08d}.safetensors" for unit in range(10)), "index.json"]
    there = ActivationDataset.open(url)
    assert there.complete
    assert torch.equal(there["0"][...], store["0"][...])
    harvest(model(), X, tmp_path / "a.acts", upload=url, **OPTIONS)
    assert sent[12:] == ["index.json"]


def test_an_upload_that_failed_leaves_the_store_whole_and_continues(tmp_path, url, sent, monkeypatch):
    put, left = RemotePath.put, [4]

    def fails(path, source):
        left[0] -= 1
        if left[0] < 0:
            raise StoreError(f"{path}: OSError: the connection is gone", path=path)
        put(path, source)

    with monkeypatch.context() as patched:
        patched.setattr(RemotePath, "put", fails)
        with pytest.raises(
            StoreError, match=r"u00000003.*the connection is gone; .*a\.acts is whole: the same call aga"
        ):
            harvest(model(), X, tmp_path / "a.acts", upload=url, **OPTIONS)
    ActivationDataset.open(tmp_path / "a.acts").verify()
    assert len(ActivationDataset.open(url)) == 12  # three shards, found without an index
    del sent[:]
    harvest(model(), X, tmp_path / "a.acts", upload=url, **OPTIONS)
    assert sent == [*(f"u{unit:08d}.safetensors" for unit in range(3, 10)), "index.json"]
    assert copy_of(url) == files_of(tmp_path / "a.acts")


def test_a_limit_that_is_raised_reaches_the_copy(tmp_path, url):
    for rows in (10, 26, None):
        harvest(model(), X, tmp_path / "a.acts", upload=url, max_rows=rows, **OPTIONS)
        assert copy_of(url) == files_of(tmp_path / "a.acts")
    ActivationDataset.open(url).verify()


def test_shares_of_a_harvest_send_their_own_shards(tmp_path, url):
    for rank in (1, 0, 2):
        harvest(model(), X, tmp_path / "a.acts", upload=url, rank=rank, world=3, **OPTIONS)
    assert copy_of(url) == files_of(tmp_path / "a.acts")


def test_a_shard_of_the_same_size_and_another_content_is_sent_again(tmp_path, url, sent):
    store = harvest(model(), X, tmp_path / "a.acts", **OPTIONS)
    store.upload(url)
    system, name = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/shards/000/u00000002.safetensors"
    data = bytearray(system.cat_file(name))
    data[20] ^= 1
    system.pipe_file(name, bytes(data))
    del sent[:]
    there = store.upload(url)
    assert sent == ["u00000002.safetensors", "index.json"]
    there.verify()


def test_what_cannot_be_sent_is_refused(tmp_path, url):
    store = harvest(model(), X, tmp_path / "a.acts", **OPTIONS)
    other = harvest(model(1), X, tmp_path / "b.acts", **OPTIONS)
    there = store.upload(url)
    with pytest.raises(SpecError, match=r"memory://.* holds another store than .*b\.acts: they differ in 'model\.fin"):
        other.upload(url)
    with pytest.raises(ValueError, match=r"a store is uploaded to a URL, such as 's3://bucket/a\.acts'; got 'c\.acts'"):
        store.upload("c.acts")
    for rows in (there, store.where(lambda rows: rows["seq"] < 3)):
        with pytest.raises(StoreError, match="is no store on a disk; repack\\(\\) it to one, and upload that"):
            rows.upload(url)
