"""Caching activations and gradients: the reference recipe, to be read first and copied.

A recipe is configuration (``__init__``), a selection (which sites), and one tap per site (what is taken there). The
context that it is bound to holds all state; entering it calls ``_hook_module``, exiting removes what that returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar, NoReturn, TypedDict, Unpack, cast, get_args

import torch
from tensordict import TensorDictBase
from torch import nn

from tdcache.cache import Capture, Keep
from tdcache.cache.step_gate import StepGate
from tdcache.contexts import HookingContext, HookingContextFactory, HookingContextWithCache
from tdcache.errors import ContextError, DirectionError
from tdcache.function_calls.places import call_places, graph_shows, refuse_direction
from tdcache.function_calls.sites import split_selector
from tdcache.function_calls.stand_in import check_selector
from tdcache.hooks import MultiHookHandle, bracket
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.place_modules import position_dims, refuse_at_names, region_in
from tdcache.reducers import Last, Reducer
from tdcache.regions import Along, Region
from tdcache.selection import Matcher, Selection, as_matcher
from tdcache.steps import Steps
from tdcache.tokens import Positions
from tdcache.types import Check, Hold, HookDirection, Index, Match, Pick, Selector

__all__ = ["ActivationCaching", "CachingOptions", "cache_activations"]


class ActivationCaching(HookingContextFactory):
    r"""Caches activations and gradients of every selected module in a TensorDict.

    Entries are keyed by path: ``cache["layers.0.attn"]``, or ``cache["fwd", "layers.0.attn"]`` with several directions
    or ``use_nested_keys``. They are detached aliases by default, on the device they were computed on, valid as long as
    nothing overwrites them in place (which raises). Each forward replaces the entries of the previous one, unless a
    ``reducer`` covers all forwards; its result is in ``hooked.cache`` whenever that is read and when the block ends.
    Gradients arrive during the user's own backward, inside the block.

    Args:
        key_pattern: which modules: a regex on the whole path, a compiled pattern, a module class, a predicate
            ``(path, module) -> bool``, or a sequence of these. Can be set between two uses.
        relative: match and name paths relative to the model; with False, relative to the hooked module around it.
        cache: the TensorDict to write to. If it has a device, values are moved there; if it is locked or
            memory-mapped, they are copied into its existing entries.
        callback: called as ``callback(module=, args=, output=, key=, direction=)`` (the gradient directions get
            ``grad_input=, grad_output=`` instead of the last two values, as torch has them); returns what is kept.
        directions: any of ``"fwd"`` (output; the default), ``"fwd_pre"`` (input), ``"bwd"`` (gradient of the output),
            ``"grad_in"`` (gradient of the input), and their relatives in :data:`tdcache.HookDirection`.
        use_nested_keys: key by direction and path even with one direction.
        clear_cache: empty the cache when the context is entered.
        match: ``"full"``, ``"prefix"`` or ``"search"``.
        pick: which tensor of a structured value: an index, a key, a path of these, a callable, ``"all"`` for every
            tensor under nested keys, or None for the first.
        index: the part of the tensor to keep, as in ``tensor[index]``; copied, so that it does not keep the rest alive.
        hold: ``"detached"`` (an alias without graph), ``"live"`` (with its graph) or ``"snapshot"`` (a copy).
        dtype: cast to it; a ``torch.dtype`` or its name. Complex values need a complex one.
        device: move there; from an accelerator to the CPU asynchronously, by pinned memory.
        reducer: reduces several calls: ``Last()`` (default), ``First()``, ``Stack()``, ``Concatenate()``, statistics.
        batch_dims: the number of leading dimensions that all entries share, as batch size of the cache.
        stack_by: the named group of the pattern that becomes a leading axis: sites that differ only in it are stacked.
            Several groups become several axes, in the order given.
        stop_early: end the forward once every site has fired (not with gradients). Call ``hooked(...)``, which then
            returns no output.
        allow_empty: accept a selector that matches nothing.
        prepend: see values before edits at the same site; by default captures see the final value.
        check: how an alias that was overwritten in place is detected: ``"versions"`` reads torch's version counter, at
            no cost; ``"values"`` also compares checksums, to find writes that the counter misses.
        positions: which of each row's real tokens are kept, by the attention mask of the call: a number (0 the first,
            -1 the last; its axis is removed), several, a slice, an integer tensor ``(batch, k)`` or a bool mask
            ``(batch, seq)``; ``slice(None)`` for every real token, so that ``reducer=Mean(flatten=2)`` is the mean
            over them. None keeps all columns, including padding. See ``docs/positions.md``.
        mask_key: the name of the mask among the model's arguments, by default found automatically; None counts columns.
        position_dim: the axis of positions in the values.
        rows: which rows of the batch are kept: an int (its axis is removed), a slice, a sequence of ints, or a bool
            mask ``(batch,)``. Rows are axis 0, or axis 1 if positions are axis 0.
        units: which features, along ``unit_dim``: an int (its axis is removed), a slice, or a sequence of ints.
        heads: ``(n_heads, which)``, instead of ``units``, if ``unit_dim`` is the concatenation of that many heads, as
            in the input of an attention's output projection; the selected heads stay concatenated. With ``names=`` and
            an axis of heads, just which.
        unit_dim: the axis of units, counted from the end.
        steps: in which forwards of ``generate()`` values are kept: ``"prefill"``, ``"decode"``, or a predicate of a
            :class:`tdcache.Step`. Forwards that are left out do not replace entries. All by default.
        names: the canonical names of the model, ``tdcache.names(model)``. Then ``key_pattern`` means names, such as
            ``r"blocks\.(?P<layer>\d+)\.attn\.pattern"``, and names are the keys; ``"fwd"`` is the value of a name and
            ``"bwd"`` its gradient. The cache is a :class:`tdcache.NamedCache`.

    Raises:
        DirectionError: unknown direction, or a gradient with ``stop_early``.
        EditError: rows, units or heads are invalid.
        SelectionError: the selector is invalid; on entering, it matches nothing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
        >>> with ActivationCaching(r"0|2").prepare(model) as hooked:
        ...     y = hooked(torch.randn(5, 4))
        >>> hooked.cache["0"].shape
        torch.Size([5, 3])
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = HookingContextWithCache

    def __init__(
        self,
        key_pattern: Selector,
        relative: bool = True,
        cache: TensorDictBase | None = None,
        callback: Callable[..., Any] | None = None,
        directions: Sequence[HookDirection] | None = None,
        use_nested_keys: bool = False,
        clear_cache: bool = True,
        *,
        match: Match = "full",
        pick: Pick = None,
        index: Index = None,
        hold: Hold = "detached",
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        reducer: Reducer | type[Reducer] | None = None,
        batch_dims: int = 0,
        stack_by: str | Sequence[str] | None = None,
        stop_early: bool = False,
        allow_empty: bool = False,
        prepend: bool = False,
        check: Check = "versions",
        positions: Positions = None,
        mask_key: Any = "auto",
        position_dim: int = 1,
        steps: Steps = None,
        rows: Along = None,
        units: Along = None,
        heads: Any = None,
        unit_dim: int = -1,
        names: Names | None = None,
    ) -> None:
        super().__init__()
        self.names = names
        self._heads = heads
        if isinstance(directions, str):
            raise DirectionError(f"directions is a sequence: write directions=[{directions!r}]")
        if check not in get_args(Check):
            raise ValueError(f"check is one of {', '.join(map(repr, get_args(Check)))}, got {check!r}")
        if batch_dims < 0:
            raise ValueError(f"batch_dims is a number of leading dimensions, got {batch_dims}")
        chosen = tuple(dict.fromkeys(directions or ("fwd",)))
        refuse_at_names(names, chosen)
        self._hooking_context_kwargs = {"cache": cache, "clear_cache": clear_cache}
        self._match = match
        self._relative = relative
        self._allow_empty = allow_empty
        self._capture = Capture(
            directions=chosen,
            nested=use_nested_keys or len(chosen) > 1,
            callback=callback,
            pick=pick,
            keep=Keep(hold=hold, index=index, dtype=dtype, device=device),
            reducer=Last() if reducer is None else Reducer.of(reducer),
            batch_dims=batch_dims,
            stack_by=stack_by,
            stop_early=stop_early,
            prepend=prepend,
            check=check,
            positions=positions,
            mask_key=mask_key,
            position_dim=position_dim,
            steps=steps,
            region=Region(
                rows=rows,
                units=units,
                unit_dim=unit_dim,
                position_dim=position_dim,
                heads=None if names is not None else heads,
            ),
        )
        self.key_pattern = key_pattern

    def fits_graph_of(self, model: nn.Module) -> bool:
        """Whether the hooks may become part of a compiled graph: those for plain outputs, and at calls it can trace."""
        if self.names is not None or not self._capture.fits_graph_at(calls_only=self.hooks_calls_only):
            return False
        return not self._calls or graph_shows(model, self._calls, self._match)

    @property
    def hooks_calls_only(self) -> bool:
        """Whether all sites are function calls, where graphs notice hooks."""
        return self._modules is None

    @property
    def key_pattern(self) -> Selector:
        """Which modules; can be set between two uses."""
        return self._key_pattern

    @key_pattern.setter
    def key_pattern(self, selector: Selector) -> None:
        # An unusable selector is refused here, not on entering.
        self._modules, self._calls = split_selector(selector) if self.names is None else (selector, ())
        for direction in self._capture.directions:
            refuse_direction(self._calls, direction)
        self._matcher: Matcher | None = None
        if self._calls and self._capture.needs_places:
            check_selector(selector, self._match)
            self._modules, self._calls = selector, ()
        elif self._modules is not None:
            self._matcher = as_matcher(self._modules, self._match)
        self._key_pattern = selector

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._key_pattern!r}, directions={list(self._capture.directions)!r})"

    def _named_axes(self, selection: Selection, names: Names) -> tuple[dict[str, int], dict[str, Region]]:
        """By canonical name, the axis of positions, and the part that is kept."""
        regions = {at.path: region_in(self._capture.region, names[at.path], self._heads) for at in selection}
        return position_dims(names, selection), regions

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context: HookingContextWithCache = module.hooking_context
        model = context.model
        root = model if self._relative else module
        options: Any = {"match": self._match, "allow_empty": self._allow_empty}
        if self._modules is None:
            selection = Selection((), selector=self._key_pattern, model_name=type(model).__name__)
        else:
            selection = context.select(self._modules, root=root, matcher=self._matcher, **options)
        places = call_places(partial(context.select, root=root), self._calls, **options) if self._calls else ()
        dims, regions = ({}, {}) if self.names is None else self._named_axes(selection, self.names)
        recorder = self._capture.recorder(model, context.cache, selection, places, dims, regions)
        recorder.names = self.names
        handle = MultiHookHandle()
        with handle.installing():
            self._capture.place(selection, recorder, handle)
            if places:
                self._capture.place_calls(model, places, recorder, handle)
            part = recorder.channels[0].part
            if part is not None and part.call is not None:
                part.call.attach(handle)
            if self._capture.steps is None:
                bracket(model, recorder.begin, recorder.end, handle)
            else:
                StepGate(model, self._capture.steps, recorder).attach(handle)
        context.record(recorder)
        return handle


