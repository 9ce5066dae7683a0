"""The base class of interventions: a selector, a region, a direction, and one tap per site.

Subclasses only define :meth:`Intervention.edit_at`. Everything that can go wrong between a pattern and a changed value
(masks, structured outputs, shared modules, half-registered hooks) is handled here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.contexts import HookingContext, HookingContextFactory
from tdcache.current_call import CurrentCall
from tdcache.errors import ContextError, EditError, UnfiredSiteWarning, warn_user
from tdcache.function_calls.places import CallPlace, CallTaps, MakeTap, call_places, graph_shows, refuse_direction
from tdcache.function_calls.sites import at_call, has_heads_first, split_selector
from tdcache.function_calls.stand_in import check_selector
from tdcache.hooks import InputPort, MultiHookHandle, Order, OutputPort, attach_ports, direction_row, port_at
from tdcache.hooks.port import Port
from tdcache.interventions.edit_tap import Edit, EditTap, ReadTap, RegionEdit
from tdcache.interventions.options import (
    OPTION_NAMES,
    Calls,
    EditKeywords,
    EditOptions,
    Side,
    brief,
    signature_with_options,
)
from tdcache.interventions.unread import UnreadWatch
from tdcache.introspect import may_be_compiled
from tdcache.modules import HookedModule
from tdcache.paths import near_misses
from tdcache.place_modules import region_in
from tdcache.regions import Along, Heads, Region
from tdcache.selection import Selection, Site, as_matcher, distinct_sites
from tdcache.steps import Steps
from tdcache.types import CacheKey, HookDirection, Match, Pick, Selector

__all__ = ["Intervention", "InterventionContext", "entry_of", "with_inputs_of", "write_outputs"]


class InterventionContext(HookingContext):
    """The context of an intervention; ``state`` is for the recipe, and survives a pause."""

    state: Any = None
    current_call: CurrentCall | None = None
    """The tracker of the current forward, if the options need it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.call_taps: list[CallTaps] = []
        """The taps at function calls inside forwards."""

    def _finish(self, error: BaseException | None) -> None:
        self.state = self.current_call = None
        taps, self.call_taps = self.call_taps, []
        for sentence in dict.fromkeys(each for tap in taps for each in tap.unfired) if error is None else ():
            warn_user(sentence, UnfiredSiteWarning)
        super()._finish(error)


