"""A hook point: an identity module that gives an intermediate value a name, and hooks a place to sit.

The surface is that of TransformerLens' ``HookPoint``; parameters stand in its order, so that its call forms work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from tdcache.errors import DirectionError, EditError, HookSignatureError
from tdcache.hooks import Order, attach
from tdcache.hooks.attach import attach_gradient
from tdcache.hooks.gradient_hooks import GradOutputHook
from tdcache.inplace import shares_memory, version_of
from tdcache.points.reshape import Conversion, as_conversion
from tdcache.types import Removable

__all__ = [
    "AliasedHookPoint",
    "HookPoint",
    "LensHandle",
    "PointDirection",
    "PointHook",
    "PointRegistration",
    "check_direction",
    "hook_name",
]

PointDirection = Literal["fwd", "bwd", "both"]
"""The value at a point, its gradient, or either."""


@dataclass(frozen=True, eq=False)
class LensHandle:
    """One hook at a hook point: how it is removed, and what was asked for when it was added."""

    hook: Removable
    """``handle.hook.remove()`` takes the hook away, and the point forgets it."""
    is_permanent: bool = False
    """Whether only ``including_permanent=True`` removes it."""
    context_level: int | None = None
    """How many ``hooks()`` contexts were open around it; None for a hook that was added outside of any."""
    user_hook: Callable[..., Any] | None = None
    """The callable as the user gave it."""

    def matches(self, including_permanent: bool, level: int | None) -> bool:
        """Whether a removal or a listing with these arguments means this hook."""
        return (including_permanent or not self.is_permanent) and level in (None, self.context_level)


class PointRegistration:
    """What removes a hook from torch and from the list of its point; ``extra`` goes with it."""

    __slots__ = ("extra", "inner", "lens", "listed")

    def __init__(self, inner: Removable, listed: list[LensHandle]) -> None:
        self.inner = inner
        self.listed = listed
        self.lens: LensHandle | None = None
        self.extra: Removable | None = None

    def remove(self) -> None:
        """Remove; a second call does nothing."""
        self.inner.remove()
        if self.lens is not None and self.lens in self.listed:
            self.listed.remove(self.lens)
        extra, self.extra = self.extra, None
        if extra is not None:
            extra.remove()


class HookPoint(nn.Module):
    """Returns what it is given. Hooks that are added here see it, under a name, and may replace it.

    A hook is called as ``hook(tensor, hook=point)``; what it returns, if not None, takes the tensor's place (with
    ``dir="bwd"``, the gradient's). Without hooks a call costs what ``nn.Identity`` costs. As a module with a path a
    point is also a site for every selector, cache and intervention of this library. Hooks that edit run before those
    that cache, in the order they were added in; a copy of the model has hooks of its own.

    Attributes:
        name: the dotted path below the root; set by the root's ``setup()``.
        ctx: scratch space for hooks.
        fwd_hooks: the handles of the hooks on the value.
        bwd_hooks: those on its gradient.
        hook_conversion: see :meth:`enable_reshape`.
        backward_scale: hooks and caches see the gradient times this; what flows on in the model does not change.
        pos_dim: the axis that ``pos_slice`` means; None for the usual one.

    Example:
        >>> import torch
        >>> point = HookPoint()
        >>> handle = point.add_hook(lambda tensor, hook: tensor + 1)
        >>> point(torch.zeros(2))
        tensor([1., 1.])
        >>> point
        HookPoint(1 fwd)
    """

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.hook_conversion: Conversion | None = None
        self.backward_scale: float = 1.0
        self.pos_dim: int | None = None

    def forward(self, x: Any) -> Any:
        """Return ``x`` itself, unless a hook replaces it."""
        return x

    def add_hook(
        self,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",  # noqa: A002  (TransformerLens' name)
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: Sequence[str] | None = None,
    ) -> LensHandle:
        """Add a hook.

        Args:
            hook: called as ``hook(tensor, hook=point)``. On the value: the tensor that flows, so that an in-place edit
                takes effect. On the gradient: a copy, in-place edits of which take effect as well.
            dir: ``"fwd"`` for the value, ``"bwd"`` for the gradient of what comes out of this point.
            is_permanent: stays unless a removal says ``including_permanent=True``.
            level: recorded in the handle, for removals that name a level.
            prepend: before the hooks that are there.
            alias_names: call the hook once per name, with a point of that name, each on what the one before returned.

        Returns:
            The handle.

        Raises:
            DirectionError: ``dir`` is neither.
            HookSignatureError: the hook cannot be called as ``hook(tensor, hook=point)``.
        """
        if dir not in ("fwd", "bwd"):
            raise DirectionError(f"a hook is added to 'fwd' or 'bwd', got dir={dir!r}")
        _check_callable(hook)
        default = Order.EDIT if dir == "fwd" else Order.EDIT_GRADIENT
        order = Order.FIRST if prepend else getattr(hook, "order", default)
        tap = getattr(hook, "tap_class", PointHook)(
            self, hook, dir, order, is_permanent=is_permanent, aliases=tuple(alias_names or ())
        )
        listed = self.fwd_hooks if dir == "fwd" else self.bwd_hooks
        if dir == "fwd":
            inner = attach(self, tap.on_output, "fwd", order=order)
        else:
            for_call = tap.for_call if hasattr(hook, "for_call") else None
            inner = attach_gradient(
                self, GradOutputHook(tap.on_grad, order, self.name or type(self).__name__, for_call)
            )
        registration = PointRegistration(inner, listed)
        registration.lens = handle = LensHandle(registration, is_permanent, level, hook)
        listed.insert(0 if prepend else len(listed), handle)
        return handle

    def add_perma_hook(self, hook: Callable[..., Any], dir: Literal["fwd", "bwd"] = "fwd") -> LensHandle:  # noqa: A002
        """Add a hook that only ``including_permanent=True`` removes."""
        return self.add_hook(hook, dir=dir, is_permanent=True)

    def has_hooks(
        self,
        dir: PointDirection = "both",  # noqa: A002
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether a hook is here that these arguments mean."""
        return any(handle.matches(including_permanent, level) for handle in self.handles(dir))

    def remove_hooks(
        self,
        dir: PointDirection = "fwd",  # noqa: A002
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the hooks that were added here and that these arguments mean; other hooks on this module stay.

        Note the default of ``dir``, which is TransformerLens'.
        """
        for handle in self.handles(dir):
            if handle.matches(including_permanent, level):
                handle.hook.remove()

    def handles(self, dir: PointDirection = "both") -> list[LensHandle]:  # noqa: A002
        """The handles of one direction, or of both, as a new list.

        Raises:
            DirectionError: unknown direction.
        """
        check_direction(dir)
        return [*(self.fwd_hooks if dir != "bwd" else ()), *(self.bwd_hooks if dir != "fwd" else ())]

    def clear_context(self) -> None:
        """Give ``ctx`` a new dict."""
        self.ctx = {}

    def enable_reshape(self, hook_conversion: Any = None) -> None:
        """Show hooks the value in another layout, and bring what they return back; None ends that.

        Args:
            hook_conversion: an object with ``convert(value)`` and ``revert(value)``, or the two functions as a tuple.
                Gradients pass through it as well.
        """
        self.hook_conversion = as_conversion(hook_conversion)

    def layer(self) -> int:
        """The layer in the name: the second part, as in ``"blocks.3.hook_z"``, or else the first that is a number.

        Raises:
            ValueError: no name, or none of its parts is a number.
        """
        return _layer_in(self.name)

    def __repr__(self) -> str:
        bits = [] if self.name is None else [f"name={self.name!r}"]
        bits += [f"{len(self.fwd_hooks)} fwd"] if self.fwd_hooks else []
        bits += [f"{len(self.bwd_hooks)} bwd"] if self.bwd_hooks else []
        return f"{type(self).__name__}({', '.join(bits)})"


class AliasedHookPoint:
    """A hook point as a hook sees it under another name; everything else is the point's."""

    def __init__(self, name: str, point: HookPoint) -> None:
        self.name = name
        self._point = point

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_point":  # asked for while a copy is being made
            raise AttributeError(attribute)
        return getattr(self._point, attribute)

    def layer(self) -> int:
        """The layer in this name."""
        return _layer_in(self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r} of {self._point!r})"


