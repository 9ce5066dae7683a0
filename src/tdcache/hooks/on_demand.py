"""Places that accept hooks as a module does, although they are not modules of the model.

Code that registers hooks on modules can register them here without a case of its own: the place is installed in the
model when its first hook is registered, and removed with its last one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from weakref import ref

from torch import nn

from tdcache.introspect import hooks_with_kwargs, post_hooks, pre_hooks, set_hook_dicts
from tdcache.types import Removable

__all__ = ["OnDemandPlace"]


class OnDemandPlace(nn.Module):
    """Holds hooks as a module does; :meth:`install` puts it where they are to be called."""

    def __init__(self) -> None:
        super().__init__()
        self._installed: Removable | None = None
        set_hook_dicts(self, _TellingDict(self, before=True), _TellingDict(self))

    def install(self) -> Removable:
        """Have :meth:`run_before` and :meth:`run_after` called from the model, until the handle is removed."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its hooks are called: define install")

    @property
    def call_parameters(self) -> tuple[str, ...]:
        """The names of the parameters, by position, of what is called there."""
        return ()

    def admit(self, hook: Any, *, before: bool) -> None:
        """Raise if the place cannot call such a hook."""

    def settle(self) -> None:
        """Install the place if anything is registered, else remove it."""
        if pre_hooks(self) or post_hooks(self) or "forward" in self.__dict__:
            if self._installed is None:
                self._installed = self.install()
        elif self._installed is not None:
            installed, self._installed = self._installed, None
            installed.remove()

    def run_before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Call the pre-hooks, as torch does before a module; returns the arguments to continue with."""
        for hook, with_kwargs in _called(self, before=True):
            if with_kwargs:
                args, kwargs = hook(self, args, kwargs) or (args, kwargs)
                continue
            new = hook(self, args)
            if new is not None:
                args = new if isinstance(new, tuple) else (new,)
        return args, kwargs

    def run_after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Call the hooks, as torch does after a module; returns the output to continue with."""
        for hook, with_kwargs in _called(self, before=False):
            new = hook(self, args, kwargs, output) if with_kwargs else hook(self, args, output)
            if new is not None:
                output = new
        return output


def _called(place: nn.Module, *, before: bool) -> Iterator[tuple[Any, bool]]:
    hooks = pre_hooks(place) if before else post_hooks(place)
    told = hooks_with_kwargs(place, before=before)
    for number, hook in list(hooks.items()):
        yield hook, number in told


class _TellingDict(OrderedDict[int, Any]):
    """The hooks of one side of a place; tells the place when the first is added and the last removed."""

    def __init__(self, place: OnDemandPlace, *, before: bool = False) -> None:
        super().__init__()
        self.place = ref(place)
        self.before = before

    def __setitem__(self, number: int, hook: Any) -> None:
        place = self.place()
        if number in self or place is None:
            super().__setitem__(number, hook)
            return
        place.admit(hook, before=self.before)
        super().__setitem__(number, hook)
        try:
            place.settle()
        except BaseException:
            super().__delitem__(number)
            raise

    def __delitem__(self, number: int) -> None:
        super().__delitem__(number)
        self._tell()

    def pop(self, number: int, default: Any = None) -> Any:
        """Remove one, if it is there."""
        if number not in self:
            return default
        hook = self[number]
        del self[number]
        return hook

    def _tell(self) -> None:
        place = self.place()
        if place is not None:
            place.settle()
