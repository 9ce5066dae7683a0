"""Pictures of scores from a TensorDict: heat maps, coloured tokens, layer by position maps, edge graphs.

All of them share one colour convention, so that pictures can be compared: positive scores are red, negative ones blue,
zero is white, and the range is symmetric about zero. NaN is a missing score; it is grey and does not affect the range.

matplotlib is imported when a picture is drawn: ``pip install tdcache[plot]``. Every function returns what it drew on,
and does not show, save or close anything. Text is drawn literally, ``$`` included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.public_names import MissingName

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar

__all__ = ["color_bar", "edge_graph", "image_maps", "layer_map", "token_html", "tokens"]

_COLORS = "RdBu_r"
_MISSING = "0.75"  # a grey of matplotlib's that does not occur in the colour map


def color_bar(axes: Axes | Sequence[Axes], *, limit: float, label: str | None = None) -> Colorbar:
    """A colour bar beside one picture or several, with signed ticks.

    Args:
        axes: what it stands beside, such as the axes of several :func:`tokens` with one ``limit``.
        limit: the score of the deepest colour.
        label: what the colours mean, with the unit.

    Returns:
        matplotlib's colour bar.

    Example:
        >>> words, scores = [["good", "film"], ["bad", "film"]], [torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 0.5])]
        >>> import matplotlib.pyplot as plt
        >>> figure, lines = plt.subplots(2, 1, layout="constrained")
        >>> for line, *each in zip(lines, words, scores):
        ...     axes = tokens(*each, axes=line, limit=2.0)
        >>> bar = color_bar(list(lines), limit=2.0, label="added to the logit")
        >>> plt.close(figure)
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels: list[Any] = [*axes] if isinstance(axes, Sequence) else [axes]
    colors = ScalarMappable(Normalize(-limit, limit), _colors())
    bar: Colorbar = panels[0].figure.colorbar(colors, ax=panels, aspect=30, format=_signed, label=label)
    outline: Any = bar.outline
    outline.set_visible(False)
    return bar


def image_maps(
    images: Tensor,
    scores: Mapping[str, Tensor] | TensorDictBase,
    *,
    titles: Sequence[str] | None = None,
    label: str | None = None,
) -> Any:
    """Images in the first column and their scores in the others, one row per image.

    Every map has its own range, from minus to plus its largest score, since methods differ in scale.

    Args:
        images: ``(rows, channels, height, width)`` or ``(rows, height, width)``.
        scores: per column title, scores of the same rows; channels are summed, and smaller maps are enlarged.
        titles: a label for each row, at its left.
        label: what the colours mean; with it a colour bar is drawn, from -1 to +1 of each map's largest score.

    Returns:
        The figure.

    Raises:
        ValueError: images, scores and titles differ in number.
    """
    import matplotlib.pyplot as plt

    for name, values in (*scores.items(), *([("titles", titles)] if titles is not None else [])):
        _same_number(f"{name!r}", len(values), "rows", len(images), "images")
    rows, columns = len(images), 1 + len(list(scores.keys()))
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(1.8 * columns + (0.6 if label is None else 1.8), 1.7 * rows + 0.4),
        squeeze=False,
        layout="compressed",
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
    if label is not None:
        color_bar(list(panels.flat), limit=1.0, label=label)
    return figure


def _flat(image: Any, *, mean: bool = False) -> Tensor:
    image = image.detach().float().cpu()
    flat: Tensor = image if image.ndim < 3 else image.mean(0) if mean else image.sum(0)
    return flat


def _limit(values: Tensor) -> float:
    """The score of the deepest colour: the largest finite magnitude, or 1 if there is none."""
    sizes = values[values.isfinite()].abs()
    return (sizes.max().item() if len(sizes) else 0.0) or 1.0


def _shown(values: Tensor) -> tuple[Any, float]:
    """The values as an array, and the limit; infinite ones are clamped to it, since matplotlib would mask them."""
    limit = _limit(values)
    return values.clamp(-limit, limit).numpy(), limit


def _colors() -> Any:
    import matplotlib.pyplot as plt

    return plt.get_cmap(_COLORS).with_extremes(bad=_MISSING)


def _color(share: float) -> Any:
    """The colour of a score that is ``share`` of the limit."""
    return _MISSING if isnan(share) else _colors()(0.5 + 0.5 * max(-1.0, min(1.0, share)))


def _same_number(subject: str, found: int, things: str, expected: int, others: str) -> None:
    if found != expected:
        raise ValueError(f"{subject} has {found} {things} for {expected} {others}; give one of each, in the same order")


