"""The two ways to use hook points: a base class for your own model, and a companion object for any model.

A model that comes from a library cannot be given a base class; the companion has the same methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from tdcache.hooks import MultiHookHandle
from tdcache.introspect import uncompiled
from tdcache.points.caches import CachingSurface
from tdcache.points.hook_point import HookPoint
from tdcache.points.splice import insert_hook_point
from tdcache.types import Pick

__all__ = ["HookRoot", "HookedRootModule", "hook_root"]


class HookedRootModule(CachingSurface, nn.Module):
    """A base class for models that are written with hook points, or a mixin before another model class.

    Example:
        >>> import torch
        >>> from tdcache.points import HookPoint
        >>> class Model(HookedRootModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.hook_in, self.hook_out = HookPoint(), HookPoint()
        ...     def forward(self, x):
        ...         return self.hook_out(2 * self.hook_in(x))
        >>> output, cache = Model().run_with_cache(torch.ones(2), names_filter="hook_out")
        >>> cache["hook_out"]
        tensor([2., 2.])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        following = super().__init__
        if getattr(following, "__func__", None) is nn.Module.__init__:
            args, kwargs = (), {}  # as in TransformerLens, a root without another base class accepts any arguments
        following(*args, **kwargs)
        self.is_caching = False
        self.context_level = 0

    @property
    def points_root(self) -> nn.Module:
        """The module to which names of points are relative: the model itself."""
        return self


class HookRoot(CachingSurface):
    """The methods of :class:`HookedRootModule` for any model, in a separate object; see :func:`hook_root`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_caching = False
        self.context_level = 0
        self.spliced = MultiHookHandle()
        """The points that were inserted through this root."""

    @property
    def points_root(self) -> nn.Module:
        """The model to which names are relative; if it is compiled, the model inside."""
        return uncompiled(self.model)

    @property
    def called_model(self) -> nn.Module:
        """The model as it was given."""
        return self.model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with these arguments."""
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {len(self.hook_dict)} hook points)"

    def insert(self, path: str, name: str, *, before: bool = False, pick: Pick = None) -> HookPoint:
        """:func:`insert_hook_point`; :meth:`remove_points` removes all points inserted this way."""
        spliced = insert_hook_point(self.points_root, path, name, before=before, pick=pick)
        self.spliced.add(spliced)
        return spliced.point

    def remove_points(self) -> None:
        """Remove the hook points that were inserted through this root."""
        self.spliced.remove()

    def __enter__(self) -> HookRoot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove_points()


def hook_root(model: nn.Module, points: Mapping[str, str] | None = None) -> HookRoot:
    """The methods of :class:`HookedRootModule` for a model of another class.

    Args:
        model: any model; its hook points get their names.
        points: hook points to insert: names, each with the path of the module that it follows. A ``with`` block around
            the root removes them at its end, as does :meth:`HookRoot.remove_points`.

    Raises:
        PathError: a module does not exist, or a name cannot be used; nothing is inserted then.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with hook_root(model, {"0.hook_pre": "0", "1.hook_post": "1"}) as root:
        ...     y, cache = root.run_with_cache(torch.ones(1, 2))
        >>> cache["0.hook_pre"].shape
        torch.Size([1, 3])
    """
    root = HookRoot(model)
    with root.spliced.installing():
        for name, path in (points or {}).items():
            root.insert(path, name)
    root.setup()
    return root
