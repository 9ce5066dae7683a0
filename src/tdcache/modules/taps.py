"""The hooks that implement the verbs of a hooked module: one takes the value at a path, one replaces it.

They differ from the taps of a caching context in that they serve one path, resolve proxies when they fire, and write to
any cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.cache.keep import Keep, Transfers
from tdcache.cache.target import Target
from tdcache.current_call import CurrentCall
from tdcache.errors import CaptureError, EditError, RepeatedCallWarning, warn_user
from tdcache.hooks.directions import Direction
from tdcache.hooks.factory import CacheProxy, read_at, write_at
from tdcache.hooks.port import port_at
from tdcache.hooks.registrations import Order
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import check_dense, exchanged, leaves, pick_tensor, tensor_only
from tdcache.inplace import InplaceWatch
from tdcache.introspect import in_backward
from tdcache.modules.lazy import Lazy, NoValueYet, resolved
from tdcache.modules.value_part import ValuePart
from tdcache.reducers import Reducer
from tdcache.types import CacheKey, Hold, Pick

__all__ = ["Forwards", "GetTap", "SetTap", "SkipTap", "ValueProxy"]


class Forwards(Transient):
    """Counts the forwards of a model: a pre-hook on its root."""

    order = Order.FIRST

    def __init__(self) -> None:
        self.count = 0

    def on_forward(self, module: nn.Module, args: Any) -> None:
        """Count one more forward."""
        self.count += 1


class ValueProxy(Lazy, CacheProxy):
    """The value of a ``get`` or ``save``: made before the forward, resolved when it is needed.

    It can be passed to a ``set`` of this or another run and to ``ActivationPatching(source=...)``, and be used in
    computations: ``proxy[:, -1] * 2 + bias`` and ``torch.relu(proxy)`` are evaluated when their result is needed. After
    the run, ``proxy.value`` is the tensor. A proxy keeps its value and the cache alive, and is not affected by another
    ``get`` that later writes to the same key.
    """

    def __init__(self, key: CacheKey, cache: Any, path: str) -> None:
        self._key = key
        self._held = cache
        self.path = path
        """The path at which the value is taken."""
        self._value: Any = None
        self._watch = InplaceWatch()

    @property
    def key(self) -> CacheKey:
        """The key of the value in the cache."""
        return self._key

    def resolve(self) -> Any:
        """The value, or None if the site has not fired yet.

        Raises:
            InplaceModificationError: an in-place operation has overwritten it.
        """
        self.check()
        return self._value

    def check(self) -> None:
        """Raise if the kept value has been overwritten.

        Raises:
            InplaceModificationError: it names the path and the remedy.
        """
        self._watch.check()

    def write(self, value: Any) -> None:
        """Write the value to the cache and keep the stored entry, since others may write to the same key."""
        cache = self._held.resolve() if hasattr(self._held, "resolve") else self._held
        if cache.is_locked:
            Target(cache, None, 0).put(self._key, value)
        else:
            cache[self._key] = value
        self._value = stored = cache.get(self._key)
        self._watch.clear()
        if stored is value:
            self._watch.add(self.path, value)

    def same_entry(self, other: ValueProxy) -> bool:
        """Whether both write to one key of one cache."""
        return self._held is other._held and self._key == other._key


class GetTap(Transient):
    """Takes the value at one path and hands it to its proxy."""

    __slots__ = (
        "call", "callback", "fired", "forwards", "keep", "order", "path", "port", "proxy", "reducer", "row", "seen",
        "warned", "watch", "where",
    )  # fmt: skip

    def __init__(
        self,
        proxy: ValueProxy,
        row: Direction,
        *,
        callback: Callable[..., Any] | None,
        pick: Pick,
        hold: Hold,
        forwards: Forwards | None,
        order: int,
        where: ValuePart,
        reducer: Reducer | None = None,
    ) -> None:
        if callback is not None and not where.whole:
            raise EditError(_callback_sees_all(proxy.path))
        self.where = where
        self.call: CurrentCall | None = None
        self.reducer = reducer
        self.watch = InplaceWatch()
        self.path = proxy.path
        self.proxy = proxy
        self.row = row
        self.callback = callback
        self.port = port_at(proxy.path, row.name, pick)
        self.keep = Keep(hold=hold)
        self.forwards = forwards
        self.order = order
        self.fired = self.warned = False
        self.seen = -1

    @property
    def use(self) -> str:
        """How the tap uses a value derived from an attention call: it follows its graph, or reads it."""
        return "watch" if self.row.gradient or self.keep.hold == "live" else "read"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.row.name!r})"

    def clashes_with(self, other: GetTap) -> bool:
        """Whether the other tap writes a different value to the same entry of the same cache."""
        if not self.proxy.same_entry(other.proxy):
            return False
        mine, its = ((tap.row, tap.order, tap.callback, tap.reducer, tap.where.steps) for tap in (self, other))
        return mine != its or not (self.where.whole and other.where.whole)

    def on_call(self, *args: Any) -> None:
        """Take the value of this call, or its gradient, and pass it to the callback if there is one."""
        if not self.row.gradient and in_backward():  # the recomputation of a checkpoint
            return
        if self.call is not None and not self.call.is_due(self.path):
            return
        if self.callback is None:
            picked = _picked_at(self.port, self.row, args)
            if not self.where.whole:
                picked = self.where.take(self.path, picked, self.call)
                if picked is None:
                    return
            kept = self.keep(picked, Transfers())
        else:
            named = dict(zip(self.row.params, args, strict=True))
            kept = self.callback(**named, key=self.proxy.key, direction=self.row.name)
            if not isinstance(kept, Tensor | TensorDictBase):
                raise CaptureError(
                    f"callback= returned {type(kept).__name__} at {self.path!r}; a cache holds tensors or TensorDicts",
                    paths=(self.path,),
                )
        self._note_call()
        if self.reducer is None:
            self.proxy.write(kept)
            return
        check_dense(kept, self.path)
        if self.reducer.aliases and isinstance(kept, Tensor):
            self.watch.add(self.path, kept)
        self.reducer.update(kept)

    def finish(self) -> None:
        """The run has ended: write the reduced values, and check for values that were overwritten.

        Raises:
            InplaceModificationError: a kept value was overwritten.
        """
        self.watch.check()
        if self.reducer is not None and self.fired:
            self.proxy.write(self.reducer.compute())
        self.proxy.check()

    def _note_call(self) -> None:
        self.fired = True
        count = -1 if self.forwards is None else self.forwards.count
        if count >= 0 and self.seen >= 0 and self.reducer is None and not self.warned:
            self.warned = True
            when = "in one forward" if self.seen == count else "in this run, as in generate(),"
            warn_user(
                f"{self.path!r} ran more than once {when} and only the last value is kept; keep every one with "
                "reducer=Stack(), or say with steps= or reducer=Last() which is meant",
                RepeatedCallWarning,
            )
        self.seen = count


def _picked_at(port: Any, row: Direction, args: tuple[Any, ...]) -> Any:
    """The picked tensor among the arguments of a hook of any direction.

    Raises:
        CaptureError: there is no such tensor.
    """
    if not row.gradient:
        return read_at(port, row, args)
    return tensor_only(pick_tensor(args[row.value_index], port.pick, port.path), port.pick, port.path)


def _callback_sees_all(path: str) -> str:
    return (
        f"callback= at {path!r} sees the whole value, and positions= or units= mean part of it; choose the part in the "
        "callback, or compute with the proxy of a get"
    )


class SetTap(Transient):
    """Replaces the value at one path by a tensor, the value of a proxy, or the result of a callback."""

    __slots__ = ("call", "callback", "fired", "order", "path", "port", "row", "value", "where")

    def __init__(
        self,
        path: str,
        row: Direction,
        value: Any,
        *,
        callback: Callable[..., Any] | None,
        pick: Pick,
        order: int,
        where: ValuePart,
    ) -> None:
        if callable(pick):
            raise EditError(f"a callable pick= cannot say where to put the value at {path!r}; use an index or a key")
        if value is None and callback is None:
            raise EditError(f"there is nothing to set at {path!r}: give a value, a proxy, or callback=")
        if callback is not None and not where.whole:
            raise EditError(_callback_sees_all(path))
        self.where = where
        self.call: CurrentCall | None = None
        self.path = path
        self.row = row
        self.value = value
        self.callback = callback
        self.port = port_at(path, row.name, pick)
        self.order = order
        self.fired = False

    def __repr__(self) -> str:
        what = self.callback or (type(self.value).__name__ if isinstance(self.value, Tensor) else self.value)
        return f"{type(self).__name__}({self.path!r}, {self.row.name!r}, {what!r})"

    def on_call(self, *args: Any) -> Any:
        """Return the new value, with which torch replaces the old one."""
        if self.call is not None and not self.call.is_due(self.path):
            return None
        self.fired = True
        new = _needed(self.value, self.path)
        if not self.where.whole:
            new = self.where.put(self.path, _picked_at(self.port, self.row, args), new, self.call)
            return None if new is None else write_at(self.port, self.row, args, new)
        if self.callback is not None:
            named = dict(zip(self.row.params, args, strict=True))
            new = self.callback(**named, value=new, direction=self.row.name)
            if new is None:
                return None
            if isinstance(new, Tensor) and not self.row.gradient and not self._holds(args, new):
                new = new.clone()
        elif isinstance(new, Tensor) and not self.row.gradient:
            new = new.clone()  # a later in-place operation must not reach the caller's tensor
        return write_at(self.port, self.row, args, new)

    def _holds(self, args: tuple[Any, ...], new: Tensor) -> bool:
        """Whether a tensor is part of the value that is replaced."""
        return any(each is new for _, each in leaves(args[self.row.returns_index]))


class SkipTap:
    """Returns a value instead of running a module's forward."""

    __slots__ = ("fired", "path", "value")

    def __init__(self, path: str, value: Any) -> None:
        self.path = path
        self.value = value
        self.fired = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The value that the module returns; a fixed one is copied, so that in-place operations do not change it."""
        self.fired = True
        if callable(self.value):
            return self.value(*args, **kwargs)
        value = _needed(self.value, self.path)
        if isinstance(value, Tensor):
            return value.clone()
        return exchanged(value, iter([each.clone() for _, each in leaves(value)]))


def _needed(value: Any, path: str) -> Any:
    """``value`` with its proxies resolved, for use at ``path``.

    Raises:
        EditError: one of them has no value yet.
    """
    try:
        return resolved(value)
    except NoValueYet as error:
        raise EditError(
            f"{error.args[0]!r} has no value yet when {path!r} needs it; get it in an earlier run, or at a path "
            "that runs before this one"
        ) from None