def tokens(words: Sequence[str], scores: Tensor, *, axes: Axes | None = None, limit: float | None = None) -> Axes:
    """Words in a line, each on the colour of its score.

    Lines that are compared with each other need the same ``limit``; :func:`color_bar` shows the range.

    Args:
        words: the tokens.
        scores: one score per token, ``(tokens,)``.
        axes: where to draw; a new figure by default.
        limit: the score of the deepest colour; by default the largest finite magnitude.

    Returns:
        The axes.

    Raises:
        ValueError: the number of scores is not the number of words.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    values = _checked(words, scores)
    limit = limit or _limit(scores)
    if axes is None:
        _, axes = plt.subplots(figsize=(0.12 * sum(len(word) + 2 for word in words) + 0.5, 0.6), layout="constrained")
    at = 0.0
    for word, value in zip(words, values, strict=True):
        share = value / limit
        width = len(word) + 1.4
        axes.add_patch(Rectangle((at, 0), width - 0.2, 1, color=_color(share)))
        ink = "white" if abs(share) > 0.65 else "black"
        place: Any = {"ha": "center", "va": "center", "color": ink, "family": "monospace", "fontsize": 11}
        axes.text(at + width / 2 - 0.1, 0.5, word, parse_math=False, **place)
        at += width
    axes.set(xlim=(-0.2, at), ylim=(-0.05, 1.05))
    axes.set_axis_off()
    return axes


def token_html(words: Sequence[str], scores: Tensor, *, limit: float | None = None) -> str:
    """:func:`tokens` as HTML for a notebook or a page; does not need matplotlib.

    Each word is a ``span`` that shows its score as a tooltip. In a notebook: ``IPython.display.HTML(token_html(...))``.

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
    scores: Mapping[Any, Tensor] | TensorDictBase,
    *,
    words: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Layers from bottom to top, positions from left to right, with a colour bar.

    Args:
        scores: per layer, one score per position ``(positions,)``; a TensorDict such as ``td["attr"]`` of one row, or a
            mapping with keys of any type. Tuples and nested keys of a TensorDict are joined by dots.
        words: the tokens, as labels of the positions.
        labels: the labels of the layers; the keys by default.
        axes: where to draw; a new figure by default.
        label: what the colours mean, as the label of the colour bar.

    Returns:
        The axes.

    Raises:
        ValueError: no mapping, a layer without one score per position, or words or labels are too many or too few.
    """
    import matplotlib.pyplot as plt

    if not isinstance(scores, Mapping | TensorDictBase):
        raise ValueError(
            f"a layer map needs scores by layer, such as td['attr'] of one row, got a {type(scores).__name__}"
        )
    leaves: Any = scores.items(True, True) if isinstance(scores, TensorDictBase) else scores.items()
    names, rows = [], []
    for key, value in leaves:
        names.append(".".join(map(str, key)) if isinstance(key, tuple) else str(key))
        rows.append(value.detach().float().cpu())
    shapes = list(dict.fromkeys(tuple(row.shape) for row in rows))
    if len(shapes) != 1 or len(shapes[0]) != 1:
        got = " and ".join(map(str, shapes)) or "no layers"
        raise ValueError(f"a layer map needs one score per position, as many in every layer; got {got}")
    values = torch.stack(rows)
    if words is not None:
        _same_number("words=", len(words), "words", values.shape[1], "positions")
    if labels is not None:
        _same_number("labels=", len(labels), "labels", len(names), "layers")
    if axes is None:
        _, axes = plt.subplots(figsize=(0.5 * values.shape[1] + 2, 0.32 * len(names) + 1), layout="constrained")
    shown, limit = _shown(values)
    axes.pcolormesh(shown, cmap=_colors(), vmin=-limit, vmax=limit, edgecolors="white", linewidth=1)
    axes.set_yticks([at + 0.5 for at in range(len(names))], labels or names, parse_math=False)
    _name_positions(axes, values.shape[1], words)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    color_bar(axes, limit=limit, label=label)
    return axes


def _name_positions(axes: Axes, number: int, words: Sequence[str] | None) -> None:
    """Label the columns at their centres: with words, or with at most a dozen of their numbers."""
    if words is None:
        shown = range(0, number, -(-number // 12) or 1)
        axes.set_xticks([at + 0.5 for at in shown], [str(at) for at in shown])
        axes.set_xlabel("position")
        return
    slanted: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks([at + 0.5 for at in range(number)], words, parse_math=False, **slanted)


def _signed(value: float, _: int | None = None) -> str:
    """A tick of a colour bar with its sign."""
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def edge_graph(
    edges: Mapping[str, Mapping[str, float]] | TensorDictBase,
    *,
    order: Sequence[str],
    threshold: float = 0.0,
    labels: Mapping[str, str] | None = None,
    axes: Axes | None = None,
    label: str | None = None,
) -> Axes:
    """Edges from writers to readers, from bottom to top; width and colour show the score.

    Args:
        edges: ``edges[writer][reader]``, scalars; a TensorDict such as ``td["attr"].mean(0)``.
        order: the rows of nodes, from the bottom; each entry is a path, or several side by side, joined by ``"|"``.
        threshold: edges up to this magnitude are left out, as are nodes without edges.
        labels: the names of nodes; their paths by default.
        axes: where to draw; a new figure by default.
        label: what the colours mean; with it a colour bar is drawn.

    Returns:
        The axes.

    Raises:
        ValueError: ``order`` lacks a node that has an edge.
    """
    import matplotlib.pyplot as plt

    writers: Any = edges.items()
    found = {
        (writer, reader): float(value)
        for writer, each in writers
        for reader, value in each.items()
        if not abs(float(value)) <= threshold  # NaN is drawn as well
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
    if label is not None:
        color_bar(axes, limit=limit, label=label)
    return axes


def _places(order: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The coordinates of each node: rows from the bottom, the nodes of a row side by side."""
    return {
        name: (at - (len(row.split("|")) - 1) / 2, float(height))
        for height, row in enumerate(order)
        for at, name in enumerate(row.split("|"))
    }


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], share: float) -> None:
    from matplotlib.patches import FancyArrowPatch

    rows = end[1] - start[1]
    side = 1 if start[0] + end[0] < 0 else -1
    gap = 16 if start[0] == end[0] else 24  # the boxes of nodes are wider than high
    arrow = FancyArrowPatch(
        start, end, connectionstyle=f"arc3,rad={0.0 if rows <= 1 else -0.22 * side}", arrowstyle="-|>",
        mutation_scale=11, shrinkA=gap, shrinkB=gap, linewidth=1.0 if isnan(share) else 0.6 + 5 * min(1.0, abs(share)),
        color=_color(share),
    )  # fmt: skip
    axes.add_patch(arrow)


__getattr__ = MissingName(__name__)
