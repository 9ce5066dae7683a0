"""The interface of nanochat's collector: rows of many batches, within one budget for all hook points.

One budget per hook point would let the hook points keep different rows, which could then not be compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from tdcache.caching import ActivationCaching
from tdcache.compat.activation_files import SUFFIXES, load_activations, save_activations
from tdcache.compat.hook_names import Exactly, HookSite, Layout, resolve_hook_points
from tdcache.errors import CaptureError, ContextError, SelectionError, listed
from tdcache.harvesting.calling import Inputs, as_evaluated, call_model, model_device, to_device
from tdcache.harvesting.progress import Progress
from tdcache.harvesting.source import length_of
from tdcache.hooks import port_at
from tdcache.reducers import Concatenate

__all__ = ["ActivationCollector", "collect_activations_from_dataloader"]


def _file_in(path: Path) -> Path:
    return path if path.suffix in SUFFIXES else path / "activations.safetensors"


class _SiteRows:
    """The callback at one hook point, and the rows that it has kept.

    Args:
        site: the hook point.
        max_rows: how many rows are kept at most, exactly.
        device: where they are kept.
    """

    def __init__(self, site: HookSite, max_rows: int, device: torch.device | str) -> None:
        self.site = site
        self.kept = Concatenate(max_rows=max_rows)
        self.seen = 0
        """Rows so far, those beyond the budget as well."""
        self._max_rows = max_rows
        self._device = device

    def __repr__(self) -> str:
        return f"{self.kept.rows:,} rows of {self.site.name!r}"

    def __call__(self, *, module: nn.Module, key: Any, **hooked: Any) -> Tensor:
        """Keep the output, or, as a pre-hook, the first tensor among the arguments, positional ones first."""
        port = port_at(self.site.path, "fwd" if "output" in hooked else "fwd_pre")
        self.take(port.read(module, hooked["args"], hooked["output"] if "output" in hooked else hooked["kwargs"]))
        return torch.empty(0)

    def take(self, value: Tensor) -> None:
        """Copy the rows of ``(batch, features)`` or ``(batch, tokens, features)``, within the budget.

        Raises:
            CaptureError: the value has another shape, so that it is not known what its rows are.
        """
        if not 2 <= value.dim() <= 3:
            name, shape = self.site.name, tuple(value.shape)
            more = "put an nn.Flatten behind it and collect that one's output, or " if value.dim() > 3 else ""
            raise CaptureError(
                f"{name!r} gives values of shape {shape}; rows are made of (batch, features) or (batch, tokens, "
                f"features): {more}use tdcache.harvest, which stores each sample's value in its own shape",
                paths=(name,),
            )
        rows = value.detach().flatten(0, -2)
        self.kept.update(rows.to(self._device))
        self.seen += len(rows)

    def clear(self) -> None:
        """Drop all rows and reset the count."""
        self.kept = Concatenate(max_rows=self._max_rows)
        self.seen = 0


class ActivationCollector:
    """A context manager that keeps rows of activations over many batches, within one budget for all hook points.

    ``(batch, tokens, features)`` becomes ``(batch * tokens, features)``; values of more dimensions are refused. All
    hook points hold the same rows; it is an error if one saw a different number of rows. Values are copied once, to
    their final device.

    Args:
        model: any module.
        hook_points: paths, regexes on paths, or TransformerLens-style names; see
            :func:`tdcache.harvesting.resolve_hook_points`.
        max_activations: how many rows are kept at most, exactly.
        device: where rows are kept.
        save_path: a file, or a folder in which ``activations.safetensors`` is written.
        layout: where the blocks of the model are, if its layout is not a known one.
    """

    def __init__(
        self,
        model: nn.Module,
        hook_points: str | Sequence[str],
        max_activations: int = 10_000_000,
        device: torch.device | str = "cpu",
        save_path: str | os.PathLike[str] | None = None,
        *,
        layout: Layout | str | None = None,
    ) -> None:
        if max_activations < 1:
            raise SelectionError(f"max_activations is at least 1, got {max_activations}", selector=max_activations)
        self.model = model
        self.max_activations = max_activations
        self.save_path = None if save_path is None else Path(save_path)
        self._sites = resolve_hook_points(model, hook_points, layout=layout)
        self._rows = {site.name: _SiteRows(site, max_activations, device) for site in self._sites}
        self._undo: ExitStack | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({listed(self.hook_points)}, {self.rows:,} of {self.max_activations:,} rows)"

    @property
    def hook_points(self) -> list[str]:
        """The names, one for each place."""
        return [site.name for site in self._sites]

    @property
    def rows(self) -> int:
        """The number of rows, the same at every hook point."""
        return min(self.counts.values())

    @property
    def full(self) -> bool:
        """Whether the budget is used up."""
        return self.rows >= self.max_activations

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows by hook point."""
        return {name: rows.kept.rows for name, rows in self._rows.items()}

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise ContextError("this collector is open already")
        with ExitStack() as undo:
            for site in self._sites:
                direction = "fwd" if site.direction == "fwd" else "fwd_pre_kwargs"  # a block may be called by keyword
                options: dict[str, Any] = {"callback": self._rows[site.name], "directions": [direction]}
                undo.enter_context(ActivationCaching(Exactly(site.path), **options).prepare(self.model))
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.__exit__(kind, error, traceback)
        if kind is None:
            self._check_aligned()

    def take(self, name: str, value: Tensor) -> None:
        """Keep the rows of one value, within the budget."""
        self._rows[name].take(value)

    def _check_aligned(self) -> None:
        seen = {name: rows.seen for name, rows in self._rows.items()}  # counts are equal once the budget is used up
        if len(set(seen.values())) > 1:
            raise CaptureError(
                f"the hook points saw different numbers of rows, which therefore do not belong together: {seen}; "
                "collect them one by one",
                paths=tuple(seen),
            )

    def get_activations(self, hook_point: str | None = None) -> dict[str, Tensor]:
        """The rows ``(rows, features)``, by hook point, or of one hook point.

        Raises:
            SelectionError: no such hook point.
            CaptureError: no forward has run yet, or the hook points' rows do not belong together.
        """
        if hook_point is not None and hook_point not in self.counts:
            raise SelectionError(f"there is no hook point {hook_point!r}; there are {listed(list(self.counts))}")
        self._check_aligned()
        names = self.counts if hook_point is None else [hook_point]
        return {name: self._rows[name].kept.compute() for name in names}

    def clear(self) -> None:
        """Drop the rows of all sites."""
        for rows in self._rows.values():
            rows.clear()

    def save_activations(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write all rows to one file; see :func:`tdcache.harvesting.save_activations`."""
        target = self._file(path)
        return save_activations(self.get_activations(), target)

    @staticmethod
    def load_activations(path: str | os.PathLike[str], hook_points: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Load what :meth:`save_activations` wrote to a file or folder, for all hook points or some.

        Raises:
            SelectionError: the file has no such hook point.
            StoreError: no such file.
        """
        found = load_activations(_file_in(Path(path)))
        missing = [name for name in hook_points or () if name not in found]
        if missing:
            raise SelectionError(f"{path} has no hook point {missing[0]!r}; there are {listed(list(found))}")
        return {name: found[name] for name in (found if hook_points is None else hook_points)}

    def _file(self, path: str | os.PathLike[str] | None) -> Path:
        chosen = self.save_path if path is None else Path(path)
        if chosen is None:
            raise SelectionError("say where: give a path, or save_path= to the collector")
        return _file_in(chosen)


def collect_activations_from_dataloader(
    model: nn.Module,
    dataloader: Iterable[Any],
    hook_points: str | Sequence[str],
    max_activations: int = 10_000_000,
    device: torch.device | str = "cpu",
    save_path: str | os.PathLike[str] | None = None,
    verbose: bool = True,
    *,
    layout: Layout | str | None = None,
) -> dict[str, Tensor]:
    """Run batches until the budget is used up; returns the rows of every hook point.

    Args:
        model: any module; run without gradients in eval mode, and left as it was.
        dataloader: batches: tensors, tuples or lists that begin with the inputs, or mappings (``"input_ids"``, or
            keyword arguments that the model takes).
        hook_points: see :class:`ActivationCollector`.
        max_activations: how many rows are kept at most, exactly.
        device: where rows are kept.
        save_path: a file to write them to in addition.
        verbose: print rows per second and the time left to the standard error stream.
        layout: see :class:`ActivationCollector`.
    """
    collector = ActivationCollector(model, hook_points, max_activations, device, save_path, layout=layout)
    inputs, home, batches = Inputs.of(model), model_device(model), length_of(dataloader)
    with as_evaluated(model), torch.no_grad(), Progress(shown=verbose, total=max_activations) as progress, collector:
        for batch in dataloader:
            before = collector.rows
            call_model(model, to_device(batch, home), inputs)
            if before == 0 and batches is not None:
                progress.expect(min(max_activations, batches * collector.rows))
            progress.add(collector.rows - before)
            if collector.full:
                break
    if collector.rows == 0:
        raise SelectionError("the data holds no batch, so there is nothing to collect")
    if save_path is not None:
        collector.save_activations()
    return collector.get_activations()
