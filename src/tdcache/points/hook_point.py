"""A hook point: an identity module that gives an intermediate value a name and a place for hooks.

The interface is that of TransformerLens' ``HookPoint``, with the same order of parameters, so that code written for it
runs unchanged. Without a module, an intermediate value in a forward has no path and cannot be selected.
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
    """The handle of one hook at a hook point, with the options it was added with."""

    hook: Removable
    """``handle.hook.remove()`` removes the hook from the point."""
    is_permanent: bool = False
    """Whether only ``including_permanent=True`` removes it."""
    context_level: int | None = None
    """The number of ``hooks()`` contexts that were open when it was added; None outside of any."""
    user_hook: Callable[..., Any] | None = None
    """The callable as the user gave it."""

    def matches(self, including_permanent: bool, level: int | None) -> bool:
        """Whether a removal or listing with these arguments includes this hook."""
        return (including_permanent or not self.is_permanent) and level in (None, self.context_level)


class PointRegistration:
    """Removes a hook from torch and from the list of its point, and ``extra`` with it."""

    __slots__ = ("extra", "inner", "lens", "listed")

    def __init__(self, inner: Removable, listed: list[LensHandle]) -> None:
        self.inner = inner
        self.listed = listed
        self.lens: LensHandle | None = None
        self.extra: Removable | None = None

    def remove(self) -> None:
        """Remove the hook; a second call does nothing."""
        self.inner.remove()
        if self.lens is not None and self.lens in self.listed:
            self.listed.remove(self.lens)
        extra, self.extra = self.extra, None
        if extra is not None:
            extra.remove()


class HookPoint(nn.Module):
    """Returns its input; hooks added here see the value, under a name, and may replace it.

    A hook is called as ``hook(tensor, hook=point)``; a return value other than None replaces the tensor (with
    ``dir="bwd"``, the gradient). Without hooks a call costs as much as ``nn.Identity``. Since a point is a module with
    a path, every selector, cache and intervention of this library can use it. Hooks that edit run before those that
    cache, in the order in which they were added; a copy of the model has its own hooks.

    Attributes:
        name: the dotted path below the root; set by the root's ``setup()``.
        ctx: scratch space for hooks.
        fwd_hooks: the handles of the hooks on the value.
        bwd_hooks: the handles of the hooks on its gradient.
        hook_conversion: see :meth:`enable_reshape`.
        backward_scale: hooks and caches see the gradient multiplied by this; the model's gradient does not change.
        pos_dim: the axis of ``pos_slice``; None for the usual one.

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
            hook: called as ``hook(tensor, hook=point)``, with the model's own tensor, or with a copy of the gradient.
                In-place edits take effect in both cases.
            dir: ``"fwd"`` for the value, ``"bwd"`` for the gradient of the point's output.
            is_permanent: only ``including_permanent=True`` removes it.
            level: recorded in the handle, for removals that name a level.
            prepend: add it before existing hooks.
            alias_names: call the hook once per name, with a point of that name, each on the result of the previous one.

        Returns:
            The handle.

        Raises:
            DirectionError: ``dir`` is neither ``"fwd"`` nor ``"bwd"``.
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
        """Whether there is a hook that matches these arguments."""
        return any(handle.matches(including_permanent, level) for handle in self.handles(dir))

    def remove_hooks(
        self,
        dir: PointDirection = "fwd",  # noqa: A002
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove the hooks that were added here and match these arguments; other hooks on this module stay.

        Note that ``dir`` defaults to ``"fwd"``, as in TransformerLens.
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
        """Show the value to hooks in another layout, and convert their results back; None disables this.

        Args:
            hook_conversion: an object with ``convert(value)`` and ``revert(value)``, or the two functions as a tuple.
                Gradients pass through it as well.
        """
        self.hook_conversion = as_conversion(hook_conversion)

    def layer(self) -> int:
        """The layer in the name: its second part, as in ``"blocks.3.hook_z"``, otherwise the first numeric part.

        Raises:
            ValueError: the point has no name, or no part of the name is a number.
        """
        return _layer_in(self.name)

    def __repr__(self) -> str:
        bits = [] if self.name is None else [f"name={self.name!r}"]
        bits += [f"{len(self.fwd_hooks)} fwd"] if self.fwd_hooks else []
        bits += [f"{len(self.bwd_hooks)} bwd"] if self.bwd_hooks else []
        return f"{type(self).__name__}({', '.join(bits)})"


class AliasedHookPoint:
    """A hook point under another name; all other attributes are those of the point."""

    def __init__(self, name: str, point: HookPoint) -> None:
        self.name = name
        self._point = point

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_point":  # looked up by copy before it is set
            raise AttributeError(attribute)
        return getattr(self._point, attribute)

    def layer(self) -> int:
        """The layer in this name."""
        return _layer_in(self.name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r} of {self._point!r})"


class PointHook:
    """Adapts a user's hook at a point to torch's hook signature."""

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
        """Call the hook with the value."""
        return self._ask(output, is_copy=False)

    def for_call(self) -> Callable[..., Any]:
        """:meth:`on_grad` for the current call of the point."""
        return partial(self.on_grad, hook=self.hook.for_call())

    def on_grad(self, module: nn.Module, grads: tuple[Tensor | None, ...], hook: Any = None) -> Any:
        """Call the hook with the scaled gradient; its result is scaled back."""
        if len(grads) > 1:  # the value is a tuple, and so is its gradient
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
        """The hook's replacement for ``value``, or None."""
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
    """Refuse anything but a direction of hook points or ``"both"``.

    Raises:
        DirectionError: ``direction`` is something else.
    """
    if direction not in ("fwd", "bwd", "both"):
        raise DirectionError(f"a direction of a hook point is 'fwd', 'bwd' or 'both', got {direction!r}")


def hook_name(hook: Any) -> str:
    """The name of a hook for display; never the repr of the objects it holds, which may be large."""
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
    except (TypeError, ValueError):  # some builtins have no signature; calling them will show
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
