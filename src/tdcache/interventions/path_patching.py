"""Path patching: changing what one site tells another, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.hooks import MultiHookHandle, attach, port_at
from tdcache.interventions.base import Intervention, InterventionContext, Side, entry_of, with_inputs_of
from tdcache.interventions.edits import Edit, EditTap, ReadTap
from tdcache.interventions.memory import Memory
from tdcache.interventions.patching import Paste, Recalled
from tdcache.interventions.regions import Along, Region
from tdcache.modules import HookedModule
from tdcache.selection import Selection, Site, select
from tdcache.types import CacheKey, Match, Pick, Selector

__all__ = ["PathPatching"]


class _Paths:
    """What passes at the three kinds of sites of one bound model."""

    def __init__(self) -> None:
        self.sent = Memory("first")
        self.frozen = Memory("receiving")
        self.received = Memory("edge")


class PathPatching(Intervention):
    r"""Patches the edge from one site into another only; everything else is frozen to the receiving run.

    Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    As in :class:`ActivationPatching` the sender's value comes from the first input, ``data[in_key]``, and goes into the
    run on ``data[patch_key, in_key]`` (or, with ``source``, from there into the run on ``data[in_key]``). That run is
    done three times: as it is, to know the values of the ``freeze`` sites; with the sender's value pasted and the
    frozen sites held, to see what arrives at the receiver; and with only the receiver's input pasted.

    Args:
        sender: the module whose output is sent; several, for the paths from all of them.
        receiver: the module whose input is changed; ``""`` cannot be one.
        freeze: what is held between them, for instance ``r"h\.\d+\.(attn|mlp)"``: everything that writes to the
            residual stream. The sender is never held, nor what it is part of; likewise a receiver whose output is
            changed. What is not held lets indirect paths through.
        source: a cache by path with the sender's value, in place of a first input.
        positions: which positions of the sender's value are sent, all by default.
        units: which of its features are sent, for instance those of one head, with ``direction="fwd_pre"`` at the
            projection behind the heads.
        patch_key: where the second input is.
        receiver_direction: ``"fwd_pre"`` to change the receiver's input, ``"fwd"`` its output.
        direction: ``"fwd"`` to send the sender's output, ``"fwd_pre"`` its input.
        pick: which tensor of a structured value, at all sites.
        match: of all three selectors.
        position_dim: the axis of positions.
        unit_dim: the axis of units, counted from the end.

    Raises:
        SelectionError: a selector that matches nothing.
        ContextError: a call without the second input.
    """

    def __init__(
        self,
        sender: Selector,
        receiver: Selector,
        *,
        freeze: Selector,
        source: TensorDictBase | Mapping[str, Tensor] | None = None,
        positions: Along = None,
        units: Along = None,
        patch_key: CacheKey = "patched",
        receiver_direction: Side = "fwd_pre",
        direction: Side = "fwd",
        pick: Pick = None,
        match: Match = "full",
        position_dim: int = 1,
        unit_dim: int = -1,
    ) -> None:
        super().__init__(
            sender, positions=positions, units=units, direction=direction, pick=pick, match=match,
            position_dim=position_dim, unit_dim=unit_dim,
        )  # fmt: skip
        self.sender = sender
        self.receiver = receiver
        self.freeze = freeze
        self.source = source
        self.patch_key = patch_key
        self.receiver_direction: Side = receiver_direction

    def edit_at(self, site: Site, context: InterventionContext) -> Edit:
        """Send the value, while the edge is measured."""
        return Paste(site.path, Recalled(context.state.sent, site.path), self.region)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, senders = module.hooking_context, self.select(module)
        context.state = state = context.state or _Paths()
        if self.source is not None:
            state.sent.values = {
                path: [entry_of(self.source, path, self.direction, "source=")] for path in senders.paths
            }
        held = select(module.model, self.freeze, match=self.match)
        receivers = select(module.model, self.receiver, match=self.match)
        ends = (*senders.paths, *(receivers.paths if self.receiver_direction == "fwd" else ()))
        loose = [site for site in held if not any(f"{path}.".startswith(f"{site.path}.") for path in ends)]
        held = Selection(loose, selector=self.freeze, model_name=held.model_name)
        handle = self.hook_sites(module, senders)
        with handle.installing():
            if self.source is None:
                self.add_reads(handle, senders, state.sent)
            self._hold(handle, held, state.frozen, "fwd")
            self._hold(handle, receivers, state.received, self.receiver_direction)
        return handle

    def _hold(self, handle: MultiHookHandle, sites: Selection, memory: Memory, side: Side) -> None:
        """Let the values at the sites be recorded in one run and put in place in another."""
        for site in sites:
            paste = Paste(site.path, Recalled(memory, site.path), Region())
            port = port_at(site.path, side, self.pick)
            edit, read = EditTap(port, paste, region=Region()), ReadTap(port, memory.record)
            for tap in (edit, read):
                handle.add(attach(site.module, tap.on_call, port.direction, order=tap.order))

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        state: _Paths = module.hooking_context.state
        in_keys, out_keys = list(module.in_keys), list(module.out_keys)
        if self.source is None:
            base = with_inputs_of(data, self.patch_key, in_keys, self)
            with state.sent.recording():
                forward(data)
        else:
            base = data
        with state.frozen.recording():
            forward(base.copy())
        with state.sent.recalling(), state.frozen.recalling(), state.received.recording():
            forward(base.copy())
        with state.received.recalling():
            forward(base)
        if self.source is None:
            inner: Any = data.get(self.patch_key)
            for key in out_keys:
                if key != "_":
                    inner.set(key, base.get(key))
        return data
