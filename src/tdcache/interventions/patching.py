"""Activation patching: pastes values of one run into another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Unpack

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.current_call import CurrentCall
from tdcache.errors import EditError
from tdcache.function_calls.sites import at_call
from tdcache.hooks import MultiHookHandle
from tdcache.interventions.base import Intervention, InterventionContext, entry_of, with_inputs_of, write_outputs
from tdcache.interventions.edit_tap import Edit, RegionEdit
from tdcache.interventions.memory import Memory
from tdcache.interventions.options import EditKeywords, WhereKeywords
from tdcache.interventions.random_state import SharedRandomState
from tdcache.interventions.sweep import Sweep
from tdcache.interventions.trials import Metric, SweepOver, check_over
from tdcache.modules import HookedModule
from tdcache.regions import Along, Region
from tdcache.selection import Site
from tdcache.types import CacheKey, Selector

__all__ = ["ActivationPatching", "Given", "KeepPart", "Paste", "PasteWhole", "Recalled", "Resolved", "Source"]

Source = TensorDictBase | Mapping[str, Any] | Tensor | Any
"""A cache by path; a mapping from path to tensor or proxy; or, for one site, a tensor or the proxy of a run."""

PatchFn = Callable[..., Tensor | None]


@dataclass(frozen=True, slots=True)
class Paste:
    """Pastes a given value, or the result of ``patch_fn`` on both values."""

    path: str
    value: Callable[[], Tensor | None]
    patch_fn: PatchFn | None = None
    source_positions: Along = None
    is_part: bool = False
    """Whether the given value is only the part for the region rather than the whole value of the source."""

    def edit_region(self, part: Tensor, full: Tensor, region: Region) -> Tensor | None:
        """The new part; None if there is nothing to paste yet."""
        given = self.value()
        if given is None:
            return None
        if self.is_part:
            given = _with_rows_of(part, given, region.part_row_axis(full))
        else:
            given = self._part_of(_with_rows_of(full, given, region.row_axis(full)), full, region)
        # Copies, so that later changes of the new value affect neither the source nor the model's own value.
        if self.patch_fn is None:
            return given.clone()
        given, there = given.clone(), part.clone()
        made = self.patch_fn(module_key=self.path, output=there, output_to_patch=given)
        if made is None:
            return given
        return made if made is given or made is there or not isinstance(made, Tensor) else made.clone()

    def _part_of(self, given: Tensor, full: Tensor, region: Region) -> Tensor:
        """The part of the source that goes into the region."""
        if self.source_positions is not None:
            taken = replace(region, positions=self.source_positions).take(given, self.path)
            if not region.joins_rows or taken.ndim != given.ndim or region.position_dim != 1:
                return taken
            counts = region.positions.sum(1)  # unequal ones do not fit, and joining could hide that
            return taken.flatten(0, 1) if bool((counts == taken.shape[1]).all()) else taken
        return region.take(given, self.path) if given.shape == full.shape and not region.whole else given


def _with_rows_of(full: Tensor, given: Tensor, axis: int) -> Tensor:
    """A source with one row, expanded to all rows of the value."""
    if given.ndim != full.ndim or given.ndim < 2 or given.shape[axis] != 1:
        return given
    return given.expand(*given.shape[:axis], full.shape[axis], *given.shape[axis + 1 :])


@dataclass(frozen=True, slots=True)
class PasteWhole:
    """Pastes a copy of a whole, known value: the plain case of :class:`Paste`."""

    path: str
    tensor: Tensor
    region: Region

    def __call__(self, part: Tensor, full: Tensor) -> Tensor:
        """A copy of the tensor, expanded to the rows of the value."""
        if self.tensor.shape == full.shape:
            return self.tensor.clone()
        return _with_rows_of(full, self.tensor, self.region.row_axis(full)).clone()


@dataclass(frozen=True, slots=True)
class Given:
    """A value that is known on entering."""

    tensor: Tensor

    def __call__(self) -> Tensor:
        """The tensor to paste."""
        return self.tensor


@dataclass(frozen=True, slots=True)
class Resolved:
    """The value of a proxy, resolved when it is needed."""

    proxy: Any
    path: str

    def __call__(self) -> Tensor:
        """The value of the proxy."""
        value = self.proxy.resolve()
        if not isinstance(value, Tensor):
            raise EditError(
                f"{self.proxy!r} has no tensor to paste when {self.path!r} needs it (it resolves to "
                f"{type(value).__name__}); get it in a run that is over, or at a path that runs before this one"
            )
        return value


@dataclass(frozen=True, slots=True)
class Recalled:
    """The value of the same call in the first run."""

    memory: Memory
    path: str

    def __call__(self) -> Tensor | None:
        """The value, or None outside of a patched run."""
        return self.memory.recall(self.path)


@dataclass(frozen=True, slots=True)
class KeepPart:
    """Keeps the patched part of the first run's values; positions count that run's own tokens."""

    memory: Memory
    call: CurrentCall | None
    region: Region

    def __call__(self, path: str, value: Tensor) -> None:
        """Keep the part of one value, in the first run."""
        if self.memory.mode != "record":
            return
        single = value.ndim > 0 and value.shape[self.region.row_axis(value)] == 1
        region = replace(self.region, rows=None) if single else self.region
        found = region if self.call is None else self.call.region_at(path, value, region)
        if found is None:
            raise EditError(f"positions={region.positions!r} are none of the columns at {path!r} in the first run")
        self.memory.record(path, found.take(value, path))


class _KeepAtCall(KeepPart):
    """:class:`KeepPart` for function calls inside a forward, where attention heads and positions are separate axes."""

    def __call__(self, path: str, value: Tensor) -> None:
        KeepPart(self.memory, self.call, at_call(self.region, path))(path, value)


class ActivationPatching(Intervention):
    """Pastes activations of one run into another: what would the model do with the activation of another input?

    There are three kinds of sources. A **cache** by path (a TensorDict such as that of
    :class:`tdcache.ActivationCaching`): every forward in the block is patched. A **proxy** of a run, for one site, or a
    mapping from paths to proxies. None: a **second input** in the same TensorDict; ``hooked(data)`` first runs
    ``data[in_key]``, then ``data[patch_key, in_key]`` with the activations of the first run pasted in, and writes the
    outputs of both, at ``out_key`` and ``(patch_key, out_key)``. A clean first input with a corrupted second one is
    denoising, the other way round noising (Heimersheim and Nanda 2024, arXiv:2404.15255).

    With ``sweep`` each site is patched separately, and ``hooked(data)`` returns a TensorDict of ``metric`` values by
    path.
    Gradients flow through the pasted values, except in a sweep.

    Args:
        selector: which modules; a list of paths is one.
        source: see above.
        patch_fn: ``patch_fn(module_key=, output=, output_to_patch=)`` gets the path, copies of the value there and of
            the source's (of the region, where one is given), and returns the new value; None for the source's.
        positions: the positions to patch, all by default; in a sweep over positions, those to sweep.
        units: the features to patch, all by default.
        patch_key: the key of the second input.
        sweep: True (one site at a time), ``"position"``, ``"head"``, or both: ``("position", "head")``.
        metric: ``metric(data) -> scalar or tensor``, called once per intervention with a TensorDict that holds the
            inputs, the patched outputs and all other entries of ``data``.
        chunk: for a sweep: the number of interventions per forward, stacked along the batch. With 1 nothing is stacked,
            which works for any model.
        replay: for a sweep: layers before the first patch of a forward are not computed again, but replayed from the
            unpatched run. Disable it for a model whose layers do more than return values.
        stack_by: for a sweep: the named group of the pattern that becomes a leading axis of the result.
        source_positions: the positions of the source that are pasted into ``positions``, by default the same ones. The
            source may then differ in length, as in Patchscopes (Ghandeharioun et al. 2024, arXiv:2401.06102). In the
            first input of ``data`` they count real tokens; in ``source=``, which has no mask, they are columns, and a
            tensor ``(batch, k)`` gives each row its own.
        **options: where and when it acts: ``direction``, ``heads`` and the others of :class:`tdcache.EditOptions`. A
            sweep over heads needs ``heads=n_heads``, or ``(n_heads, which)`` for some of them.

    Raises:
        EditError: options are incompatible, the source has no entry for a site, or a value does not fit.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
        >>> data = TensorDict({"input": torch.ones(1, 2), "patched": {"input": torch.zeros(1, 2)}})
        >>> with ActivationPatching("0").prepare(model) as hooked:
        ...     data = hooked(data)
        >>> bool(data["output"] == data["patched", "output"])
        True
    """

    _sweeps_heads: ClassVar[bool] = True

    def __init__(
        self,
        selector: Selector,
        source: Source = None,
        patch_fn: PatchFn | None = None,
        positions: Along = None,
        units: Along = None,
        *,
        patch_key: CacheKey = "patched",
        sweep: bool | SweepOver | Sequence[SweepOver] = False,
        metric: Metric | None = None,
        chunk: int = 32,
        replay: bool = True,
        stack_by: str | None = None,
        source_positions: Along = None,
        **options: Unpack[WhereKeywords],
    ) -> None:
        given: EditKeywords = {"positions": positions, "units": units, **options}  # the caller's own
        self._finds_calls = not sweep and (source is None or isinstance(source, TensorDictBase | Mapping))
        super().__init__(selector, **given)
        self.source_positions = source_positions
        self.source = source
        self.patch_fn = patch_fn
        self.patch_key = patch_key
        self.sweep = sweep
        self.metric = metric
        self.chunk = chunk
        self.replay = replay
        self.stack_by = stack_by
        if sweep and (self.steps is not None or source_positions is not None):
            if self.steps is not None:
                raise EditError("steps= is for generate(); a sweep calls the model itself")
            raise EditError("a sweep patches the same positions in source and run; leave source_positions= out")
        named = self.names is not None
        self._over = check_over(sweep, metric, self.heads, chunk, region=self.region, named=named)

    @property
    def runs_module(self) -> bool:
        """Whether calls need a TensorDict, for a second input or for a sweep."""
        return self.source is None or self._over is not None

    @property
    def _traceable(self) -> bool:
        return super()._traceable and not self.runs_module

    def edit_at(self, site: Site, context: InterventionContext) -> Edit | RegionEdit:
        """The edit that pastes the value of the source."""
        value: Any = Recalled(context.state, site.path) if self.source is None else self.value_at(site.path)
        if (
            isinstance(value, Given)
            and self.region_at(site.path).whole
            and self.patch_fn is None
            and self.source_positions is None
        ):
            return PasteWhole(site.path, value.tensor, self.region)
        return Paste(site.path, value, self.patch_fn, self.source_positions, is_part=self.source is None)

    def value_at(self, path: str) -> Given | Resolved:
        """The source of the value for one site."""
        found = self.source
        if isinstance(found, TensorDictBase | Mapping):
            found = entry_of(found, path, self.direction, "source=")
        if hasattr(found, "resolve"):
            return Resolved(found, path)
        if not isinstance(found, Tensor):
            raise EditError(f"the source for {path!r} is a tensor or a proxy of a run, got {type(found).__name__}")
        return Given(found)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, selection = module.hooking_context, self.select(module)
        single = self.source is not None and not isinstance(self.source, TensorDictBase | Mapping)
        if single and len(selection) > 1:
            raise EditError(
                f"one source for {len(selection)} sites ({list(selection.paths[:3])!r}, ...); give a "
                "TensorDict or a mapping "
                "from path to value, or select one site"
            )
        if self._over is not None:
            context.state = sweep = Sweep(self, selection, self._over)
            return sweep.attach(module.model)
        if self.source is not None:
            return self.hook_sites(module, selection)
        context.state = context.state or Memory("first")
        handle = self.hook_sites(module, selection)
        with handle.installing():
            whole = (
                self.region if self.source_positions is None else replace(self.region, positions=self.source_positions)
            )
            for site in selection:
                part = KeepPart(context.state, context.current_call, self.region_at(site.path, whole))
                self.add_reads(handle, [site], part)
            self.add_call_reads(module, handle, _KeepAtCall(context.state, context.current_call, whole))
        return handle

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        context = module.hooking_context
        in_keys, out_keys = list(module.in_keys), list(module.out_keys)
        if self._over is not None:
            sweep: Sweep = context.state
            return sweep.run(data, forward, in_keys, out_keys)
        memory: Memory = context.state
        second = with_inputs_of(data, self.patch_key, in_keys, self)
        random = SharedRandomState(module.model)
        with memory.recording(), random.run():
            forward(data)
        with memory.recalling(), random.run():
            forward(second)
        write_outputs(data, self.patch_key, second, out_keys)
        return data