class Intervention(HookingContextFactory):
    """Base of all recipes that change values at selected sites.

    Every argument of a subclass is kept as an attribute of the same name, on which saving and the repr rely.

    Args:
        selector: which modules; see :class:`tdcache.ActivationCaching`.
        **options: those of :class:`EditOptions`, which also become attributes.

    Raises:
        SelectionError: the selector is invalid; on entering, it matches nothing.
        TypeError: an option does not exist.
        EditError: an option is invalid; see :class:`EditOptions`.
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = InterventionContext
    _sweeps_heads: ClassVar[bool] = False
    """Whether ``heads=`` may be an int."""
    _finds_calls: bool = False
    """Whether function calls are discovered as they are made; otherwise their names must be spelled out."""
    _region_by_name: dict[str, Region]
    __signature__: ClassVar[Any]

    options: EditOptions
    positions: Along
    units: Along
    heads: int | Heads | Sequence[int] | None
    rows: Along
    calls: Calls
    direction: Side
    pick: Pick
    steps: Steps
    mask_key: CacheKey | None
    match: Match
    position_dim: int
    unit_dim: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_with_options(cls)

    def __init__(self, selector: Selector, **options: Unpack[EditKeywords]) -> None:
        super().__init__()
        self.selector = selector
        self.options = EditOptions(**options)
        named = self.options.names is not None
        if isinstance(self.options.heads, int) and not self._sweeps_heads and not named:
            raise EditError(f"heads={self.options.heads} does not say which: heads=(n_heads, which), such as (12, [3])")
        for name in OPTION_NAMES:
            setattr(self, name, getattr(self.options, name))
        # Refuse an invalid selector now rather than on entering.
        self._modules, self._calls = (selector, ()) if named else split_selector(selector)
        refuse_direction(self._calls, self.options.direction)
        if self._calls and not self._finds_calls:
            self._modules, self._calls = selector, ()
        if named:
            as_matcher(selector, self.options.match)
        elif self._modules is not None:
            check_selector(self._modules, self.options.match)
        self.region = self.options.region
        self._region_by_name = {}

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if value is parameter.default:
                continue
            shown.append(repr(value) if name == "selector" else f"{name}={brief(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def hooks_calls_only(self) -> bool:
        """Whether all sites are function calls, where graphs notice hooks."""
        return self._modules is None

    @property
    def _traceable(self) -> bool:
        """Whether dynamo can trace the edits themselves."""
        return not self.options.asks_for_call and self.pick in (None, 0)

    def fits_graph_of(self, model: nn.Module) -> bool:
        """Whether the edits may become part of a compiled graph: those at calls that dynamo can trace."""
        return self._modules is None and self._traceable and graph_shows(model, self._calls, self.match)

    def select(self, module: HookedModule) -> Selection:
        """The selected sites of the bound model; reused from the last entry if the modules have not changed."""
        context = module.hooking_context
        if self._modules is None:
            return Selection((), selector=self.selector, model_name=type(context.model).__name__)
        selection: Selection = context.select(self._modules, match=self.match)
        return selection

    def call_places(self, module: HookedModule) -> list[CallPlace]:
        """The modules in whose forwards the selected function calls are made."""
        found = call_places(module.hooking_context.select, self._calls, match=self.match, allow_empty=False)
        modules: dict[Any, CallPlace] = {}
        for place in found:
            modules.setdefault((place.selector, id(place.site.module)), place)
        return list(modules.values())

    def region_at(self, path: str, region: Region | None = None) -> Region:
        """The region of the value at one site; for a canonical name, along the axes that the table gives.

        Args:
            path: the site.
            region: the region, if not the recipe's own.
        """
        if self.names is None:
            if region is not None or not has_heads_first(path):
                return at_call(self.region if region is None else region, path)
            return self._region_by_name.setdefault(path, at_call(self.region, path))
        swept = "head" in (getattr(self, "_over", None) or ())
        heads = None if swept else [self.heads] if isinstance(self.heads, int) else self.heads
        if region is not None:
            return region_in(region, self.names[path], heads)
        if path not in self._region_by_name:  # one object, since a call caches columns by its identity
            self._region_by_name[path] = region_in(self.region, self.names[path], heads)
        return self._region_by_name[path]

    def edit_at(self, site: Site, context: InterventionContext) -> Edit | RegionEdit:
        """The edit at one site; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does at {site.path!r}: define edit_at")

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        return self.hook_sites(module, self.select(module))

    def hook_sites(self, module: HookedModule, selection: Selection) -> MultiHookHandle:
        """Attach the edit of each site, all or none; once to a module with several names."""
        context: InterventionContext = module.hooking_context
        edits = [(site, self.edit_at(site, context)) for site in distinct_sites(selection)]
        handle = MultiHookHandle()
        with handle.installing():
            context.current_call = call = self.follow_calls(module, handle)
            self.add_edits(handle, edits, call)
            if self._calls:
                self.add_call_edits(module, handle, call)
            if self.pick not in (None, 0):
                watch = UnreadWatch(self.pick)
                watch.attach(module.model, handle)
                self.add_reads(handle, selection, watch.note)
        return handle

    def follow_calls(self, module: HookedModule, handle: MultiHookHandle) -> CurrentCall | None:
        """The tracker for ``positions``, ``steps`` and ``calls``, or None if none of them is given."""
        if not self.options.asks_for_call:
            return None
        call = CurrentCall(module.model, self.options)
        call.attach(handle)
        return call

    def add_edits(
        self, handle: MultiHookHandle, edits: list[tuple[Site, Edit | RegionEdit]], call: CurrentCall | None = None
    ) -> None:
        """Attach an edit to each site."""
        taps = [
            (site.module, EditTap(port_at(site.path, self.direction, self.pick), edit, region=region, call=call))
            for site, edit in edits
            for region in [self.region_at(site.path)]
        ]
        attach_ports(taps, self._hook_direction, handle, Order.EDIT)

    def add_call_edits(self, module: HookedModule, handle: MultiHookHandle, call: CurrentCall | None) -> None:
        """Attach an edit to each selected function call, when it is first made."""
        context: InterventionContext = module.hooking_context

        def make(site: Site, port: Port) -> EditTap:
            return EditTap(port, self.edit_at(site, context), region=at_call(self.region, site.path), call=call)

        self._add_call_taps(module, handle, make, use="edit", order=Order.EDIT)

    def _add_call_taps(self, module: HookedModule, handle: MultiHookHandle, make: MakeTap, **options: Any) -> None:
        if self._calls:
            taps = CallTaps(self.call_places(module), make, self._hook_direction, self.pick, **options)
            taps.attach(module.model, handle, made=may_be_compiled(module.model) and self.fits_graph_of(module.model))
            module.hooking_context.call_taps.append(taps)

    def add_call_reads(
        self, module: HookedModule, handle: MultiHookHandle, read: Callable[[str, Tensor], None]
    ) -> None:
        """Call ``read(path, value)`` with the final value at each selected function call."""
        self._add_call_taps(module, handle, lambda site, port: ReadTap(port, read), use="read", order=Order.CAPTURE)

    def add_reads(
        self, handle: MultiHookHandle, selection: Iterable[Site], read: Callable[[str, Tensor], None]
    ) -> None:
        """Call ``read(path, value)`` with the final value at each site."""
        taps = [(site.module, ReadTap(port_at(site.path, self.direction, self.pick), read)) for site in selection]
        attach_ports(taps, self._hook_direction, handle, Order.CAPTURE)

    @property
    def _hook_direction(self) -> HookDirection:
        return (OutputPort if self.direction == "fwd" else InputPort).direction


