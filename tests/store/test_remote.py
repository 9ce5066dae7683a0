"""Stores in object stores and on servers: read by ranges, equal to those on a disk, with errors that say where."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from store.faulty_files import write_units
from tdcache.errors import DamagedError, SpecError, StoreError
from tdcache.store import ActivationDataset
from tdcache.store.remote import Pages, RemotePath, as_place

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "a.acts"
    write_units(folder)
    return folder


@pytest.fixture
def url(local, request):
    """The same store in fsspec's memory."""
    system, path = fsspec.filesystem("memory"), f"/{request.node.name}/a.acts"
    system.put(f"{local}/", path, recursive=True)
    yield f"memory:/{path}"
    system.rm(f"/{request.node.name}", recursive=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in other.keys())  # noqa: SIM118 - of a TensorDict


def test_a_store_elsewhere_is_what_it_is_on_a_disk(local, url):
    here, there = ActivationDataset.open(local), ActivationDataset.open(url)
    assert (there.id, len(there), there.columns, there.complete) == (here.id, len(here), here.columns, True)
    assert repr(there) == repr(here).replace(str(local), url)
    numbers = torch.tensor([len(here) - 1, 0, 3, 3])
    for index in (..., slice(3, 17), 5, numbers, list(range(0, len(here), 2))):
        assert same(there[index], here[index])
    assert same(there.sequence(2), here.sequence(2))
    assert here.statistics.keys() == there.statistics.keys()
    assert len(there.where(lambda rows: rows["pos"] == 0)) == len(here.where(lambda rows: rows["pos"] == 0))
    there.verify()


def test_its_epochs_are_the_same_also_in_workers_and_with_checks(local, url):
    options = {"shuffle": "block", "seed": 1, "block": 5, "pool": 20}
    here = list(ActivationDataset.open(local).batches(7, **options))
    there = ActivationDataset.open(url, check=True)
    assert all(same(one, other) for one, other in zip(there.batches(7, **options), here, strict=True))
    seen = [
        int(each) for batch in DataLoader(there.iterable(7), batch_size=None, num_workers=2) for each in batch["seq"]
    ]
    assert sorted(seen) == sorted(int(each) for batch in here for each in batch["seq"])


def test_what_the_file_system_answers_is_named():
    with pytest.raises(FileNotFoundError, match="there is nothing of that name"):
        as_place("memory://nowhere/a.acts", None).read_bounded(100)
    with pytest.raises(StoreError, match=r"^nosuch://a: ValueError: Protocol not known: nosuch"):
        as_place("nosuch://a", None).read_bounded(100)


def test_a_shard_that_was_changed_there_is_damage(local, url):
    system, path = fsspec.filesystem("memory"), f"{url.removeprefix('memory:/')}/shards/000/u00000000.safetensors"
    data = bytearray(system.cat_file(path))
    data[4100] ^= 1
    system.pipe_file(path, bytes(data))
    with pytest.raises(DamagedError, match=r"memory://.*u00000000\.safetensors: block 0 of column 'seq' has crc32"):
        ActivationDataset.open(url, check=True)[0]
    with pytest.raises(DamagedError, match="block 0 of column"):
        ActivationDataset.open(url).verify()
    system.pipe_file(path, bytes(data[:-8]))
    with pytest.raises(DamagedError, match=r"the file ends at byte \d+; it is truncated"):
        ActivationDataset.open(url)[...]
    system.rm_file(path)
    with pytest.raises(DamagedError, match=r"memory://.*u00000000\.safetensors: the shard is missing"):
        ActivationDataset.open(url)[0]


def test_without_an_index_the_folder_is_listed(local, url):
    fsspec.filesystem("memory").rm_file(f"{url.removeprefix('memory:/')}/index.json")
    assert same(ActivationDataset.open(url)[...], ActivationDataset.open(local)[...])


def test_copies_of_a_store_elsewhere_are_made_here(local, url, tmp_path):
    there = ActivationDataset.open(url)
    assert same(there.repack(tmp_path / "b.acts")[...], there[...])
    assert same(there.merge(path=tmp_path / "c.acts")[...], there[...])
    there.export(tmp_path / "d.pt")
    with pytest.raises(StoreError, match=r"memory://.* is not on this machine; say where the new store is to be, with"):
        there.repack()


def test_what_is_not_there_or_cannot_be_read_is_said_with_its_url(monkeypatch):
    with pytest.raises(SpecError, match=r"memory://nothing\.acts is no activation store: it has no spec\.json"):
        ActivationDataset.open("memory://nothing.acts")
    with pytest.raises(StoreError, match=r"nosuch://a/spec\.json: ValueError: Protocol not known: nosuch"):
        ActivationDataset.open("nosuch://a")
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(StoreError, match=r"s3://a/spec\.json needs fsspec: pip install 'tdcache\[remote\]'"):
        ActivationDataset.open("s3://a")


def test_a_file_that_is_too_large_is_not_read():
    fsspec.filesystem("memory").pipe_file("/large", bytes(101))
    with pytest.raises(DamagedError, match="memory://large has more than the 100 bytes it may have"):
        RemotePath("memory://large").read_bounded(100)


