"""What every intervention shares: a selector, a region, a direction, and one tap per site."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.contexts import HookingContext, HookingContextFactory
from tdcache.errors import ContextError, DirectionError, EditError
from tdcache.hooks import MultiHookHandle, Order, attach, attach_ports, direction_row, port_at
from tdcache.interventions.edits import Edit, EditTap, ReadTap
from tdcache.interventions.memory import Memory
from tdcache.interventions.regions import Along, Region
from tdcache.interventions.steps import StepClock, Steps, check_steps
from tdcache.modules import HookedModule
from tdcache.paths import near_misses
from tdcache.selection import Selection, Site, as_matcher, distinct_sites
from tdcache.types import CacheKey, HookDirection, Match, Pick, Selector

__all__ = ["Intervention", "InterventionContext", "Side", "entry_of", "with_inputs_of"]

Side = Literal["fwd", "fwd_pre"]
"""Whether an intervention acts on outputs or on inputs."""


class InterventionContext(HookingContext):
    """The context of an intervention; ``state`` is what its recipe keeps of the bound model, also while paused."""

    state: Any = None

    def _finish(self, error: BaseException | None) -> None:
        self.state = None
        super()._finish(error)


class Intervention(HookingContextFactory):
    """A recipe that changes values at the selected sites; the methods are its subclasses.

    Every argument of a subclass is kept as an attribute of the same name, which is what saving relies on.

    Args:
        selector: which modules; see :class:`tdcache.ActivationCaching`.
        positions: which positions of a sequence, all by default; see :class:`Region`.
        units: which features, all by default.
        direction: ``"fwd"`` to change outputs, ``"fwd_pre"`` to change inputs.
        pick: which tensor of a structured value, the first by default; the rest of the value is kept.
        steps: in which forwards of ``generate()``: ``"prefill"``, ``"decode"``, or a predicate of a :class:`Step`.
        match: ``"full"``, ``"prefix"`` or ``"search"``.
        position_dim: the axis of positions.
        unit_dim: the axis of units, counted from the end.

    Raises:
        SelectionError: an unusable selector; on entering, one that matches nothing.
        DirectionError: another direction.
        EditError: an unusable region or steps.
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = InterventionContext

    def __init__(
        self,
        selector: Selector,
        *,
        positions: Along = None,
        units: Along = None,
        direction: Side = "fwd",
        pick: Pick = None,
        steps: Steps = None,
        match: Match = "full",
        position_dim: int = 1,
        unit_dim: int = -1,
    ) -> None:
        super().__init__()
        direction_row(direction)
        if direction not in get_args(Side):
            raise DirectionError(f"an intervention changes outputs ('fwd') or inputs ('fwd_pre'), got {direction!r}")
        if callable(pick) or pick == "all":
            raise EditError(f"pick={pick!r} cannot say where to put a new value; use an index or a key")
        self.selector = selector
        self.positions = positions
        self.units = units
        self.direction: Side = direction
        self.pick = pick
        self.steps = check_steps(steps)
        self.match: Match = match
        self.position_dim = position_dim
        self.unit_dim = unit_dim
        as_matcher(selector, match)  # an unusable selector is refused here, not on entering
        self.region = Region(positions=positions, units=units, position_dim=position_dim, unit_dim=unit_dim)

    def __repr__(self) -> str:
        shown = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if value is parameter.default:
                continue
            shown.append(repr(value) if name == "selector" else f"{name}={_brief(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def select(self, module: HookedModule) -> Selection:
        """The sites in the model that a context is bound to; those of the last entry where the modules are the same."""
        selection: Selection = module.hooking_context.select(self.selector, match=self.match)
        return selection

    def edit_at(self, site: Site, context: InterventionContext) -> Edit:
        """What is done at one site; subclasses say."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does at {site.path!r}: define edit_at")

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        return self.hook_sites(module, self.select(module))

    def hook_sites(self, module: HookedModule, selection: Selection) -> MultiHookHandle:
        """Put the edit of each site on it, either all of them or none; once on a module of several names."""
        edits = [(site, self.edit_at(site, module.hooking_context)) for site in distinct_sites(selection)]
        handle = MultiHookHandle()
        with handle.installing():
            clock = self.add_clock(module, handle)
            self.add_edits(handle, edits, clock)
        return handle

    def add_clock(self, module: HookedModule, handle: MultiHookHandle) -> StepClock | None:
        """The clock for ``steps``, where that is given."""
        if self.steps is None:
            return None
        clock = StepClock(self.steps)
        handle.add(attach(module.model, clock.on_forward, "fwd_pre_kwargs", order=Order.FIRST))
        return clock

    def add_edits(
        self, handle: MultiHookHandle, edits: list[tuple[Site, Edit]], clock: StepClock | None = None
    ) -> None:
        """Put an edit on each site."""
        taps = [
            (site.module, EditTap(port_at(site.path, self.direction, self.pick), edit, region=self.region, clock=clock))
            for site, edit in edits
        ]
        attach_ports(taps, self._hook_direction, handle, Order.EDIT)

    def add_reads(self, handle: MultiHookHandle, selection: Selection, memory: Memory) -> None:
        """Let a memory see the final value at each site."""
        taps = [
            (site.module, ReadTap(port_at(site.path, self.direction, self.pick), memory.record)) for site in selection
        ]
        attach_ports(taps, self._hook_direction, handle, Order.CAPTURE)

    @property
    def _hook_direction(self) -> HookDirection:
        return port_at("", self.direction).direction


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)}"
    if isinstance(value, TensorDictBase | Mapping):
        return f"{type(value).__name__} of {len(value.keys())}"
    return repr(value)


def entry_of(source: Any, path: str, direction: Side, what: str) -> Any:
    """The entry for a site of a TensorDict or mapping: under its path, or under the direction or as a run names it.

    Raises:
        EditError: there is none; the message names what is near.
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


def with_inputs_of(data: TensorDictBase, key: CacheKey, in_keys: list[CacheKey], owner: Any) -> TensorDictBase:
    """The TensorDict below ``key`` with the model's inputs; those that it lacks are taken from ``data``.

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
