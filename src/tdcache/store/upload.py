"""Sending a store to an object store, shard by shard; what is there already is not sent again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tdcache.errors import SpecError, StoreError, listed
from tdcache.store.layout import StorePaths
from tdcache.store.remote import RemotePath, as_place
from tdcache.store.spec import differing, read_spec

__all__ = ["StoreUpload"]


class StoreUpload:
    """The upload of a store while it is written, or afterwards; several processes may send shards of one store.

    A reader of the copy sees whole shards: object stores give an object its name when all of it is there. The index
    comes last, and an old one is removed before anything new is sent.

    Args:
        store: on a disk.
        url: of the copy.
        options: for the file system of the URL.

    Raises:
        ValueError: ``url`` is none.
        SpecError: another store is there.
        StoreError: the copy cannot be read or written.
    """

    def __init__(self, store: StorePaths, url: str, options: Mapping[str, Any] | None = None) -> None:
        place = as_place(url, options)
        if not isinstance(place, RemotePath):
            raise ValueError(f"a store is uploaded to a URL, such as 's3://bucket/a.acts'; got {url!r}")
        self._store, self._place, self._stale_index = store, place, True
        try:
            (place / "spec.json").size()
        except FileNotFoundError:
            self._put("spec.json")
        self._compare(read_spec(store.folder), read_spec(place))

    def __repr__(self) -> str:
        return f"StoreUpload({str(self._store.folder)!r} to {self._place.url!r})"

    def _compare(self, here: Any, there: Any) -> None:
        fields = differing(here, there)
        if fields:
            raise SpecError(
                f"{self._place} holds another store than {self._store.folder}: they differ in {listed(fields)}; give "
                "another URL",
                path=self._place,
                fields=fields,
            )

    def send_missing(self, units: Iterable[int]) -> None:
        """Send those of some units' shards that are not there as they are here.

        Raises:
            StoreError: the copy does not take one, or cannot be read.
        """
        sizes = (self._place / "shards").listed()
        for unit in units:
            path = self._store.shard(unit)
            is_there = sizes.get("/".join(path.parts[-2:])) == path.stat().st_size
            if not (is_there and self._has_header(path)):
                self.send(unit)

    def _has_header(self, path: Path) -> bool:
        """Whether the copy of a shard has its header, in which the checksums of all its bytes are."""
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(int.from_bytes(head, "little"))
        return self._place.joinpath("shards", *path.parts[-2:]).read(0, len(head)) == head

    def send(self, unit: int) -> None:
        """Send the shard of one unit.

        Raises:
            StoreError: the copy does not take it.
        """
        if self._stale_index:
            (self._place / "index.json").remove()
            self._stale_index = False
        self._put("shards", *self._store.shard(unit).parts[-2:])

    def finish(self) -> None:
        """Send the index.

        Raises:
            StoreError: the copy does not take it.
        """
        self._put("index.json")

    def _put(self, *names: str) -> None:
        try:
            self._place.joinpath(*names).put(self._store.folder.joinpath(*names))
        except StoreError as error:
            raise StoreError(
                f"{error}; {self._store.folder} is whole: the same call again sends what is missing", path=self._place
            ) from error