def test_a_server_that_tells_no_size_is_refused(monkeypatch):
    monkeypatch.setattr(RemotePath, "_asked", lambda path, call: None)
    with pytest.raises(StoreError, match="memory://x: the server does not tell its size, so it cannot be read by ran"):
        RemotePath("memory://x").size()


def test_what_is_a_url_and_what_is_a_path():
    assert isinstance(as_place("s3://bucket/a.acts"), RemotePath)
    assert isinstance(as_place("simplecache::s3://bucket/a.acts"), RemotePath)
    assert as_place("runs/a:b.acts") == Path("runs/a:b.acts").absolute()
    assert as_place(RemotePath("s3://a", {"anon": True})).options == {"anon": True}


class Counted(RemotePath):
    """A name whose requests are noted; there are bytes without end."""

    asked = None

    def read(self, begin, end):
        Counted.asked.append((begin, end))
        return bytes(number % 251 for number in range(begin, end))


def test_small_reads_share_pages_and_large_ones_ask_for_what_they_need():
    Counted.asked, pages, page = [], Pages(), 1 << 18
    path = Counted("memory://paged")
    for offset, size in ((0, 10), (100, 10), (page - 5, 10), (1000, page)):
        assert b"".join(pages.read(path, offset, size, 1 << 30)) == bytes(
            each % 251 for each in range(offset, offset + size)
        )
    assert Counted.asked == [(0, page), (page, 2 * page), (1000, 1000 + page)]


def test_the_pages_that_are_kept_have_a_bound(monkeypatch):
    monkeypatch.setattr("tdcache.store.remote._PAGES", 3)
    Counted.asked, pages, page = [], Pages(), 1 << 18
    path = Counted("memory://paged")
    for number in (0, 1, 2, 3, 3, 0):
        list(pages.read(path, number * page, 1, 1 << 30))
    assert [begin // page for begin, _ in Counted.asked] == [0, 1, 2, 3, 0]


class _Ranges(BaseHTTPRequestHandler):
    """A folder over HTTP, which lists nothing, and gives ranges."""

    folder = Path()
    asked = ()
    knows_ranges = True

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, span = path.read_bytes(), self.headers.get("Range") if self.knows_ranges else None
        self.asked.append((path.name, span))
        first, last = span.removeprefix("bytes=").split("-") if span else (0, len(data) - 1)
        part = data[int(first) : int(last) + 1]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(local):
    handler = type("Handler", (_Ranges,), {"folder": local.parent, "asked": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", handler
    running.shutdown()
    running.server_close()
    thread.join()


def test_a_store_behind_a_server_is_read_by_ranges(local, server):
    pytest.importorskip("aiohttp")
    address, asked = server[0], server[1].asked
    here, there = ActivationDataset.open(local), ActivationDataset.open(f"{address}/a.acts", check=True)
    assert {name for name, _ in asked} == {"spec.json", "index.json"}  # no shard is opened
    assert same(there[5], here[5])
    opened = [name for name, _ in asked if name.startswith("u")]
    assert len(set(opened)) == 1
    assert all(span is not None for name, span in asked if name.startswith("u"))
    options = {"shuffle": "block", "seed": 1, "block": 5, "pool": 20}
    for one, other in zip(there.batches(7, **options), here.batches(7, **options), strict=True):
        assert same(one, other)
    with pytest.raises(SpecError, match=r"http://.*/b\.acts is no activation store"):
        ActivationDataset.open(f"{address}/b.acts")


def test_a_server_without_ranges_is_refused_and_its_bytes_are_not_believed(local, server, monkeypatch):
    pytest.importorskip("aiohttp")
    address, handler = server
    there = ActivationDataset.open(f"{address}/a.acts")
    handler.knows_ranges = False
    monkeypatch.setattr("tdcache.store.remote._PAGE", 4096)  # less than a shard
    with pytest.raises(
        StoreError, match=r"asked for \d+ bytes from byte \d+ on, the server gave \d+: it knows no ranges"
    ):
        ActivationDataset.open(f"{address}/a.acts")[5]
    assert len(ActivationDataset.open(f"{address}/a.acts")) == len(there)  # whole files are what it can give


def test_workers_have_connections_of_their_own(local, server):
    pytest.importorskip("aiohttp")
    there = ActivationDataset.open(f"{server[0]}/a.acts")
    whole = there["seq"][...].tolist()  # this process has a connection by now
    loader = DataLoader(there.iterable(7), batch_size=None, num_workers=2)
    assert sorted(int(each) for batch in loader for each in batch["seq"]) == sorted(whole)


def test_a_store_that_was_replaced_there_is_noticed_after_some_seconds(local, url, tmp_path, monkeypatch):
    there = ActivationDataset.open(url)
    there[...]
    system, base = fsspec.filesystem("memory"), url.removeprefix("memory:/")
    other = ActivationDataset.open(local).repack(tmp_path / "b.acts", shuffle=True)  # equal columns, another order
    system.rm(base, recursive=True)
    other.upload(url)
    there[3]  # asked a moment ago
    monkeypatch.setattr("tdcache.store.reader._ASKED_EVERY", 0.0)
    text = "holds another store than the one that was opened; open it again"
    for read in (lambda: there[3], lambda: there[[5, 1]], lambda: list(there.batches(7)), there.verify, there.refresh):
        with pytest.raises(SpecError, match=text):
            read()
