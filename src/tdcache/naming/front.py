"""``tdcache.names``: the table of a model's canonical names, found or given, proved, and spelled as asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tdcache.errors import CanonicalNameError, TdcacheError
from tdcache.modules.call import ModelCall
from tdcache.modules.hooked import HookedModule
from tdcache.named_places import NamedPlace, Names
from tdcache.naming.copies import WorkingCopy, in_best_dtype
from tdcache.naming.mapping import mapped
from tdcache.naming.prove import checked, judged
from tdcache.naming.remembered import remembered
from tdcache.naming.resolve import names_of, traced, with_axes
from tdcache.naming.styles import STYLES, in_style
from tdcache.naming.trace import ForwardTrace
from tdcache.paths import wrapped

__all__ = ["names"]


def names(
    model: nn.Module,
    inputs: Any = None,
    style: str | None = None,
    *,
    mapping: Mapping[str, str | NamedPlace] | None = None,
    prove: bool | str | Iterable[str] = True,
) -> Names:
    """The canonical names of a model: each is a place, and what it says is proved by arithmetic.

    ``embed``, ``pos_embed``, ``blocks.{i}.resid_pre|resid_mid|resid_post``, ``blocks.{i}.attn.q|k|v|scores|pattern|z``,
    ``blocks.{i}.attn.out`` and ``blocks.{i}.attn.contribution`` (what is added to the stream),
    ``blocks.{i}.mlp.pre|post|out|contribution``, ``blocks.{i}.ln1|ln2``, ``final_norm`` and ``unembed``; with a prefix
    where there are several stacks (``encoder.blocks.0.resid_pre``). What a name would not mean in this model is
    refused, with the reason. The names are found by the data flow of one forward of a copy, and checked on another
    input; the model is left alone. Every method takes the table as ``names=``.

    Args:
        model: any module with a list of blocks. Wrappers of torch's (``torch.compile``, ``DistributedDataParallel``)
            and hooked modules are looked into.
        inputs: what to call it with: a tensor, a tuple of arguments, or a mapping of keyword arguments. By default made
            from its configuration or its embedding.
        style: whose spelling: None for the canonical one, ``"transformer_lens"`` for ``blocks.0.attn.hook_pattern``.
        mapping: the names of a model of one's own, ``{name: path or NamedPlace}``, in place of those that are found;
            ``"blocks.{i}.resid_post": "layers.{i}"`` speaks of every block. They are checked in the same way.
        prove: False to check nothing; a name or several (regular expressions on whole names) to leave these out.

    Returns:
        The table; ``print(table)`` shows it, ``print(table.proof)`` what was checked.

    Raises:
        CanonicalNameError: the model has no blocks, no input for it can be made, or there is no such style.
        PathError: ``mapping`` names a path that the model does not have.

    Example:
        >>> import torch
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(self.norm(x)).relu())
        >>> model = nn.Sequential(nn.Embedding(5, 8), Block(), Block())
        >>> names(model, torch.tensor([[1, 2, 3]]))["blocks.1.mlp.contribution"].path
        '2.down'
    """
    if not isinstance(model, nn.Module):
        raise CanonicalNameError(f"names() takes an nn.Module, got {type(model).__name__}", selector=model)
    if style is not None and style not in STYLES:
        known = ", ".join(map(repr, STYLES))
        raise CanonicalNameError(f"there is no style {style!r}; the styles are {known}, or None", selector=style)
    model = _own(model)
    skip = None if prove is False else () if prove is True else (prove,) if isinstance(prove, str) else tuple(prove)
    return remembered(
        model,
        (inputs, style, _as_data(mapping), skip),
        lambda: in_best_dtype(model, lambda copy: _made(copy, model, inputs, style, mapping, skip)),
    )


def _made(
    copy: WorkingCopy,
    model: nn.Module,
    inputs: Any,
    style: str | None,
    mapping: Mapping[str, str | NamedPlace] | None,
    skip: Sequence[str] | None,
) -> Names:
    """The table, all of it from one copy of the model; ``skip`` is None where nothing is to be proved."""
    record: ForwardTrace | None
    if mapping is None:
        record = traced(copy, inputs)
        table = names_of(record, model)
    else:
        record = _record(copy, inputs, mapping, style)
        table = mapped(model, mapping, record)
    if skip is not None:
        table = judged(*checked(copy, table, inputs, skip, fit=mapping is None))
    elif mapping is None:
        table = with_axes(copy, table, inputs)
    if style is None or record is None:
        return table
    return in_style(STYLES[style].meant(table, record), style)


def _record(
    copy: WorkingCopy, inputs: Any, mapping: Mapping[str, str | NamedPlace], style: str | None
) -> ForwardTrace | None:
    """A forward beside a mapping; a style needs one, streams are found by one that can be had, a table has its own."""
    if style is None and isinstance(mapping, Names):
        return None
    try:
        return traced(copy, inputs)
    except TdcacheError:
        if style is not None:
            raise
        return None


def _as_data(mapping: Mapping[str, str | NamedPlace] | None) -> Any:
    streams = repr(dict(mapping.streams)) if isinstance(mapping, Names) else ""
    return None if mapping is None else ([(name, repr(place)) for name, place in mapping.items()], streams)


def _own(model: nn.Module) -> nn.Module:
    """The user's own model, inside of what wraps it."""
    while True:
        if isinstance(model, HookedModule):
            inner: nn.Module | None = model.model
        elif isinstance(model, ModelCall):
            inner = model.module
        else:
            inner = wrapped(model)
        if inner is None:
            return model
        model = inner