Intervention.__signature__ = signature_with_options(Intervention)


def entry_of(source: Any, path: str, direction: Side, what: str) -> Any:
    """The entry of a TensorDict or mapping for a site: under its path, its direction and path, or a run's key.

    Raises:
        EditError: there is no such entry; the message lists the nearest keys.
    """
    keys: tuple[CacheKey, ...] = (path, (direction, path), f"{path}_{direction_row(direction).noun}")
    for key in keys:
        found = _get(source, key)
        if found is not None:
            return found
    there = [str(key) for key in source.keys()]  # noqa: SIM118  a TensorDict is no dict
    near = near_misses(path.replace(".", r"\."), there) or tuple(there[:5])
    raise EditError(
        f"{what} has no entry for the site {path!r}; it has {len(there)} entries, the nearest {list(near)!r}"
    )


def _get(source: Any, key: CacheKey) -> Any:
    if isinstance(source, TensorDictBase):
        return source.get(key, None)
    if isinstance(key, str):
        return source.get(key)
    node = source.get(key[0])
    return node.get(key[1]) if isinstance(node, Mapping | TensorDictBase) else None


def write_outputs(data: TensorDictBase, key: CacheKey, ran: TensorDictBase, out_keys: list[CacheKey]) -> None:
    """Write the outputs of a run on the inputs below ``key`` next to these inputs."""
    inner: Any = data.get(key)
    for name in out_keys:
        if name != "_":
            inner.set(name, ran.get(name))


def with_inputs_of(data: TensorDictBase, key: CacheKey, in_keys: list[CacheKey], owner: Any) -> TensorDictBase:
    """The TensorDict below ``key`` with the model's inputs; missing ones are taken from ``data``.

    Raises:
        ContextError: there is no such TensorDict, or it has none of the inputs.
    """
    inner = data.get(key, None)
    if not isinstance(inner, TensorDictBase) or all(inner.get(name, None) is None for name in in_keys):
        raise ContextError(
            f"{owner!r} needs a second input: give {[(key, name) for name in in_keys]!r} beside "
            f"{in_keys!r} in the TensorDict"
        )
    filled = inner.copy()
    for name in in_keys:
        if filled.get(name, None) is None and data.get(name, None) is not None:
            filled.set(name, data.get(name))
    return filled
