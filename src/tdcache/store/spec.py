"""What a store holds and how it was made: immutable, canonical, and with an id that every shard repeats."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdcache.errors import DamagedError, SpecError
from tdcache.store.atomic import draft_file
from tdcache.store.checksums import crc32
from tdcache.store.dtypes import DTYPES
from tdcache.store.files import Files
from tdcache.store.regular import parse_json, read_bounded
from tdcache.store.remote import Place

__all__ = ["FORMAT", "canonical", "differing", "has_spec", "read_spec", "spec_id", "write_spec"]

FORMAT = "tdcache.acts/1"
_MOST = 1 << 24  # bytes
_MOST_DIMENSIONS, _MOST_ITEMS = 62, 1 << 40  # of one row at one site


def canonical(document: Any) -> bytes:
    """The one way in which a document is spelled as JSON."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def spec_id(spec: Mapping[str, Any]) -> str:
    """The sha256 of the spec's canonical spelling."""
    return hashlib.sha256(canonical(spec)).hexdigest()


def differing(one: Any, other: Any, above: str = "") -> list[str]:
    """The dotted names of the fields in which two specs differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        names = sorted({*one, *other})
        return [
            field
            for name in names
            for field in differing(one.get(name), other.get(name), f"{above}.{name}" if above else str(name))
        ]
    return [] if one == other else [above]


def write_spec(folder: Path, spec: Mapping[str, Any], *, made_by: Mapping[str, str], files: Files) -> dict[str, Any]:
    """Put a spec into a folder that has none, or hold it against the one that is there.

    Args:
        folder: of the store.
        spec: JSON values only.
        made_by: versions, for people; they are in no id and may differ when a harvest is resumed.
        files: how files are written.

    Returns:
        The spec that counts, as JSON gives it back.

    Raises:
        SpecError: there is another one; the differing fields are named.
    """
    document = {"format": FORMAT, "id": spec_id(spec), "made_by": dict(made_by), "spec": spec}
    document["crc32"] = f"{crc32(canonical(document)):08x}"
    target = folder / "spec.json"
    if not has_spec(folder):
        with draft_file(folder / ".tmp", "spec", files) as (descriptor, temporary):
            files.write(descriptor, memoryview(_rendered(document)), 0)
            files.sync(descriptor)
            with contextlib.suppress(FileExistsError):  # another writer was faster: its spec is compared below
                files.link(temporary, target)
            files.sync_folder(folder)
    there = read_spec(folder)
    wanted = json.loads(canonical(spec))
    if there != wanted:
        fields = differing(wanted, there)
        shown = "\n".join(f"  {each}: {_at(there, each)} there, {_at(wanted, each)} asked for" for each in fields)
        raise SpecError(
            f"{folder} was made otherwise than is asked for now:\n{shown}\nask for the same, or give another folder",
            path=folder,
            fields=fields,
        )
    return there


def _rendered(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"


def _at(spec: Any, field: str) -> str:
    """A field for a message; the names of sites hold dots themselves, so the longest name that fits is taken."""
    while field and isinstance(spec, Mapping):
        name = next((name for name in sorted(spec, key=len, reverse=True) if f"{field}.".startswith(f"{name}.")), None)
        if name is None:
            return "nothing"
        spec, field = spec[name], field[len(name) + 1 :]
    text = json.dumps(spec)
    return text if len(text) <= 120 else f"{text[:117]}..."


def has_spec(folder: Path) -> bool:
    """Whether a folder on a disk is that of a store; False for a name that is too long, which writing to it reports."""
    return os.path.lexists(folder / "spec.json")


def read_spec(folder: Place) -> dict[str, Any]:
    """The spec of a store.

    Raises:
        SpecError: there is none.
        DamagedError: it is not what was written.
    """
    target = folder / "spec.json"
    try:
        raw = read_bounded(target, most=_MOST)
        document = parse_json(raw, target)
    except FileNotFoundError:
        raise SpecError(
            f"{folder} is no activation store: it has no spec.json; write one with tdcache.harvest(...)", path=folder
        ) from None
    except DamagedError as error:
        raise DamagedError(f"{target} is not what was written: {error}", path=target) from None
    try:
        spelled = _rendered(document)
        crc = document.pop("crc32")
        spec = document["spec"]
        sound = raw == spelled and crc == f"{crc32(canonical(document)):08x}" and document["id"] == spec_id(spec)
        sound = sound and all(map(_is_site, (*spec["sites"].items(), *spec.get("columns", {}).items())))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise DamagedError(
            f"{target} is not what was written: its checksum, its id, a site or a column does not fit", path=target
        )
    if document["format"] != FORMAT:
        raise SpecError(f"{target} is of format {document['format']!r}; this version reads {FORMAT!r}", path=target)
    return dict(spec)


def _is_site(described: tuple[Any, Any]) -> bool:
    """Whether a site has a dtype that files may hold, and a shape that torch can describe."""
    path, site = described
    shape = site["shape"]
    return (
        isinstance(path, str)
        and isinstance(site["dtype"], str)
        and site["dtype"] in DTYPES
        and isinstance(shape, list)
        and len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(max(size, 1) for size in shape) <= _MOST_ITEMS
    )
