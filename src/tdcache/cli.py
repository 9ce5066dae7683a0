"""The command line: ``tdcache harvest``, ``info``, ``verify``, ``repack``, ``merge``, ``export`` and ``upload``."""

from __future__ import annotations

import argparse
import importlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from tdcache.errors import StoreError, TdcacheError
from tdcache.harvesting import harvest, preflight
from tdcache.harvesting.capture import STORED_DTYPES
from tdcache.harvesting.options import SHARD_BYTES
from tdcache.harvesting.row_rule import RowKind, as_positions
from tdcache.store import ActivationDataset
from tdcache.store.dtypes import DTYPES
from tdcache.store.verify import find_damage
from tdcache.types import Match

__all__ = ["main"]

_PLACE = "the store's folder, or its URL"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit status is 0, 1 for damage or a failed harvest, 2 for a wrong call, 130 after an interrupt. Errors are one
    sentence, but for those of the recipe's own code, which keep their traceback.

    Args:
        arguments: in place of the process's own.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except _RecipeError as error:
        traceback.print_exception(error.__cause__, file=sys.stderr)
        print(f"tdcache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tdcache: interrupted; what was written is whole, and the same command continues it", file=sys.stderr)
        return 130
    except (TdcacheError, OSError, ValueError) as error:
        if _is_of_user_code(error):
            traceback.print_exception(error, file=sys.stderr)
        print(f"tdcache: {error}", file=sys.stderr)
        return 1


