"""Path patching: changes the edge from one site to another, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Unpack

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import EditError
from tdcache.function_calls.sites import CallSite, is_call
from tdcache.function_calls.stand_in import check_selector
from tdcache.hooks import MultiHookHandle, port_at
from tdcache.interventions.base import Intervention, InterventionContext, entry_of, with_inputs_of, write_outputs
from tdcache.interventions.edit_tap import EditTap, ReadTap, RegionEdit, attach_taps
from tdcache.interventions.memory import Memory
from tdcache.interventions.options import EditKeywords, Side
from tdcache.interventions.patching import KeepPart, Paste, Recalled
from tdcache.interventions.random_state import SharedRandomState
from tdcache.modules import HookedModule
from tdcache.regions import Region
from tdcache.selection import Selection, Site
from tdcache.types import CacheKey, Selector

__all__ = ["PathPatching"]


class _Paths:
    """The recorded values at the three kinds of sites of one bound model."""

    def __init__(self) -> None:
        self.sent = Memory("first")
        self.frozen = Memory("receiving")
        self.received = Memory("edge")


class PathPatching(Intervention):
    r"""Patches only the edge from one site to another; everything else is frozen to the values of the receiving run.

    Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593; Goldowsky-Dill et al. 2023, arXiv:2304.05969.
    As in :class:`ActivationPatching` the sender's value comes from the first input, ``data[in_key]``, and goes into the
    run on ``data[patch_key, in_key]`` (or, with ``source``, from there into the run on ``data[in_key]``). That run is
    repeated three times: unchanged, to record the ``freeze`` sites; with the sender's value pasted and the frozen sites
    fixed, to record the receiver's input; and with only the receiver's input pasted.

    Args:
        sender: the module whose output is sent, or several, for the paths from all of them.
        receiver: the module whose input is changed; ``""`` cannot be one.
        freeze: the modules to freeze between them, for instance ``r"h\.\d+\.(attn|mlp)"``: everything that writes to
            the residual stream. The sender and the modules that contain it are never frozen, nor is a receiver whose
            output is changed. Modules that are not frozen let indirect paths through.
        source: a cache by path with the sender's value, instead of a first input.
        patch_key: the key of the second input.
        receiver_direction: ``"fwd_pre"`` to change the receiver's input, ``"fwd"`` its output. With ``names=`` the
            value of the receiver's name is changed.
        **options: the part of the sender's value to send: ``positions``, ``heads`` (with ``direction="fwd_pre"`` at the
            projection after the heads) and the others of :class:`tdcache.EditOptions`, without ``steps`` and ``calls``.
            ``pick`` and ``match`` apply to all sites.

    Raises:
        SelectionError: a selector matches nothing.
        ContextError: a call lacks the second input.
    """

    def __init__(
        self,
        sender: Selector,
        receiver: Selector,
        *,
        freeze: Selector,
        source: TensorDictBase | Mapping[str, Tensor] | None = None,
        patch_key: CacheKey = "patched",
        receiver_direction: Side = "fwd_pre",
        **options: Unpack[EditKeywords],
    ) -> None:
        super().__init__(sender, **options)
        if self.steps is not None or self.calls is not None:
            raise EditError("path patching calls the model itself, and patches every call; leave steps= and calls= out")
        for each in (receiver, freeze):
            check_selector(each, self.match)
        self.sender = sender
        self.receiver = receiver
        self.freeze = freeze
        self.source = source
        self.patch_key = patch_key
        self.receiver_direction: Side = receiver_direction

    def edit_at(self, site: Site, context: InterventionContext) -> RegionEdit:
        """The edit that sends the value while the receiver's input is recorded."""
        return Paste(site.path, Recalled(context.state.sent, site.path), is_part=self.source is None)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, senders = module.hooking_context, self.select(module)
        context.state = state = context.state or _Paths()
        if self.source is not None:
            state.sent.values = {
                path: [entry_of(self.source, path, self.direction, "source=")] for path in senders.paths
            }
        held = context.select(self.freeze, match=self.match)
        receivers = context.select(self.receiver, match=self.match)
        side: Side = self.receiver_direction if self.names is None else "fwd"  # a name is one value
        ends = [self._module_path(path) for path in (*senders.paths, *(receivers.paths if side == "fwd" else ()))]
        loose = [site for site in held if not any(_is_part(path, self._module_path(site.path)) for path in ends)]
        held = Selection(loose, selector=self.freeze, model_name=held.model_name)
        handle = self.hook_sites(module, senders)
        with handle.installing():
            if self.source is None:
                for site in senders:
                    part = KeepPart(state.sent, context.current_call, self.region_at(site.path))
                    self.add_reads(handle, [site], part)
            self._hold(handle, held, state.frozen, "fwd")
            self._hold(handle, receivers, state.received, side)
        return handle

    def _module_path(self, path: str) -> str:
        """The path of the module at a site, or of the module whose forward computes a name's value."""
        return path if self.names is None else self.names[path].path.partition("::")[0]

    def _hold(self, handle: MultiHookHandle, sites: Selection, memory: Memory, side: Side) -> None:
        """Record the values at the sites in one run and paste them in another."""
        for site in sites:
            paste = Paste(site.path, Recalled(memory, site.path))
            port = port_at(site.path, side, self.pick)
            attach_taps(site.module, handle, EditTap(port, paste, region=Region()), ReadTap(port, memory.record))

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        state: _Paths = module.hooking_context.state
        random = SharedRandomState(module.model)
        in_keys, out_keys = list(module.in_keys), list(module.out_keys)
        if self.source is None:
            base = with_inputs_of(data, self.patch_key, in_keys, self)
            with state.sent.recording(), random.run():
                forward(data)
        else:
            base = data
        with state.frozen.recording(), random.run():
            forward(base.copy())
        with state.sent.recalling(), state.frozen.recalling(), state.received.recording(), random.run():
            forward(base.copy())
        with state.received.recalling(), random.run():
            forward(base)
        if self.source is None:
            write_outputs(data, self.patch_key, base, out_keys)
        return data


def _is_part(path: str, whole: str) -> bool:
    """Whether ``path`` is ``whole`` or within it; a call is within its module, and within no other call."""
    if is_call(whole):
        return path == whole
    host = CallSite.parse(path).path if is_call(path) else path
    return f"{host}.".startswith(f"{whole}.")
