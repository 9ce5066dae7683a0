"""Pictures of scores, from the TensorDict alone: heat maps, coloured tokens, layer by position maps, edge graphs.

matplotlib is imported when a picture is drawn: ``pip install tdcache[plot]``. Every function returns what it drew on,
and neither shows nor saves nor closes anything. Positive scores are red, negative ones blue, zero is white; NaN is a
missing score, drawn in grey, and has no part in the range of the colours. Text is drawn as it is, ``$`` included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["edge_graph", "image_maps", "layer_map", "token_html", "tokens"]

_COLORS = "RdBu_r"
_MISSING = "0.75"  # matplotlib's grey, which is no colour of the map


def image_maps(
    images: Tensor, scores: Mapping[str, Tensor] | TensorDictBase, *, titles: Sequence[str] | None = None
) -> Any:
    """Images in the first column and their scores in the others, one row per image.

    Args:
        images: ``(rows, channels, height, width)`` or ``(rows, height, width)``.
        scores: per column title, scores of the same rows; channels are summed, and smaller maps are enlarged.
        titles: what stands beside each row.

    Returns:
        The figure.

    Raises:
        ValueError: images, scores and titles are not equally many.
    """
    import matplotlib.pyplot as plt

    for name, values in (*scores.items(), *([("titles", titles)] if titles is not None else [])):
        _same_number(f"{name!r}", len(values), "rows", len(images), "images")
    rows, columns = len(images), 1 + len(list(scores.keys()))
    figure, panels = plt.subplots(
        rows, columns, figsize=(1.7 * columns + 0.6, 1.7 * rows + 0.4), squeeze=False, layout="constrained"
    )
    height, width = images.shape[-2:]
    for row in range(rows):
        panels[row, 0].imshow(_flat(images[row], mean=True).numpy(), cmap="gray_r")
        for column, (name, values) in enumerate(scores.items(), start=1):
            found, limit = _shown(_flat(values[row]))
            panel = panels[row, column]
            panel.imshow(found, cmap=_colors(), vmin=-limit, vmax=limit, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            if row == 0:
                panel.set_title(str(name), fontsize=11, parse_math=False)
        if titles is not None:
            panels[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=11, parse_math=False)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        for side in panel.spines.values():
            side.set_color("0.8")
    return figure


def _flat(image: Any, *, mean: bool = False) -> Tensor:
    image = image.detach().float().cpu()
    flat: Tensor = image if image.ndim < 3 else image.mean(0) if mean else image.sum(0)
    return flat


def _limit(values: Tensor) -> float:
    """The score of the deepest colour: the largest finite size, or 1 where there is none."""
    sizes = values[values.isfinite()].abs()
    return (sizes.max().item() if len(sizes) else 0.0) or 1.0


def _shown(values: Tensor) -> tuple[Any, float]:
    """The values as an array, infinite ones at the limit (matplotlib takes them as missing), and the limit."""
    limit = _limit(values)
    return values.clamp(-limit, limit).numpy(), limit


def _colors() -> Any:
    import matplotlib.pyplot as plt

    return plt.get_cmap(_COLORS).with_extremes(bad=_MISSING)


def _same_number(subject: str, found: int, things: str, expected: int, others: str) -> None:
    if found != expected:
        raise ValueError(f"{subject} has {found} {things} for {expected} {others}; give one of each, in the same order")


def tokens(words: Sequence[str], scores: Tensor, *, axes: Axes | None = None, limit: float | None = None) -> Axes:
    """Words in a line, each on the colour of its score.

    Args:
        words: the tokens.
        scores: one score each, ``(tokens,)``.
        axes: where to draw; a new figure by default.
        limit: the score of the deepest colour; the largest finite one by default.

    Returns:
        The axes.

    Raises:
        ValueError: not one score per word.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    values = _checked(words, scores)
    limit = limit or _limit(scores)
    if axes is None:
        _, axes = plt.subplots(figsize=(0.12 * sum(len(word) + 2 for word in words) + 0.5, 0.6), layout="constrained")
    colors, at = _colors(), 0.0
    for word, value in zip(words, values, strict=True):
        share = value / limit
        width = len(word) + 1.4
        color = _MISSING if isnan(share) else colors(0.5 + 0.42 * max(-1.0, min(1.0, share)))
        axes.add_patch(Rectangle((at, 0), width - 0.2, 1, color=color))
        ink = "white" if abs(share) > 0.75 else "black"
        place: Any = {"ha": "center", "va": "center", "color": ink, "family": "monospace", "fontsize": 11}
        axes.text(at + width / 2 - 0.1, 0.5, word, parse_math=False, **place)
        at += width
    axes.set(xlim=(-0.2, at), ylim=(-0.05, 1.05))
    axes.set_axis_off()
    return axes


def token_html(words: Sequence[str], scores: Tensor, *, limit: float | None = None) -> str:
    """The same as HTML: one ``span`` per word, its score as the title. Needs no matplotlib.

    >>> token_html(["a", "<b>"], torch.tensor([1.0, -0.5]))  # doctest: +ELLIPSIS
    '<span style="background:rgba(202,0,32,1.00)..." title="1">a</span> <span ...title="-0.5">&lt;b&gt;</span>'
    """
    values = _checked(words, scores)
    limit = limit or _limit(scores)
    spans = []
    for word, value in zip(words, values, strict=True):
        missing = isnan(value)
        red_green_blue = "191,191,191" if missing else "202,0,32" if value > 0 else "5,113,176"
        share = 1.0 if missing else min(1.0, abs(value) / limit)
        ink = "#fff" if share > 0.6 and not missing else "#000"
        style = f"background:rgba({red_green_blue},{share:.2f});color:{ink};padding:1px 3px;border-radius:3px"
        spans.append(f'<span style="{style}" title="{value:.3g}">{escape(word)}</span>')
    return " ".join(spans)


