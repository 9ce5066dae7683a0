"""Edge attribution patching: what one module's output does through one other module's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tdcache.attribution.base import RoleAttribution, Work
from tdcache.attribution.frame import Frame, nothing
from tdcache.attribution.gradients import Seen, key_of
from tdcache.attribution.integrated import WeightedSum, WeightedTerm
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, Between, Point, wide
from tdcache.attribution.quadrature import quadrature
from tdcache.errors import AttributionError
from tdcache.types import Match, Selector

__all__ = ["EdgeAttributionPatching"]


class EdgeAttributionPatching(RoleAttribution):
    """Scores of the edges between writers to a residual stream and its readers (Syed et al. 2023, arXiv:2310.10348).

    ``score(u, v) = sum_d (A'[u] - A[u]) * G[in_v]``: the change of writer ``u``'s output times the gradient at reader
    ``v``'s own input. One forward of both inputs and one backward give all edges; with ``n_steps`` the gradient is
    averaged along the path from the counterfactual to the input (EAP-IG, Hanna et al. 2024, arXiv:2403.17806). Where
    the readers are all that reads the stream, the edges of a writer sum to its node score.

    Scores are ``data["attr", writer, reader]``, of shape ``(batch,)``, for every writer that ran before the reader; the
    sign is that of :class:`AttributionPatching`.

    Args:
        writers: modules whose outputs are added to the stream: embeddings, attention and feed-forward outputs.
        readers: modules whose first input is the stream: the norms, or what stands in their place.
        n_steps: points of the path; None for the plain gradient.
        method: ``"left"`` (the paper's) or another rule of :func:`~tdcache.attribution.quadrature.quadrature`.
        embeddings: the modules whose outputs the path interpolates, where the inputs are integers.
        edges: a predicate ``(writer, reader) -> bool`` that leaves edges out.
        sum_positions: sum over positions; otherwise scores have shape ``(batch, position)``.
        match: how patterns are held against paths.
        **options: see :class:`Attribution`.
    """

    def __init__(
        self,
        writers: Selector,
        readers: Selector,
        *,
        n_steps: int | None = None,
        method: str = "left",
        embeddings: Selector | None = None,
        edges: Callable[[str, str], bool] | None = None,
        sum_positions: bool = True,
        match: Match = "full",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        stream = {} if embeddings is None else {"embeddings": embeddings}
        self.select_by(match, writers=writers, readers=readers, **stream)
        self.nodes = None if n_steps is None else quadrature(method, n_steps)
        self.edges = edges
        self.sum_positions = sum_positions

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.selectors['writers']!r}, {self.selectors['readers']!r})"

    def places(self, role: str, paths: Sequence[str]) -> list[Place]:
        """What writers return, and what readers read."""
        return [Place("in" if role == "readers" else "out", path) for path in paths]

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        writers, readers = frame.sites("writers"), frame.sites("readers")
        corrupt = frame.counterfactual()
        stream = frame.sites("embeddings") if "embeddings" in self.selectors else []
        clean, other = Seen([*writers, *stream], with_grads=False), Seen([*writers, *stream], with_grads=False)
        sums = {name: WeightedSum() for name in frame.targets}
        first = [
            frame.ask(frame.base, clean, values=clean.places),
            frame.ask(corrupt, other, values=other.places),
            frame.ask(frame.base, nothing, values=[*writers, *readers]),
        ]
        if self.nodes is None:
            first += self._ask_gradients(frame, sums, [(frame.base, 1.0)], readers)
        yield first
        if self.nodes is not None:
            points = [
                (self._between(frame, corrupt, stream, clean, other, node), weight) for node, weight in self.nodes
            ]
            yield self._ask_gradients(frame, sums, points, readers)
        change = {
            place: wide(other.beside(place, clean.values[place])) - wide(clean.values[place]) for place in writers
        }
        return {
            (*key_of(self.name, name, writer), str(reader.name)): self._score(change[writer], total.sums[reader])
            for name, total in sums.items()
            for writer in writers
            for reader in readers
            if self._is_edge(frame, writer, reader) and reader in total.sums
        }

    def _ask_gradients(
        self, frame: Frame, sums: dict[str | None, WeightedSum], points: list[tuple[Point, float]], readers: list[Place]
    ) -> list[Ask]:
        return [
            frame.ask(point, WeightedTerm(sums[name], weight, readers), target, grads=readers)
            for name, target in frame.targets.items()
            for point, weight in points
        ]

    def _between(
        self, frame: Frame, corrupt: Point, stream: Sequence[Place], clean: Seen, other: Seen, node: float
    ) -> Point:
        """The point ``A' + node * (A - A')``, of the inputs or of the embeddings."""
        if stream:
            ends = {place: other.beside(place, clean.values[place]) for place in stream}
            mixed = Between(ends, clean.values, node)
            return frame.point(("edges", id(self), node), replace=mixed)
        if not frame.inputs():
            raise AttributionError(
                "the inputs are integers, between which there is no path; say with embeddings= which modules' outputs "
                "the path interpolates, e.g. embeddings='transformer.wte'"
            )
        return frame.along(corrupt.inputs, node, ("corrupt",))

    def _is_edge(self, frame: Frame, writer: Place, reader: Place) -> bool:
        source, sink = str(writer.name), str(reader.name)
        if self.edges is not None and not self.edges(source, sink):
            return False
        return frame.runner.ran_before(writer, reader)

    def _score(self, change: Tensor, grad: Tensor) -> Tensor:
        each_row = grad.shape[1:]  # position embeddings are written to every row
        if change.shape not in (grad.shape, each_row, (1, *each_row)):
            raise AttributionError(
                f"a writer gives {tuple(change.shape)} and a reader takes {tuple(grad.shape)}; they share one "
                "stream, so select modules whose outputs are added to what readers get"
            )
        product = (change * grad).sum(-1)
        return product.reshape(product.shape[0], -1).sum(-1) if self.sum_positions and product.ndim > 1 else product
