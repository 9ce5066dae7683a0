"""The methods of a model with hook points: hooks by name, and runs with hooks.

Names and order of the parameters are those of TransformerLens, so that positional calls work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from torch import nn

from tdcache.errors import ContextError, SelectionError, TdcacheWarning, warn_user
from tdcache.hooks import MultiHookHandle
from tdcache.introspect import has_stale_graph
from tdcache.points.capture import SavingHook
from tdcache.points.context import PointHooks
from tdcache.points.hook_point import HookPoint, LensHandle, PointDirection, PointRegistration
from tdcache.points.names import NamesFilter, choose
from tdcache.selection import walk

__all__ = ["PointSurface", "bracket_with"]

Hooks = Sequence[tuple[NamesFilter, Callable[..., Any]]]


class PointSurface:
    """The methods of a model with hook points, except for caches."""

    is_caching: bool
    context_level: int

    @property
    def points_root(self) -> nn.Module:
        """The module to which names are relative."""
        raise NotImplementedError

    @property
    def called_model(self) -> nn.Module:
        """The module that runs call: the root itself or a wrapper around it."""
        return self.points_root

    # Names. They are not stored, since a later change of the model would make them stale.

    def setup(self) -> None:
        """Set the name of every hook point. Call it at the end of ``__init__``, and again after adding points."""
        for name, point in self.hook_dict.items():
            point.name = name

    @property
    def mod_dict(self) -> dict[str, nn.Module]:
        """Every current submodule by name; one with several names under the first."""
        named = {id(module): name for name, module in reversed(walk(self.points_root))}
        return {name: module for name, module in walk(self.points_root) if named[id(module)] == name}

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every current hook point by name; one with several names under the first."""
        found: dict[str, HookPoint] = {}
        seen: set[int] = set()
        for name, module in walk(self.points_root):
            if isinstance(module, HookPoint) and id(module) not in seen:
                seen.add(id(module))
                found[name] = module
                if module.name is None:
                    module.name = name
        return found

    def hook_points(self) -> Iterable[HookPoint]:
        """Every hook point of the model, in the order of ``hook_dict``."""
        return self.hook_dict.values()

    def chosen_points(self, names_filter: NamesFilter) -> dict[str, HookPoint]:
        """The hook points that a filter selects, by name.

        Raises:
            SelectionError: the filter selects none; the message lists the nearest names.
        """
        return self.choose_among(self.hook_dict, names_filter)

    def choose_among(self, points: dict[str, HookPoint], names_filter: NamesFilter) -> dict[str, HookPoint]:
        """:meth:`chosen_points` among ``points``, for callers that have :attr:`hook_dict`."""
        if names_filter is None and points:
            return points
        if isinstance(names_filter, str) and names_filter not in points:
            other = _submodule(self.points_root, names_filter)
            if other is not None and not isinstance(other, HookPoint):
                raise SelectionError(
                    f"{names_filter!r} is a {type(other).__name__} and no hook point; put one behind it with "
                    f"insert_hook_point(model, {names_filter!r}, ...)",
                    selector=names_filter,
                )
        names = choose(list(points), names_filter, type(self.points_root).__name__)
        return {name: points[name] for name in names}

    # Hooks that stay.

    def add_hook(
        self,
        name: NamesFilter,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002  (TransformerLens' name)
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> list[LensHandle]:
        """Add a hook to all points that a name, regex, predicate or several of these select, or to none.

        Raises:
            SelectionError: the filter selects no point.
            ContextError: the model is compiled and has been traced, so that hooks added now would be skipped.
        """
        self.refuse_stale_graph()
        return self.install(name, hook, dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_perma_hook(
        self,
        name: NamesFilter,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002
    ) -> list[LensHandle]:
        """Add a hook that only ``including_permanent=True`` removes."""
        return self.add_hook(name, hook, dir=dir, is_permanent=True)

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Override this to refuse a hook by raising; it is called for every hook that is added by name."""

    def check_and_add_hook(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Call :meth:`check_hooks_to_add`, then add the hook."""
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir=dir, is_permanent=is_permanent, prepend=prepend)
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def install(
        self,
        name: NamesFilter,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"],  # noqa: A002
        **options: Any,
    ) -> list[LensHandle]:
        """:meth:`add_hook` without the check for a traced graph."""
        added: list[LensHandle] = []
        with MultiHookHandle().installing() as handle:
            for point_name, point in self.chosen_points(name).items():
                before = set(map(id, point.handles()))
                self.check_and_add_hook(point, point_name, hook, dir=dir, **options)
                for new in [each for each in point.handles() if id(each) not in before]:
                    handle.add(new.hook)
                    bracket_with(new, hook, self.points_root)
                    added.append(new)
        return added

    def refuse_stale_graph(self) -> None:
        """Refuse permanent hooks if a traced graph would skip them.

        Raises:
            ContextError: the model has been traced.
        """
        if has_stale_graph(self.called_model):
            raise ContextError(
                f"{type(self.points_root).__name__} was traced by torch.compile, and its graph skips hooks that are "
                "added now; add them before the first call, use hooks() or run_with_cache(), or call "
                "torch._dynamo.reset()"
            )

    def remove_all_hook_fns(
        self, direction: PointDirection = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove the hooks of all points that match these arguments; other hooks on the same modules stay."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def clear_contexts(self) -> None:
        """Give every point an empty ``ctx``."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: PointDirection = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Call :meth:`clear_contexts` (unless disabled) and :meth:`remove_all_hook_fns`."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level=level)
        self.is_caching = False

    def list_hooks(
        self,
        name_filter: NamesFilter = None,
        dir: PointDirection = "both",  # noqa: A002
        including_permanent: bool = True,
    ) -> dict[str, list[LensHandle]]:
        """The handles of all points that have some; :func:`tdcache.points.list_hooks` shows all hooks of a model.

        Raises:
            DirectionError: unknown direction.
            SelectionError: the filter selects no point.
        """
        points = self.chosen_points(name_filter) if name_filter is not None else self.hook_dict
        found = {
            name: [handle for handle in point.handles(dir) if handle.matches(including_permanent, None)]
            for name, point in points.items()
        }
        return {name: handles for name, handles in found.items() if handles}

    # Hooks for the length of a block.

    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> PointHooks:
        """A context with these hooks, each a pair of a filter and a callable; it can be entered again after it exits.

        Exiting removes exactly these hooks, whatever their level.

        Args:
            fwd_hooks: on the values.
            bwd_hooks: on the gradients; run ``backward()`` inside the block.
            reset_hooks_end: remove them at the end of the block.
            clear_contexts: empty the points' ``ctx`` at the end of the block.
        """
        return PointHooks(self, tuple(fwd_hooks), tuple(bwd_hooks), reset_hooks_end, clear_contexts)

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Call the model inside :meth:`hooks`."""
        if bwd_hooks and reset_hooks_end:
            warn_user(
                "run_with_hooks removes its hooks when the forward is over, so the bwd_hooks see no backward; use "
                "'with model.hooks(bwd_hooks=...)' around forward and backward, or reset_hooks_end=False",
                TdcacheWarning,
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.called_model(*model_args, **model_kwargs)


def bracket_with(handle: LensHandle, hook: Callable[..., Any], root: nn.Module) -> None:
    """If ``hook`` caches, tell it about the forwards of ``root`` until ``handle`` is removed."""
    if isinstance(hook, SavingHook):
        cast(PointRegistration, handle.hook).extra = hook.capture.bracketed(root)


def _submodule(root: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = root
    for part in name.split("."):
        found = None if found is None else found._modules.get(part)
    return found