def _checked(words: Sequence[str], scores: Tensor) -> list[float]:
    if scores.shape != (len(words),):
        raise ValueError(
            f"{len(words)} words need as many scores, got shape {tuple(scores.shape)}; sum the features first"
        )
    found: list[float] = scores.detach().float().cpu().tolist()
    return found


def layer_map(
    scores: Mapping[str, Tensor] | TensorDictBase,
    *,
    words: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Layers from bottom to top, positions from left to right.

    Args:
        scores: per layer, one score per position ``(positions,)``; a TensorDict such as ``td["attr"]`` of one row, or a
            mapping with keys of any kind. The members of a tuple, and of a nested TensorDict's key, are joined by dots.
        words: the tokens.
        labels: what stands beside the layers; the keys by default.
        axes: where to draw; a new figure by default.

    Returns:
        The axes.

    Raises:
        ValueError: a layer has not one score per position, or words or labels are too many or too few.
    """
    import matplotlib.pyplot as plt

    leaves: Any = scores.items(True, True) if isinstance(scores, TensorDictBase) else scores.items()
    named = {".".join(map(str, key)) if isinstance(key, tuple) else str(key): value for key, value in leaves}
    names, values = list(named), torch.stack([value.detach().float().cpu() for value in named.values()])
    if values.ndim != 2:
        raise ValueError(f"a layer map needs one score per position, got shape {tuple(values.shape[1:])} per layer")
    if words is not None:
        _same_number("words=", len(words), "words", values.shape[1], "positions")
    if labels is not None:
        _same_number("labels=", len(labels), "labels", len(names), "layers")
    if axes is None:
        _, axes = plt.subplots(figsize=(0.5 * values.shape[1] + 2, 0.32 * len(names) + 1), layout="constrained")
    shown, limit = _shown(values)
    mesh = axes.pcolormesh(shown, cmap=_colors(), vmin=-limit, vmax=limit, edgecolors="white", linewidth=1)
    axes.set_yticks([at + 0.5 for at in range(len(names))], labels or names, parse_math=False)
    if words is not None:
        slanted: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks([at + 0.5 for at in range(len(words))], words, parse_math=False, **slanted)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    bar = axes.figure.colorbar(mesh, ax=axes, aspect=30, format=_signed)
    bar.outline.set_visible(False)
    return axes


def _signed(value: float, _: int | None = None) -> str:
    """A tick of a colour bar: its colours mean signs."""
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def edge_graph(
    edges: Mapping[str, Mapping[str, float]] | TensorDictBase,
    *,
    order: Sequence[str],
    threshold: float = 0.0,
    labels: Mapping[str, str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Edges between writers and readers, as wide as their scores are large, from bottom to top.

    Args:
        edges: ``edges[writer][reader]``, scalars; a TensorDict such as ``td["attr"].mean(0)``.
        order: the nodes' rows, from below; each entry is a path, or several joined by ``"|"`` that stand side by side.
        threshold: edges of this size and smaller are left out, and so are nodes without edges.
        labels: what nodes are called; their paths by default.
        axes: where to draw; a new figure by default.

    Returns:
        The axes.
    """
    import matplotlib.pyplot as plt

    writers: Any = edges.items()
    found = {
        (writer, reader): float(value)
        for writer, each in writers
        for reader, value in each.items()
        if not abs(float(value)) <= threshold  # NaN, too, is drawn
    }
    places = _places(order)
    used = {name for edge in found for name in edge}
    if used - places.keys():
        raise ValueError(f"order= has no place for {sorted(used - places.keys())!r}; it has {sorted(places)!r}")
    if axes is None:
        _, axes = plt.subplots(figsize=(6, 0.9 * len(order) + 0.8), layout="constrained")
    limit = _limit(torch.tensor(list(found.values())))
    for (writer, reader), value in sorted(found.items(), key=lambda edge: abs(edge[1])):
        _arrow(axes, places[writer], places[reader], value / limit)
    for name in sorted(used):
        text = labels.get(name, name) if labels else name
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "0.35"}
        axes.text(*places[name], text, ha="center", va="center", fontsize=10, bbox=box, parse_math=False)
    width = max((abs(x) for x, _ in places.values()), default=0.0) + 0.8
    axes.set(xlim=(-width, width), ylim=(-0.4, len(order) - 0.6))
    axes.set_axis_off()
    return axes


def _places(order: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Where each node stands: rows from below, the nodes of a row side by side."""
    return {
        name: (at - (len(row.split("|")) - 1) / 2, float(height))
        for height, row in enumerate(order)
        for at, name in enumerate(row.split("|"))
    }


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], share: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    rows = end[1] - start[1]
    side = 1 if start[0] + end[0] < 0 else -1
    arrow = FancyArrowPatch(
        start, end, connectionstyle=f"arc3,rad={0.0 if rows <= 1 else -0.22 * side}", arrowstyle="-|>",
        mutation_scale=11, shrinkA=16, shrinkB=16, linewidth=1.0 if isnan(share) else 0.6 + 5 * min(1.0, abs(share)),
        color=_MISSING if isnan(share) else _colors()(0.5 + 0.45 * max(-1.0, min(1.0, share))),
    )  # fmt: skip
    axes.add_patch(arrow)
