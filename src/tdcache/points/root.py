"""The two ways to the surface of hook points: a base class of one's own model, and a companion of any model."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn

from tdcache.hooks import MultiHookHandle
from tdcache.introspect import is_optimized_module
from tdcache.points.caches import CachingSurface
from tdcache.points.hook_point import HookPoint
from tdcache.points.splice import insert_hook_point
from tdcache.types import Pick

__all__ = ["HookRoot", "HookedRootModule", "hook_root"]


class HookedRootModule(CachingSurface, nn.Module):
    """A base for models that are written with hook points, or a mixin before another model class.

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
            args, kwargs = (), {}  # as in TransformerLens, a root without another base takes what it is given
        following(*args, **kwargs)
        self.is_caching = False
        self.context_level = 0

    @property
    def points_root(self) -> nn.Module:
        """Return the module that names of points are relative to, the model itself."""
        return self


class HookRoot(CachingSurface):
    """The surface of a model with hook points, beside the model; see :func:`hook_root`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.is_caching = False
        self.context_level = 0
        self.spliced = MultiHookHandle()
        """The points that were put in through this root."""

    @property
    def points_root(self) -> nn.Module:
        """The model that names are relative to: for a compiled one, the model inside it."""
        return self.model.get_submodule("_orig_mod") if is_optimized_module(self.model) else self.model

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
        """:func:`insert_hook_point`; :meth:`remove_points` takes out all that were put in here."""
        spliced = insert_hook_point(self.points_root, path, name, before=before, pick=pick)
        self.spliced.add(spliced)
        return spliced.point

    def remove_points(self) -> None:
        """Take out the hook points that were put in through this root."""
        self.spliced.remove()

    def __enter__(self) -> HookRoot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove_points()


def hook_root(model: nn.Module, points: Mapping[str, str] | None = None) -> HookRoot:
    """What :class:`HookedRootModule` has, for a model that is none.

    Args:
        model: any model; its hook points get their names.
        points: hook points to put in, each name with the path of the module it goes after. A ``with`` block around
            the root takes them out again, as does :meth:`HookRoot.remove_points`.

    Raises:
        PathError: no such module, or a name that cannot be had; nothing is put in then.

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