def _is_of_user_code(error: BaseException) -> bool:
    """Whether an error came through code that is neither this package's nor a library's."""
    libraries = (str(Path(__file__).parent), *{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    frames = traceback.extract_tb(error.__traceback__)
    return not all(frame.filename.startswith((*libraries, "<")) for frame in frames)


class _RecipeError(Exception):
    """The code named by the user failed; the cause is its own error."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tdcache", description="Activations of a PyTorch model, in files.")
    parser.add_argument("--version", action="version", version=f"tdcache {_version()}, torch {torch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    take = commands.add_parser("harvest", help="store what flows through a model", description=_harvest.__doc__)
    take.add_argument(
        "source",
        help="MODULE:FUNCTION giving (model, data), which is imported and executed: name only code that you trust; or, "
        "with --texts, a Hugging Face model",
    )
    take.add_argument("path", type=Path, help="the store's folder; an unfinished one is continued")
    take.add_argument("--select", required=True, action="append", metavar="REGEX", help="modules, by whole path")
    take.add_argument("--match", choices=get_args(Match), default="full", help="how a REGEX is held against a path")
    take.add_argument("--direction", choices=("fwd", "fwd_pre"), default="fwd", help="outputs or inputs of modules")
    take.add_argument("--texts", type=Path, metavar="FILE", help="one sample per line, for a Hugging Face model")
    take.add_argument("--dtype", choices=STORED_DTYPES, help="of what is stored")
    take.add_argument("--overflow", choices=("raise", "count"), default="raise", help="what --dtype cannot hold")
    take.add_argument("--rows", choices=get_args(RowKind), help="one row per token or per sample")
    take.add_argument("--drop", default="pad", help="pad, bos, pad|bos or none (default: pad)")
    take.add_argument("--positions", type=_positions, metavar="N|N,N|N:N", help="kept places of each sample")
    take.add_argument("--max-rows", type=int, metavar="N")
    take.add_argument("--max-bytes", metavar="SIZE", help="such as 20GB")
    take.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="how big a file is, about")
    take.add_argument("--batch-size", type=int, default=32, metavar="N")
    take.add_argument("--device", help="where the model runs")
    take.add_argument("--upload", metavar="URL", help="where each shard is sent as well, such as s3://bucket/a.acts")
    take.add_argument("--no-stop-early", action="store_true", help="run each forward to its end")
    take.add_argument("--dry-run", action="store_true", help="print what would be stored, and stop")
    take.add_argument("--quiet", action="store_true", help="print no progress")
    take.set_defaults(run=_harvest)
    info = commands.add_parser("info", help="what a store holds", description=_info.__doc__)
    info.add_argument("path", help=_PLACE)
    info.add_argument("--check", action="store_true", help="compare every byte with its checksum as well")
    info.set_defaults(run=_info)
    verify = commands.add_parser("verify", help="read every byte of a store", description=_verify.__doc__)
    verify.add_argument("path", help=_PLACE)
    verify.set_defaults(run=_verify)
    _add_copies(commands)
    return parser


def _version() -> str:
    try:
        return version("tdcache")
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def _add_copies(commands: Any) -> None:
    """The commands that make a store, or files, of stores."""
    pack = commands.add_parser("repack", help="write a store anew", description=_repack.__doc__)
    pack.add_argument("path", help=_PLACE)
    pack.add_argument("target", type=Path, help="the new store's folder; one that was begun is continued")
    pack.add_argument("--shuffle", action="store_true", help="mix the rows once and for all")
    pack.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle")
    pack.add_argument("--key", action="append", metavar="SITE", help="a site that is kept; all by default")
    pack.add_argument("--dtype", choices=STORED_DTYPES, help="of what is stored")
    pack.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="how big a file is, about")
    pack.set_defaults(run=_repack)
    join = commands.add_parser("merge", help="join stores of one model", description=_merge.__doc__)
    join.add_argument("paths", nargs="+", metavar="PATH", help="in the order of their rows")
    join.add_argument("--to", type=Path, required=True, metavar="TARGET", help="the new store's folder")
    join.set_defaults(run=_merge)
    out = commands.add_parser("export", help="write the rows in another format", description=_export.__doc__)
    out.add_argument("path", help=_PLACE)
    out.add_argument("target", type=Path, help="a file or folder that is not there")
    out.add_argument("--kind", choices=("npz", "pt", "memmap", "hf", "parquet"), help="by default what the suffix says")
    out.set_defaults(run=_export)
    send = commands.add_parser("upload", help="send a store elsewhere", description=_upload.__doc__)
    send.add_argument("path", type=Path)
    send.add_argument("url", help="such as s3://bucket/a.acts; an upload that was begun is continued")
    send.set_defaults(run=_upload)


def _positions(text: str) -> Any:
    if ":" in text:
        return as_positions(slice(*(int(each) if each else None for each in text.split(":"))))
    return as_positions([int(each) for each in text.split(",")])


def _harvest(options: argparse.Namespace) -> int:
    """Store what flows through the selected modules; run it again to continue after an interruption."""
    model, data, collate = _from_texts(options) if options.texts else (*_from_function(options.source), None)
    if options.device:
        model = _on_device(model, options.device)
    asked: dict[str, Any] = {
        "select": options.select,
        "match": options.match,
        "direction": options.direction,
        "dtype": options.dtype,
        "drop": None if options.drop == "none" else options.drop,
        "positions": options.positions,
        "rows": options.rows,
        "max_rows": options.max_rows,
        "max_bytes": options.max_bytes,
        "shard_bytes": options.shard_bytes,
        "batch_size": options.batch_size,
        "collate": collate,
        "tokenizer": options.source if options.texts else None,
    }
    if options.dry_run:
        print(preflight(model, data, options.path, **asked))
        return 0
    asked |= {"overflow": options.overflow, "stop_early": not options.no_stop_early, "progress": not options.quiet}
    asked["upload"] = options.upload
    print(harvest(model, data, options.path, **asked))
    return 0


def _on_device(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.to(torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no class of its own for these
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def _from_function(source: str) -> tuple[nn.Module, Any]:
    module, _, name = source.partition(":")
    if not name:
        raise ValueError(f"{source!r} is not MODULE:FUNCTION; for a Hugging Face model give --texts FILE as well")
    sys.path.insert(0, str(Path.cwd()))  # as python -m has it
    try:
        make = getattr(importlib.import_module(module), name, None)
        found = make() if callable(make) else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _RecipeError(f"the recipe {source!r} failed") from error
        raise ValueError(
            f"{source!r} cannot be called: there is no module {error.name!r} here or on the path"
        ) from None
    except Exception as error:
        raise _RecipeError(f"the recipe {source!r} failed") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(make):
        raise ValueError(f"{source!r} cannot be called: {module!r} has no function {name!r}")
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], nn.Module):
        raise ValueError(f"{source} returns (model, data), got {type(found).__name__}")
    return found


class _Lines(torch.utils.data.Dataset[str]):
    """The lines of a file that hold something."""

    def __init__(self, path: Path) -> None:
        self.lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> str:
        return self.lines[number]


def _from_texts(options: argparse.Namespace) -> tuple[nn.Module, Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise StoreError("a Hugging Face model needs transformers: pip install 'tdcache[hf]'") from None
    tokenizer = AutoTokenizer.from_pretrained(options.source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModel.from_pretrained(options.source)

    def collate(texts: list[str]) -> Any:
        return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")

    return model, _Lines(options.texts), collate


def _info(options: argparse.Namespace) -> int:
    """Print what a store holds, and whether it is complete."""
    dataset = ActivationDataset.open(options.path)
    print(dataset)
    width = max(map(len, dataset.keys))
    for key in dataset.keys:
        dtype, shape = dataset.describe(key)
        print(f"  {key.ljust(width)}  {str(dtype).removeprefix('torch.')} {shape}")
        lost = dataset.statistics.get(key)
        if lost is not None and (lost.overflow or lost.underflow):
            print(f"  {' ' * width}  {lost.overflow:,} values too large for it, {lost.underflow:,} that became zero")
    spec = dataset.spec
    print(f"  rows: one per {str(spec.get('rows'))[:-1]}, dropped: {', '.join(spec.get('drop') or []) or 'nothing'}")
    print(f"  samples: {dataset.sequences:,} in {len(dataset.shards)} shards, id {dataset.id[:12]}")
    print(f"  beside each row: {', '.join(dataset.row_keys)}")
    return _verify(options) if options.check else 0


def _verify(options: argparse.Namespace) -> int:
    """Read every byte; print what is damaged, and exit with status 1 if anything is."""
    damage = find_damage(options.path)
    for error in damage:
        print(error, file=sys.stderr)
    if damage:
        return 1
    dataset = ActivationDataset.open(options.path)
    print(f"{len(dataset.shards)} shards, {dataset.nbytes:,} bytes: every checksum fits")
    if not dataset.complete:
        print("the harvest is unfinished; run it again to continue")
    return 0


def _repack(options: argparse.Namespace) -> int:
    """Write the rows of a store to a new one: shuffled, fewer sites, another dtype, other shards."""
    made: dict[str, Any] = {"shuffle": options.shuffle, "seed": options.seed}
    dtype = DTYPES[options.dtype] if options.dtype else None
    try:
        source = ActivationDataset.open(options.path, keys=options.key)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    print(source.repack(options.target, dtype=dtype, shard_bytes=options.shard_bytes, **made))
    return 0


def _merge(options: argparse.Namespace) -> int:
    """Write the rows of several stores of the same model and sites to a new one, in order."""
    first, *others = map(ActivationDataset.open, options.paths)
    print(first.merge(*others, path=options.to))
    return 0


def _export(options: argparse.Namespace) -> int:
    """Write the rows for numpy.load, torch.load, TensorDict.load_memmap or datasets.load_from_disk."""
    print(ActivationDataset.open(options.path).export(options.target, options.kind))
    return 0


def _upload(options: argparse.Namespace) -> int:
    """Send the shards of a store that are not at a URL yet, and its index."""
    print(ActivationDataset.open(options.path).upload(options.url))
    return 0
