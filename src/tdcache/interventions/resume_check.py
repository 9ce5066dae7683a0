"""Checks whether layers may be skipped in a forward: one complete run that looks for side channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tdcache.errors import EditError, listed
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.hooks.replaced_forward import ReplacedForward
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import is_entries
from tdcache.interventions.random_state import SharedRandomState
from tdcache.interventions.replay import MemberTap, SideChannels
from tdcache.introspect import post_hooks, pre_hooks

__all__ = ["check_once"]

# Results by model and path: the layers whose state is read elsewhere.
_CHECKED: WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]] = WeakKeyDictionary()


def check_once(
    model: nn.Module,
    path: str,
    skipped: Mapping[str, nn.Module],
    replaced: Sequence[ReplacedForward],
    handle: MultiHookHandle,
) -> None:
    """Watch the first call of a model for side channels of the layers to skip."""
    check = _Check(model, path, skipped, replaced)
    handle.add(attach(model, check.on_call, "fwd_pre_kwargs", order=Order.FIRST))


class _Check(Transient):
    order = Order.FIRST

    def __init__(
        self, model: nn.Module, path: str, skipped: Mapping[str, nn.Module], replaced: Sequence[ReplacedForward]
    ) -> None:
        self.path = path
        self.skipped = skipped
        self.replaced = replaced
        self.found = _CHECKED.setdefault(model, {})

    def on_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The model is called: run it completely first, unless that was done before."""
        if self.path not in self.found:
            self.found[self.path] = self._leaking(module, args, kwargs)
        leaking = self.found[self.path]
        if leaking:
            raise EditError(
                f"resuming after {self.path!r} leaves {listed(leaking)} out, but later layers read more of that than "
                "its output, such as a dict or a cache that it fills; run the model from its start"
            )

    def _leaking(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[str, ...]:
        channels = SideChannels()
        with _as_it_is(model), torch.no_grad():
            for each in self.replaced:
                each.mute()
            handle = MultiHookHandle()
            try:
                for path, module in self.skipped.items():
                    MemberTap(path, channels).attach(module, handle)
                with channels:
                    model.forward(
                        *map(_of_ones_own, args), **{name: _of_ones_own(each) for name, each in kwargs.items()}
                    )
            finally:
                handle.remove()
                for each in self.replaced:
                    each.unmute()
        return tuple(sorted(channels.leaking))


def _of_ones_own(argument: Any) -> Any:
    """A copy of an argument that the run may change, such as a cache or a TensorDict."""
    if isinstance(argument, Tensor) or argument is None:
        return argument
    return argument.copy() if is_entries(argument) else copy.deepcopy(argument)


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Disable hooks inside the block, and restore random states and buffers after it."""
    hooks = [(each, dict(each)) for module in model.modules() for each in (post_hooks(module), pre_hooks(module))]
    buffers = [(each, each.clone()) for each in model.buffers()] if model.training else []
    random = SharedRandomState(model)
    with random.run():
        pass
    try:
        for each, _ in hooks:
            each.clear()
        with random.run():
            yield
    finally:
        for each, there in hooks:
            each.update(there)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