class CachingOptions(TypedDict, total=False):
    """The options of :class:`ActivationCaching`, so that editors complete them on :func:`cache_activations`."""

    relative: bool
    cache: TensorDictBase | None
    callback: Callable[..., Any] | None
    directions: Sequence[HookDirection] | None
    use_nested_keys: bool
    clear_cache: bool
    match: Match
    pick: Pick
    index: Index
    hold: Hold
    dtype: torch.dtype | str | None
    device: torch.device | str | None
    reducer: Reducer | type[Reducer] | None
    batch_dims: int
    stack_by: str | Sequence[str] | None
    stop_early: bool
    allow_empty: bool
    prepend: bool
    check: Check
    positions: Positions
    mask_key: Any
    position_dim: int
    steps: Steps
    rows: Along
    units: Along
    heads: Any
    unit_dim: int
    names: Names | None


def cache_activations(
    model: nn.Module, pattern: Selector, **options: Unpack[CachingOptions]
) -> AbstractContextManager[TensorDictBase]:
    """Cache activations inside a block, in one line; the model is called as usual.

    Args:
        model: any ``nn.Module``.
        pattern: which modules; see :class:`ActivationCaching`, which also has the ``options``.
        **options: keyword arguments of :class:`ActivationCaching`.

    Returns:
        What ``with`` enters; it gives the cache itself, current after each forward and backward (after the block with
        a gathering ``reducer``).

    Raises:
        TypeError: a misspelt option, at the call.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.GELU())
        >>> with cache_activations(model, "0") as cache:
        ...     y = model(torch.randn(5, 4))
        >>> cache["0"].shape
        torch.Size([5, 3])
    """
    return _CacheBlock(cast(HookingContextWithCache, ActivationCaching(pattern, **options).prepare(model)))


_NOT_ENTERED = "nothing was cached: write `with cache_activations(model, pattern) as cache:` and call the model inside"


class _CacheBlock(AbstractContextManager[TensorDictBase, bool]):
    """A caching context that gives its cache; reading it without ``with`` is an error that says so."""

    def __init__(self, context: HookingContextWithCache) -> None:
        self._context = context

    def __enter__(self) -> TensorDictBase:
        return self._context.__enter__().cache

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        stopped = self._context.__exit__(kind, error, traceback)
        if kind is None or stopped:
            self._context.report_empty()
        return stopped

    def __getitem__(self, key: object) -> NoReturn:
        raise ContextError(_NOT_ENTERED)

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(_NOT_ENTERED)
