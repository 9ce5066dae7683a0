"""Registers one hook at every module that a selector matches.

For users who want hooks but no context. It differs from a loop over ``named_modules()`` in what a loop tends to leave
out: nothing stays registered if one registration fails, and a pattern that matches nothing is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tdcache.errors import SelectionError
from tdcache.hooks.attach import register_hook_to_module
from tdcache.hooks.directions import direction_row
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.paths import resolve
from tdcache.selection import Selection, select
from tdcache.types import HookDirection, Match, Selector

__all__ = ["MultiHookManager"]


class MultiHookManager:
    r"""Registers hooks at the modules that pass a selector and two class filters.

    Args:
        pattern: any selector. ``None`` selects every instance of ``classes_to_hook``, or nothing if that is not given.
        classes_to_hook: only instances of these.
        classes_to_skip: never instances of these.
        match: how patterns are compared with paths.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> manager = MultiHookManager(r"\d+", classes_to_skip=(nn.ReLU,))
        >>> with manager.register_hook(model, lambda path: lambda module, args, output: output + 1) as handle:
        ...     len(handle)
        1
    """

    def __init__(
        self,
        pattern: Selector | None = None,
        classes_to_hook: tuple[type[nn.Module], ...] = (nn.Module,),
        classes_to_skip: tuple[type[nn.Module], ...] = (),
        *,
        match: Match = "full",
    ) -> None:
        self.pattern = pattern
        self.classes_to_hook = classes_to_hook
        self.classes_to_skip = classes_to_skip
        self.match: Match = match

    def select(self, module: nn.Module) -> Selection:
        """The selected sites below ``module``.

        Raises:
            SelectionError: a pattern or classes were given and match nothing.
        """
        if self.pattern is None:
            if self.classes_to_hook == (nn.Module,):
                return select(module, (), allow_empty=True)
            found = select(module, self.classes_to_hook)
        else:
            found = select(module, self.pattern, match=self.match)
        kept = [
            site
            for site in found
            if isinstance(site.module, self.classes_to_hook) and not isinstance(site.module, self.classes_to_skip)
        ]
        if not kept:
            raise SelectionError(
                f"selector {found.selector!r} matches {len(found)} modules of {type(module).__name__}, but none of "
                f"them passes classes_to_hook={self.classes_to_hook!r}, classes_to_skip={self.classes_to_skip!r}",
                selector=found.selector,
            )
        return Selection(kept, selector=found.selector, model_name=found.model_name)

    def register_hook(
        self,
        module: nn.Module,
        hook_factory: Callable[[str], Callable[..., Any]],
        *,
        direction: HookDirection = "fwd",
        prepend: bool = False,
        relative_path: str | None = None,
    ) -> MultiHookHandle:
        """Register ``hook_factory(path)`` at every site, all or none.

        Args:
            module: the model, or anything that holds it.
            hook_factory: makes the hook for one path.
            direction: which value the hooks are called with.
            prepend: register before existing hooks.
            relative_path: the path from ``module`` to the model; selected paths are relative to the model.
        """
        direction_row(direction)
        root = resolve(module, relative_path) if relative_path else module
        handle = MultiHookHandle()
        with handle.installing():
            for site in self.select(root):
                hook = hook_factory(site.path)
                handle.add(register_hook_to_module(site.module, hook, direction, prepend, path=site.path))
        return handle
