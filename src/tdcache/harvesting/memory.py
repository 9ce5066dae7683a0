"""Activations of a data set in memory: the latest of a model, or the rows of many batches."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tdcache.caching import ActivationCaching
from tdcache.errors import CaptureError, ContextError, SelectionError, UnfiredSiteWarning, listed
from tdcache.harvesting.calling import Inputs, as_evaluated, call_model, model_device, to_device
from tdcache.harvesting.capture import Capture
from tdcache.harvesting.names import Exactly, Layout, is_called, literal_first, resolve_hook_points
from tdcache.harvesting.progress import Progress
from tdcache.harvesting.saved import SUFFIXES, load_activations, save_activations
from tdcache.harvesting.site_rows import SiteRows
from tdcache.harvesting.source import length_of
from tdcache.hooks.values import first_tensor
from tdcache.modules import HookedModule
from tdcache.reducers import Concatenate
from tdcache.selection import select
from tdcache.types import Selector

__all__ = ["ActivationCollector", "ActivationStore", "collect_activations_from_dataloader", "extract_representations"]


class ActivationStore:
    """The latest activations of some modules, as copies on the CPU, while it is enabled. Also a context manager.

    Args:
        model: any module.
        layers: paths, or any selector; every module that is called by default.
        device: where copies are kept.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with ActivationStore(model, ["0"]) as store:
        ...     _ = model(torch.randn(4, 2))
        >>> store.get("0").shape
        torch.Size([4, 3])
    """

    def __init__(self, model: nn.Module, layers: Selector | None = None, *, device: torch.device | str = "cpu") -> None:
        self._model = model
        self._layers = layers
        self._device = device
        self._hooks: list[HookedModule] = []
        self._dropped = weakref.finalize(self, _restore_all, self._hooks)
        self._every = _FirstIfAny() if layers is None else None
        self._cache: Any = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self._model).__name__}, {'enabled' if self.enabled else 'disabled'})"

    @property
    def enabled(self) -> bool:
        """Whether activations are kept now."""
        return bool(self._hooks)

    @property
    def layer_names(self) -> list[str]:
        """The paths.

        Raises:
            SelectionError: a name that no module has; the nearest are named.
        """
        return list(select(self._model, self._selector()).paths)

    def _selector(self) -> Selector:
        return is_called if self._layers is None else literal_first(self._model, self._layers)

    @property
    def activations(self) -> dict[str, Tensor]:
        """The latest activations by path."""
        for hooked in self._hooks:
            self._cache = hooked.cache
        without = self._every.without if self._every is not None else ()
        return {path: value for path, value in self._cache.items() if path not in without}

    def get(self, name: str) -> Tensor | None:
        """The latest activation at a path; None where there is none."""
        return self.activations.get(name)

    def enable(self) -> None:
        """Start keeping; if that fails, the model is as it was. When it is enabled already, nothing happens.

        Raises:
            SelectionError: a name that no module has; the nearest are named.
        """
        if not self._hooks:
            factory = ActivationCaching(self._selector(), callback=self._every, hold="snapshot", device=self._device)
            self._hooks.append(factory.prepare(self._model).open())

    def disable(self) -> None:
        """Stop keeping, and take every hook off the model; what was kept stays."""
        while self._hooks:
            hooked = self._hooks.pop()
            try:
                self._cache = hooked.cache
            finally:
                with warnings.catch_warnings():
                    if self._every is not None:
                        warnings.simplefilter("ignore", UnfiredSiteWarning)  # nobody asked for these modules by name
                    hooked.restore()

    def clear(self) -> None:
        """Forget what was kept."""
        for hooked in self._hooks:
            hooked.hooking_context.clear()
        self._cache = {}

    def __enter__(self) -> Self:
        self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()


def _restore_all(hooks: list[HookedModule]) -> None:
    """Take the hooks of a store that nobody has any more off the model."""
    while hooks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnfiredSiteWarning)  # nobody is left who would read it
            hooks.pop().restore()


class _FirstIfAny:
    """The callback where nobody named the layers: the first tensor of an output; what has none is passed over."""

    def __init__(self) -> None:
        self.without: set[str] = set()
        """The paths whose latest output holds no tensor."""

    def __call__(self, *, module: nn.Module, output: Any, key: str, **_: Any) -> Tensor:
        out_keys: Any = getattr(module, "out_keys", None)
        if isinstance(output, TensorDictBase) and out_keys:
            output = output.get(out_keys[0])
        found = first_tensor(output)
        if found is None:
            self.without.add(key)
            return torch.empty(0)
        self.without.discard(key)
        return found


def extract_representations(
    model: nn.Module,
    dataset: Any,
    layers: Selector,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    max_samples: int | None = None,
) -> dict[str, Tensor]:
    """What some layers make of a dataset: one tensor per path, samples along the first dimension, on the CPU.

    The model is run without gradients in eval mode; every module's own flag is put back. Rows are written where they
    stay, so that the peak is the result and one batch.

    Args:
        model: any module.
        dataset: samples; mappings of tensors, tuples that begin with the inputs, or tensors.
        layers: paths, or any selector.
        device: where batches are moved; by default where the model is.
        batch_size: samples per batch.
        max_samples: the most samples; no batch beyond them is run.

    Raises:
        SelectionError: a layer that is not there, no samples, or none asked for.
        CaptureError: shapes that differ between batches, as where samples are padded per batch.
    """
    if max_samples is not None and max_samples < 1:
        raise SelectionError(f"max_samples is at least 1, got {max_samples}", selector=max_samples)
    if len(dataset) == 0:
        raise SelectionError("the dataset holds no sample, so there is nothing to extract")
    capture = Capture(model, literal_first(model, layers), device=device, stop_early=True)
    gathered: dict[str, Concatenate] = {}
    total = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    with capture.open() as hooked:
        for number, batch in enumerate(DataLoader(dataset, batch_size=batch_size, shuffle=False)):
            if number * batch_size >= total:
                break
            for path, value in capture.run(hooked, batch, None).items():
                gathered.setdefault(path, Concatenate(max_rows=total)).update(value)
    return {path: reducer.compute() for path, reducer in gathered.items()}


def _file_in(path: Path) -> Path:
    return path if path.suffix in SUFFIXES else path / "activations.safetensors"


class ActivationCollector:
    """Rows of activations over many batches, within one budget for all hook points. A context manager.

    ``(batch, tokens, features)`` becomes ``(batch * tokens, features)``; values of more dimensions are refused. All
    hook points hold the same rows: one that saw another number of rows, kept or not, is an error. Values are copied
    when they are seen, straight to where they stay.

    Args:
        model: any module.
        hook_points: paths, regexes on paths, or TransformerLens-style names; see
            :func:`tdcache.harvesting.resolve_hook_points`.
        max_activations: the most rows, exactly.
        device: where rows are kept.
        save_path: a file, or a folder in which ``activations.safetensors`` is written.
        layout: where the model has its blocks, if that is not found out.
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
        self._rows = {site.name: SiteRows(site, max_activations, device) for site in self._sites}
        self._undo: ExitStack | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({listed(self.hook_points)}, {self.rows:,} of {self.max_activations:,} rows)"

    @property
    def hook_points(self) -> list[str]:
        """The names, one for each place."""
        return [site.name for site in self._sites]

    @property
    def rows(self) -> int:
        """How many rows there are, the same at every hook point."""
        return min(self.counts.values())

    @property
    def full(self) -> bool:
        """Whether the budget is used up."""
        return self.rows >= self.max_activations

    @property
    def counts(self) -> dict[str, int]:
        """Rows by hook point."""
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
        seen = {name: rows.seen for name, rows in self._rows.items()}  # counts are alike once the budget is used up
        if len(set(seen.values())) > 1:
            raise CaptureError(
                f"the hook points saw different numbers of rows, which therefore do not belong together: {seen}; "
                "collect them one by one",
                paths=tuple(seen),
            )

    def get_activations(self, hook_point: str | None = None) -> dict[str, Tensor]:
        """The rows ``(rows, features)`` by hook point: of all, or of one alone.

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
        """Forget all rows."""
        for rows in self._rows.values():
            rows.clear()

    def save_activations(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write all rows to one file; see :func:`tdcache.harvesting.save_activations`."""
        target = self._file(path)
        return save_activations(self.get_activations(), target)

    @staticmethod
    def load_activations(path: str | os.PathLike[str], hook_points: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What :meth:`save_activations` wrote to a file or folder, names as they were; of all hook points or of some.

        Raises:
            SelectionError: a hook point that is not there.
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
    """Run batches until the budget is met, and give the rows of every hook point.

    Args:
        model: any module; run without gradients in eval mode, and left as it was.
        dataloader: batches: tensors, tuples or lists that begin with the inputs, or mappings (``"input_ids"``, or
            keyword arguments that the model takes).
        hook_points: see :class:`ActivationCollector`.
        max_activations: the most rows, exactly.
        device: where rows are kept.
        save_path: where they are written as well.
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
