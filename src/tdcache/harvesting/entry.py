"""``harvest`` and ``preflight``: their signatures, and what each option means."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from tdcache.harvesting.loop import HarvestRun
from tdcache.harvesting.options import SHARD_BYTES, HarvestOptions
from tdcache.harvesting.plan import Preflight
from tdcache.harvesting.request import Request
from tdcache.harvesting.row_rule import RowKind
from tdcache.harvesting.workers import Share
from tdcache.named_places import Names
from tdcache.store.dataset import ActivationDataset
from tdcache.store.files import Files
from tdcache.types import Match, Pick, Selector

__all__ = ["harvest", "preflight"]


def harvest(
    model: nn.Module,
    data: Any,
    path: str | os.PathLike[str],
    *,
    select: Selector,
    match: Match = "full",
    direction: Literal["fwd", "fwd_pre"] = "fwd",
    pick: Pick = None,
    dtype: torch.dtype | str | None = None,
    drop: str | Sequence[str] | None = "pad",
    positions: slice | int | Sequence[int] | None = None,
    rows: RowKind | None = None,
    max_rows: int | None = None,
    max_bytes: int | str | None = None,
    overflow: Literal["raise", "count"] = "raise",
    resume: bool = True,
    stop_early: bool = True,
    progress: bool = False,
    batch_size: int = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    device: torch.device | str | None = None,
    shard_bytes: int = SHARD_BYTES,
    rank: int | None = None,
    world: int | None = None,
    files: Files | None = None,
    tag: str | None = None,
    recheck: bool = True,
    in_keys: Sequence[Any] | None = None,
    columns: Sequence[str] | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    names: Names | None = None,
    upload: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ActivationDataset:
    """Store what flows through the selected modules while ``data`` runs through ``model``; resumable at any instant.

    The data is cut into units, fixed ranges of samples; each becomes one file that is there whole or not at all. Run
    again after a crash, with any number of processes, it runs the units that are missing, and the files are byte for
    byte those of one uninterrupted run (on the same device). A finished harvest run again does
    no forward but the one that compares its first rows. The same call under ``torchrun`` deals the units to the ranks.
    The model is run without gradients in eval mode and left as it was.

    Args:
        model: any module. Batches that are mappings become keyword arguments, of those that it takes; tuples and lists
            begin with the inputs.
        data: a ``DataLoader`` that does not shuffle, a map-style dataset of samples (of any library; a tensor or
            TensorDict is one of its rows), or any iterable of batches, as a list of them.
        path: the store's folder.
        select: which modules; see :class:`tdcache.ActivationCaching`.
        match: how patterns are held against paths.
        direction: ``"fwd"`` (outputs) or ``"fwd_pre"`` (inputs).
        pick: which tensor of a structured value.
        dtype: of the stored values, also by name (``"bfloat16"``); None keeps the model's.
        drop: ``"pad"`` (by the attention mask), ``"bos"`` (each sample's first token), ``"pad|bos"``, or None.
        positions: the places among a sample's own tokens that are kept: a number, several, or a slice.
        rows: ``"tokens"`` or ``"samples"``; by default tokens where the batches have token ids or a mask.
        max_rows: the most rows, exactly: those of the first samples, the same for all sites. Run again with more, a
            harvest goes on from there.
        max_bytes: the most bytes of all columns together, also as ``"20GB"``.
        overflow: ``"raise"`` refuses values that ``dtype`` cannot hold (finite ones, and infinities where it has none),
            ``"count"`` stores how many there were. Values that become zero are stored and counted with either.
        resume: continue a store that is there; False refuses one.
        stop_early: end each forward once every site has fired; of a module that would run again, it is the first call.
            Ignored with ``forward``.
        progress: print what will be stored, then rows per second and the time left, to the standard error stream.
        batch_size: samples per batch, where ``data`` is a dataset.
        collate: makes a batch of samples, where ``data`` is a dataset.
        forward: ``forward(model, batch)``, where the model is called in a way of its own.
        device: where batches are moved; by default where the model is.
        shard_bytes: how big a shard should be, about; three of them are held in memory.
        rank: which share of the units is run here; by default torchrun's.
        world: how many shares there are.
        files: how files are written.
        tag: a name for the computation, where ``forward``, ``collate`` or a callable ``pick`` depends on something
            that cannot be told apart from another in a later process.
        recheck: of a store that is there, run its first batch again and compare the rows; what the spec does not tell
            apart shows itself here. False spares that forward.
        in_keys: the entries of a mapping or TensorDict that are the model's positional arguments; by default entries
            are found by the names of its arguments.
        columns: numbers to store beside the rows, one per sample or one per token: names of entries of the batches, or
            ``{name: key, index or function(batch)}``.
        tokenizer: of the token ids, a tokenizer or the name that it is loaded by; the name is stored, for
            :meth:`ActivationDataset.text`.
        names: the canonical names of the model, ``tdcache.names(model)``; ``select`` then means names, which the sites
            are called by in the store.
        upload: a URL that fsspec knows, such as ``"s3://bucket/a.acts"`` (extra ``remote``), where each shard is sent
            when it is written. A copy that is behind is completed first.
        storage_options: for the file system of ``upload``: credentials, an endpoint.

    Returns:
        The store, open for reading.

    Raises:
        SelectionError: nothing selected, nothing in the data, a budget below one row, or an unusable option.
        SpecError: the store there holds something else; the fields that differ are named. Or an option depends on
            something without a spelling, and there is no ``tag``.
        CaptureError: values without rows in common, values that ``dtype`` cannot hold, or a bare shard of one.
        StoreError: a unit could not be written or sent; the message names it and its path.
    """
    request = Request.of(model, data, path, HarvestOptions.among(locals()))
    share, sent = Share.of(model, rank, world), None if upload is None else (upload, storage_options)
    HarvestRun.begun(request, share, resume=resume, shown=progress, files=files, upload=sent).go(recheck=recheck)
    return ActivationDataset.open(request.given if request.given.absolute() == request.folder else request.folder)


def preflight(
    model: nn.Module, data: Any, path: str | os.PathLike[str], *, select: Selector, **options: Any
) -> Preflight:
    """What :func:`harvest` would store with these arguments; one forward runs, nothing is written.

    Args:
        model: as there.
        data: as there.
        path: as there.
        select: as there.
        **options: those that say what is stored, as there: ``match``, ``dtype``, ``rows``, ``max_rows`` and the like.
    """
    request = Request.of(model, data, path, HarvestOptions.of("preflight", {"select": select, **options}))
    return request.preflight(request.probe())