class PointHook:
    """A user's hook at a point, as torch calls it."""

    __slots__ = ("aliases", "direction", "hook", "order", "permanent", "point")

    def __init__(
        self,
        point: HookPoint,
        hook: Callable[..., Any],
        direction: str,
        order: int,
        *,
        is_permanent: bool,
        aliases: tuple[str, ...],
    ) -> None:
        self.point = point
        self.hook: Any = hook
        self.direction = direction
        self.order = order
        self.permanent = is_permanent
        self.aliases = aliases

    def __repr__(self) -> str:
        return f"{type(self).__name__}({hook_name(self.hook)} at {self.point.name!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PointHook:
        import copy

        point = copy.deepcopy(self.point, memo)
        made = type(self)(
            point, self.hook, self.direction, self.order, is_permanent=self.permanent, aliases=self.aliases
        )
        memo[id(self)] = made
        return made

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Show the hook the value."""
        return self._ask(output, is_copy=False)

    def for_call(self) -> Callable[..., Any]:
        """:meth:`on_grad` for the call of the point that is under way."""
        return partial(self.on_grad, hook=self.hook.for_call())

    def on_grad(self, module: nn.Module, grads: tuple[Tensor | None, ...], hook: Any = None) -> Any:
        """Show the hook the gradient; what it returns is brought back to the scale of the model."""
        if len(grads) > 1:  # the value is a tuple; so is what the hook sees
            return self._ask(grads, is_copy=False, hook=hook)
        (grad,) = grads
        if grad is None:
            return None
        scale = self.point.backward_scale
        observes = getattr(self.hook, "observes", False)
        seen = grad * scale if scale != 1 else grad if observes else grad.clone()
        returned = self._ask(seen, is_copy=not observes, hook=hook)
        if returned is None:
            return None
        if isinstance(returned, tuple) and len(returned) == 1:
            (returned,) = returned
        return (returned if scale == 1 else self._unscaled(returned, scale),)

    def _unscaled(self, grad: Tensor, scale: float) -> Tensor:
        if scale == 0:
            raise EditError(
                f"the gradient at {self.point.name!r} is shown times backward_scale=0, so one that a hook returns "
                "cannot be brought back; return None, or set another scale"
            )
        return grad / scale

    def _ask(self, value: Any, *, is_copy: bool, hook: Any = None) -> Any:
        """What takes the place of ``value``, or None."""
        conversion = self.point.hook_conversion
        current = shown = value if conversion is None else conversion.convert(value)
        before = version_of(shown)
        replaced = False
        for point in self._points():
            returned = (hook or self.hook)(current, hook=point)
            if returned is not None:
                current, replaced = returned, True
        if not replaced:
            if version_of(shown) == before:
                return None
            if not is_copy and (conversion is None or shares_memory(shown, value)):
                return None  # the in-place edit has already reached the model's own tensor
        return current if conversion is None else conversion.revert(current)

    def _points(self) -> list[Any]:
        return [AliasedHookPoint(name, self.point) for name in self.aliases] or [self.point]


def check_direction(direction: str) -> None:
    """Refuse what is neither a direction of hook points nor ``"both"``.

    Raises:
        DirectionError: it is not.
    """
    if direction not in ("fwd", "bwd", "both"):
        raise DirectionError(f"a direction of a hook point is 'fwd', 'bwd' or 'both', got {direction!r}")


def hook_name(hook: Any) -> str:
    """A hook's name for people: never the repr of what it holds, which may be large."""
    inner = getattr(hook, "func", None)
    if inner is not None:
        return f"partial({hook_name(inner)}, ...)"
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def _check_callable(hook: Any) -> None:
    if not callable(hook):
        raise HookSignatureError(f"a hook is a callable (tensor, hook), got {hook!r}")
    if getattr(hook, "observes", False):
        return
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # some builtins have none; the call itself will tell
        return
    try:
        signature.bind(None, hook=None)
    except TypeError:
        raise HookSignatureError(
            f"a hook at a hook point is called as hook(tensor, hook=point), but {hook_name(hook)!r} takes {signature}"
        ) from None


def _layer_in(name: str | None) -> int:
    if name is None:
        raise ValueError("this hook point has no name yet, so no layer; call setup() on the root of the model")
    parts = name.split(".")
    for part in (*parts[1:2], *parts):
        if part.isdecimal():
            return int(part)
    raise ValueError(f"no part of the name {name!r} is a layer number, as in 'blocks.3.hook_z'")
