"""A dataset card: what an exported folder says of itself to people, in the format of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdcache.store.dtypes import dtype_name
from tdcache.store.reader import StoreReader

__all__ = ["dataset_card"]


_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")


def dataset_card(dataset: StoreReader, *, files: str | None = None) -> str:
    """Markdown with the card's metadata: the model, the sites, the rows, and what the stored dtype has lost.

    Args:
        dataset: the rows.
        files: where the Hub finds them, a pattern of names in the folder; None where its own layout says so.
    """
    spec, statistics = dataset.spec, dataset.statistics
    model: Any = spec.get("model") or {}
    lines = [
        "---",
        "tags: [activations, tdcache]",
        f"size_categories: [{_size_category(len(dataset))!r}]",
        *_configuration(files),
        "---",
        f"# Activations of {model.get('class', 'a model')}",
        "",
        f"{len(dataset):,} rows of {dataset.sequences:,} samples, harvested with tdcache. Each row knows "
        f"{', '.join(f'`{key}`' for key in dataset.row_keys)}.",
        "",
        "| site | dtype | shape | norm scale | too large | became zero |",
        "|---|---|---|---|---|---|",
    ]
    for key in dataset.keys:
        dtype, shape = dataset.describe(key)
        known = statistics.get(key)
        told = ("", "", "") if known is None else (f"{known.norm_scale:.4g}", known.overflow, known.underflow)
        cells = (f"`{key}`", dtype_name(dtype), "×".join(map(str, shape)) or "number", *told)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kept = {name: spec[name] for name in ("rows", "direction", "drop", "positions") if spec.get(name)}
    lines += ["", *(f"- {name}: `{value}`" for name, value in kept.items())]
    lines += [f"- tokenizer: `{spec['tokenizer']}`"] if "tokenizer" in spec else []
    lines += _from_others(spec)
    lines += [f"- model fingerprint: `{model.get('fingerprint', 'unknown')}`", f"- store id: `{dataset.id}`", ""]
    return "\n".join(lines)


def _size_category(rows: int) -> str:
    """The Hub's word for so many rows."""
    return next((each for power, each in enumerate(_SIZES, start=3) if rows < 10**power), "10B<n<100B")


def _configuration(files: str | None) -> list[str]:
    if files is None:
        return []
    return ["configs:", "- config_name: default", "  data_files:", "  - split: train", f"    path: {files}"]


def _from_others(spec: Mapping[str, Any]) -> list[str]:
    """What a copy says of the stores that it was made of."""
    packed, merged = spec.get("repacked"), spec.get("merged")
    found = []
    if isinstance(packed, Mapping):
        order = "in order" if packed.get("shuffle") is None else f"shuffled with seed {packed['shuffle']}"
        found.append(f"- made of: `{packed.get('from')}`, {order}")
    if isinstance(merged, list):
        found.append(f"- made of: {', '.join(f'`{store}` ({rows:,} rows)' for store, rows in merged)}")
    return found
