"""A dataset card: what an exported folder says of itself to people, in the format of the Hugging Face Hub."""

from __future__ import annotations

from typing import Any

from tdcache.store.dtypes import dtype_name
from tdcache.store.reader import StoreReader

__all__ = ["dataset_card"]


def dataset_card(dataset: StoreReader) -> str:
    """Markdown with the card's metadata: the model, the sites, the rows, and what the stored dtype has lost."""
    spec, statistics = dataset.spec, dataset.statistics
    model: Any = spec.get("model") or {}
    lines = [
        "---",
        "tags: [activations, tdcache]",
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
    lines += [f"- model fingerprint: `{model.get('fingerprint', 'unknown')}`", f"- store id: `{dataset.id}`", ""]
    return "\n".join(lines)
