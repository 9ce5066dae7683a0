"""From the tensor that a hook sees to the one that is kept: slice, detach or copy, cast, move.

The order matters: slicing first means that only the part that is kept is copied, cast and moved, and that a small slice
does not keep the memory of the whole activation alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, get_args

import torch
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.inplace import shares_memory
from tdcache.options import as_device
from tdcache.types import Hold, Index

__all__ = ["Keep", "Transfers", "detach_all"]


class Transfers(set[torch.device]):
    """The accelerators from which copies to pinned memory have not finished."""

    def to_cpu(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Start copying ``tensor`` to pinned memory; readable after :meth:`wait`."""
        source = tensor if dtype is None else tensor.to(dtype)
        pinned = torch.empty_like(source, device="cpu", pin_memory=True)
        pinned.copy_(source, non_blocking=True)
        self.add(source.device)
        return pinned

    def wait(self) -> None:
        """Wait until every copy has finished."""
        while self:
            torch.accelerator.current_stream(self.pop()).synchronize()


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What is kept of a tensor; the options are those of :class:`tdcache.ActivationCaching`."""

    hold: Hold = "detached"
    index: Index = None
    dtype: Any = None
    """A ``torch.dtype`` or the name of one."""
    device: Any = None
    """A ``torch.device`` or the name of one."""
    plain: bool = field(init=False)
    """Whether the tensor is kept unmodified, apart from its graph."""

    def __post_init__(self) -> None:
        if self.hold not in get_args(Hold):
            raise ValueError(f"hold is one of {', '.join(map(repr, get_args(Hold)))}, got {self.hold!r}")
        if isinstance(self.index, str):
            raise ValueError(
                f"index= is what a tensor is indexed with, such as (slice(None), -1), got {self.index!r}; an entry of "
                "a structured value is pick="
            )
        given = self.dtype
        dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
        if given is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype= is a torch.dtype or the name of one, such as 'float16', got {given!r}")
        object.__setattr__(self, "dtype", dtype)
        device = None if self.device is None else as_device(self.device)
        object.__setattr__(self, "device", device)
        plain = self.hold != "snapshot" and self.index is None and dtype is None and device is None
        object.__setattr__(self, "plain", plain)

    def __call__(self, tensor: Tensor, transfers: Transfers) -> Tensor:
        """The kept tensor: ``tensor`` itself or an alias of it, unless an option requires a copy.

        A slice is copied, so that it does not keep the whole activation alive; so is an inference tensor, which has no
        version counter to detect a later in-place operation by.
        """
        kept = tensor if self.hold == "live" or not tensor.requires_grad else tensor.detach()
        if self.dtype is not None and kept.is_complex() and not self.dtype.is_complex:
            raise CaptureError(
                f"dtype={self.dtype} would discard the imaginary part of a {kept.dtype} value; use a complex dtype, or "
                "callback= to keep the real part or the magnitude"
            )
        if self.index is not None:
            kept = self._copied(kept[self.index], of=tensor)
        kept = self._moved(kept, transfers)
        if self.hold == "snapshot" or tensor.is_inference():
            kept = self._copied(kept, of=tensor)
        return kept

    def _moved(self, kept: Tensor, transfers: Transfers) -> Tensor:
        device = self.device or kept.device
        if device == kept.device or device == torch.device(kept.device.type):
            return kept if self.dtype is None else kept.to(self.dtype)
        leaves_accelerator = device.type == "cpu" and kept.device.type in ("cuda", "xpu")
        if leaves_accelerator and not kept.requires_grad:
            return transfers.to_cpu(kept, self.dtype)
        return kept.to(device=device, dtype=self.dtype)

    @staticmethod
    def _copied(kept: Tensor, *, of: Tensor) -> Tensor:
        return kept.clone() if shares_memory(kept, of) else kept


def detach_all(values: dict[Any, Any]) -> list[Any]:
    """Release the graphs of ``values`` by detaching in place those that require grad.

    Returns:
        The keys of leaf tensors among them: parameters and inputs, which the optimiser or the user may write to.
    """
    if True not in map(_is_leaf, values.values()):  # the usual case: all have a graph
        values.update(zip(values, map(Tensor.detach, values.values()), strict=True))
        return []
    leaves = [key for key, value in values.items() if value.requires_grad and value.is_leaf]
    values.update({key: value.detach() for key, value in values.items() if value.requires_grad})
    return leaves


_is_leaf = attrgetter("is_leaf")
