"""Resolves TransformerLens-style hook points to module paths, by a table of known model layouts.

For scripts that use these names on Hugging Face models; :func:`tdcache.names` finds and proves names in models that are
in no table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import regex
from torch import nn

from tdcache.errors import SelectionError, listed
from tdcache.paths import near_misses
from tdcache.selection import select, walk
from tdcache.types import Selector

__all__ = [
    "Exactly",
    "HookSite",
    "LAYOUTS",
    "Layout",
    "find_layout",
    "is_called",
    "literal_first",
    "resolve_hook_points",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of the parts of a block in one family of transformers.

    Args:
        block: the path of a block, with ``{layer}`` in it.
        attn: the path, inside a block, of the module whose output is the attention's contribution.
        mlp: that of the feed-forward part.
    """

    block: str
    attn: str
    mlp: str


LAYOUTS: Mapping[str, Layout] = {
    "gpt2": Layout("h.{layer}", "attn", "mlp"),
    "llama": Layout("layers.{layer}", "self_attn", "mlp"),
    "bert": Layout("encoder.layer.{layer}", "attention.output.dense", "output.dense"),
    "nanochat": Layout("transformer.h.{layer}", "attn", "mlp"),
}
"""Layouts by name; a user's own may be handed in instead."""

# hook name -> which part of the block, and which side of it
_PARTS: Mapping[str, tuple[str, Literal["fwd", "fwd_pre"]]] = {
    "hook_resid_pre": ("", "fwd_pre"),
    "hook_resid_post": ("", "fwd"),
    "hook_attn_out": ("attn", "fwd"),
    "attn": ("attn", "fwd"),
    "hook_mlp_out": ("mlp", "fwd"),
    "mlp": ("mlp", "fwd"),
}
_NAME = regex.compile(r"blocks\.(?P<layer>\d+)\.(?P<part>[\w.]+)")


@dataclass(frozen=True, slots=True)
class HookSite:
    """A hook point, resolved in one model."""

    name: str
    """As the user wrote it, or the path where a pattern was given."""
    path: str
    direction: Literal["fwd", "fwd_pre"]


def find_layout(model: nn.Module) -> tuple[str, Layout] | None:
    """The prefix and layout of a model, if its blocks are where a known family has them; otherwise None.

    The attention and feed-forward parts must be there as well, so that one family is not taken for another.
    """
    paths = [path for path, _ in walk(model)]
    for layout in LAYOUTS.values():
        found = _prefix(layout, paths)
        if found is not None:
            return found, layout
    return None


def _prefix(layout: Layout, paths: Sequence[str]) -> str | None:
    there, block = set(paths), layout.block.format(layer=0)
    for path in sorted((each for each in paths if f".{each}".endswith(f".{block}")), key=len):
        if f"{path}.{layout.attn}" in there and f"{path}.{layout.mlp}" in there:
            return path[: len(path) - len(block)]
    return None


def resolve_hook_points(
    model: nn.Module, hook_points: str | Sequence[str], *, layout: Layout | str | None = None
) -> tuple[HookSite, ...]:
    """Resolve hook points to sites of a model.

    Args:
        model: any module; TransformerLens-style names need one of a known layout.
        hook_points: ``"blocks.3.hook_resid_pre"`` (the block's *input*), ``hook_resid_post``, ``hook_attn_out`` (or
            ``attn``), ``hook_mlp_out`` (or ``mlp``); otherwise paths, or regexes on whole paths.
        layout: a name in :data:`LAYOUTS`, or a :class:`Layout`; by default the one that fits.

    Raises:
        SelectionError: the model has no such hook point; the message lists the nearest names.
    """
    names = [hook_points] if isinstance(hook_points, str) else list(hook_points)
    if not names:
        raise SelectionError("no hook point was given", selector=hook_points)
    paths = [path for path, _ in walk(model)]
    sites: dict[tuple[str, str], HookSite] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match and match["part"] in _PARTS and name not in paths:
            found = [_named(model, name, match, layout, paths)]
        else:
            found = [HookSite(path, path, "fwd") for path in _literal_or_pattern(model, name, paths)]
        for site in found:
            sites.setdefault((site.name, site.direction), site)
    return tuple(sites.values())


def _literal_or_pattern(model: nn.Module, name: str, paths: Sequence[str]) -> Sequence[str]:
    return [name] if name in paths else select(model, name).paths


def _named(
    model: nn.Module, name: str, match: regex.Match[str], layout: Layout | str | None, paths: Sequence[str]
) -> HookSite:
    prefix, known = _layout_of(model, name, layout, paths)
    part, direction = _PARTS[match["part"]]
    block = prefix + known.block.format(layer=int(match["layer"]))
    inner = {"": "", "attn": f".{known.attn}", "mlp": f".{known.mlp}"}[part]
    if block + inner not in paths:
        near = near_misses(regex.escape(block + inner), paths)
        hint = f"; did you mean a name for {listed(near)}?" if near else ""
        raise SelectionError(
            f"hook point {name!r} means {block + inner!r}, which {type(model).__name__} does not have{hint}",
            selector=name,
            near=near,
        )
    return HookSite(name, block + inner, direction)


def _layout_of(model: nn.Module, name: str, layout: Layout | str | None, paths: Sequence[str]) -> tuple[str, Layout]:
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise SelectionError(f"layout is one of {listed(list(LAYOUTS))}, or a Layout; got {layout!r}")
        layout = LAYOUTS[layout]
    found = find_layout(model) if layout is None else (_prefix(layout, paths) or "", layout)
    if found is None:
        raise SelectionError(
            f"hook point {name!r} needs a model of a known layout ({listed(list(LAYOUTS))}), which "
            f"{type(model).__name__} is not; give layout=Layout(block=..., attn=..., "
            "mlp=...), or a path or regex instead of the name",
            selector=name,
        )
    return found


def is_called(path: str, module: nn.Module) -> bool:
    """Whether a module has a forward; ``ModuleList`` and ``ModuleDict`` have none."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict)


def literal_first(model: nn.Module, layers: Selector) -> Selector:
    """A selector in which a string that is a module's path means only that module.

    Raises:
        SelectionError: one of several matches nothing, which a union would ignore.
    """
    if isinstance(layers, str):
        return literal_first(model, [layers])
    if not isinstance(layers, Sequence):
        return layers
    there = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for each in layers:
        if not isinstance(each, str) or each not in there:
            try:
                select(model, each)
            except SelectionError as error:
                raise SelectionError(f"layer {each!r} not found: {error}", selector=each, near=error.near) from None
    return [Exactly(each) if isinstance(each, str) and each in there else each for each in layers]


class Exactly:
    """The predicate for one path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"exactly {self.path!r}"

    def __call__(self, path: str, module: nn.Module) -> bool:
        """Whether ``path`` is this path."""
        return path == self.path
