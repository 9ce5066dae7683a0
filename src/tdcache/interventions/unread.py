"""The warning for an edit of a value that nothing reads, such as the attention weights that a module only reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdcache.errors import TdcacheWarning, listed, warn_user
from tdcache.hooks import MultiHookHandle, bracket
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import leaves
from tdcache.types import Pick

__all__ = ["UnreadWatch"]

_ABOUT = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")
"""What may be asked of a tensor without using its values."""


class UnreadWatch(Transient):
    """Looks, in the first forward of a model, whether any operation takes the edited tensors; warns if none does.

    Args:
        pick: which tensor of each site's value is edited, for the message.
    """

    def __init__(self, pick: Pick) -> None:
        self.pick = pick
        self._edited: dict[str, Tensor] = {}
        self._read: set[int] = set()
        self._mode: _Arguments | None = None
        self._own = MultiHookHandle()

    def attach(self, model: nn.Module, handle: MultiHookHandle) -> None:
        """Listen until the first forward is over, or the handle is removed."""
        bracket(model, self._begin, self._end, self._own)
        handle.add(self._own)

    def note(self, path: str, value: Tensor) -> None:
        """The value at one site after the edit."""
        if self._mode is not None:
            self._edited[path] = value

    def seen(self, value: Any) -> None:
        """An operation takes ``value``, or the model returns it."""
        if self._edited:
            self._read.update(id(tensor) for _, tensor in leaves(value))

    def _begin(self, module: nn.Module, args: Any) -> None:
        if self._mode is None and not torch.compiler.is_compiling():
            self._mode = _Arguments(self)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        mode, self._mode = self._mode, None
        if mode is None:
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._own.remove()
        self.seen(output)
        edited, self._edited = self._edited, {}
        unread = [path for path, tensor in edited.items() if id(tensor) not in self._read]
        if unread and output is not None:  # None: the forward raised
            warn_user(
                f"nothing reads the edited value that pick={self.pick!r} means at {listed(unread)}, so the edit "
                "changed no result: a module may return it as a report only, as attention does with its weights. "
                "Edit the value that is passed on (the first, without pick=), or where it is computed",
                TdcacheWarning,
            )


class _Arguments(TorchFunctionMode):
    """Shows the arguments of every operation to a watch."""

    def __init__(self, watch: UnreadWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Show them, and run the operation."""
        asked = getattr(getattr(func, "__self__", None), "__name__", "")
        if not (getattr(func, "__name__", "") == "__get__" and asked in _ABOUT):
            self.watch.seen((args, kwargs))
        return func(*args, **(kwargs or {}))
