"""Avoids recomputation: layers return their recorded outputs instead of running.

A layer may be skipped only if the rest of the model depends on its output alone. This is checked while the outputs are
recorded: see :class:`SideChannels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tdcache.errors import EditError
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.hooks.port import own_entries
from tdcache.hooks.replaced_forward import replace_forward
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import children, is_entries, leaves, with_parts
from tdcache.inplace import storage_address
from tdcache.selection import walk
from tdcache.types import CacheKey

__all__ = ["MemberTap", "ModuleOutput", "Recording", "SideChannels", "chain_members", "expanded"]


def chain_members(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost ``ModuleList``s and ``Sequential``s of a model: its layers."""
    found: dict[str, nn.Module] = {}
    candidates = [("", model), *walk(model)]
    for path, module in candidates:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            prefix = f"{path}." if path else ""
            found.update({f"{prefix}{name}": child for name, child in module.named_children()})
    return found


class SideChannels(TorchDispatchMode):
    """Finds modules that pass more than their output to the rest of the model: a dict that they fill, a shared cache.

    It records which module was running when a storage was written. An operation outside that module that reads the
    storage uses a side channel, since the module's output is passed on as a copy.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.running: list[str] = []
        self.leaking: set[str] = set()
        """The modules of which the model reads more than the output."""
        self._quiet = False
        self._writers: dict[StorageWeakRef, str] = {}  # weak references, since addresses are reused

    def leave(self, path: str, output: ModuleOutput, args: Any) -> Any:
        """A module has run: returns a copy of its output, so that later code does not use the module's own storages."""
        self._quiet = True
        try:
            return output.again(1, -1, args)
        finally:
            self._quiet = False
            self.running.remove(path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record reads and writes."""
        if self._quiet:
            return func(*args, **(kwargs or {}))
        taken = set(_storages((args, kwargs or {})))
        for storage in taken:
            writer = self._writers.get(storage)
            if writer is not None and writer not in self.running:
                self.leaking.add(writer)
        result = func(*args, **(kwargs or {}))
        if self.running:
            for storage in {*_storages(result)} - taken | {*_storages(_written_into(func, args, kwargs or {}))}:
                self._writers[storage] = self.running[-1]
        return result


def _written_into(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation changes in place."""
    schema = func._schema  # noqa: SLF001  the only place where an operation says so
    if not schema.is_mutable:
        return []
    named = {each.name: each.alias_info is not None and each.alias_info.is_write for each in schema.arguments}
    by_place = [given for given, written in zip(args, named.values(), strict=False) if written]
    return [*by_place, *(given for name, given in kwargs.items() if named.get(name))]


def _storages(value: Any) -> Iterator[StorageWeakRef]:
    for _, tensor in leaves(value):
        if storage_address(tensor):
            yield StorageWeakRef(tensor.untyped_storage())


class Recording:
    """The raw outputs of chain members in one forward, before any edit, and the order in which they ran.

    Members are never skipped if they are called twice in the forward, have several names in the model, or have side
    channels.
    """

    order = Order.FIRST

    def __init__(self, model: nn.Module) -> None:
        members = chain_members(model)
        modules = list(members.values())
        self.members = {path: module for path, module in members.items() if modules.count(module) == 1}
        self.outputs: dict[str, ModuleOutput] = {}
        self.before: dict[str, tuple[str, ...]] = {}
        """For each site: the members that had run when it first fired."""
        self._repeated: set[str] = set()
        self._channels = SideChannels()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside the block."""
        with MultiHookHandle() as handle:
            for path, module in self.members.items():
                MemberTap(path, self._channels, self._keep).attach(module, handle)
            with self._channels:
                yield

    def _keep(self, path: str, output: ModuleOutput) -> None:
        if path in self.outputs:
            self._repeated.add(path)
        self.outputs[path] = output

    def reached(self, path: str) -> None:
        """Record which members had run when a site first fired."""
        self.before.setdefault(path, tuple(self.outputs))

    def done_before(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """The members that need not run again if the first change is at one of ``paths``."""
        if not all(path in self.before for path in paths):
            return ()
        common = min((self.before[path] for path in paths), key=len)
        return tuple(path for path in common if path not in self._repeated | self._channels.leaking)

    @contextmanager
    def replaying(self, skipped: tuple[str, ...], blocks: int, rows: int) -> Iterator[None]:
        """Inside the block, skipped members return their recorded outputs, repeated for ``blocks`` batches."""
        with MultiHookHandle() as handle:
            for path in skipped:
                handle.add(replace_forward(self.members[path], _Replay(self.outputs[path], blocks, rows)))
            yield


class MemberTap(Transient):
    """Reports when a layer runs, and passes a copy of its output on, since later code may write into it.

    Args:
        path: the layer.
        channels: watches for side channels.
        keep: called with the path and the output.
    """

    order = Order.FIRST

    def __init__(
        self, path: str, channels: SideChannels, keep: Callable[[str, ModuleOutput], None] | None = None
    ) -> None:
        self.path = path
        self.channels = channels
        self.keep = keep

    def attach(self, module: nn.Module, handle: MultiHookHandle) -> None:
        """Attach the tap to both sides of the layer."""
        handle.add(attach(module, self.on_input, "fwd_pre_kwargs", order=self.order))
        handle.add(attach(module, self.on_output, "fwd", order=self.order))

    def on_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The layer starts; operations that it calls belong to it from now on."""
        self.channels.running.append(self.path)

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The layer has run."""
        kept = ModuleOutput(module, args, output)
        if self.keep is not None:
            self.keep(self.path, kept)
        return self.channels.leave(self.path, kept, args)


class ModuleOutput:
    """The output of a member; for a TensorDict module, which writes into its input, the entries that it wrote."""

    def __init__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.value = output
        self.entries: dict[CacheKey, Tensor] | None = None
        if is_entries(output) and args and output is args[0]:
            self.entries = {key: output.get(key) for key in own_entries(module, "out_keys")}

    def again(self, blocks: int, rows: int, args: Any) -> Any:
        """A copy, repeated along the batch once per block."""
        if self.entries is not None:
            given: TensorDictBase = args[0]
            for key, value in self.entries.items():
                given.set(key, expanded(value, blocks, rows))
            return given
        parts = {step: expanded(tensor, blocks, rows) for step, tensor in leaves(self.value)}
        return _rebuilt(self.value, parts)


class _Replay:
    """Replaces a member's forward."""

    def __init__(self, output: ModuleOutput, blocks: int, rows: int) -> None:
        self.output = output
        self.blocks = blocks
        self.rows = rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.output.again(self.blocks, self.rows, args)


def expanded(tensor: Tensor, blocks: int, rows: int) -> Tensor:
    """A copy of ``tensor``, repeated ``blocks`` times along a first axis of size ``rows``; others are only copied."""
    if blocks == 1 or tensor.ndim == 0 or tensor.shape[0] != rows:
        return tensor.clone()
    return tensor.repeat(blocks, *(1,) * (tensor.ndim - 1))


def _rebuilt(value: Any, parts: Mapping[tuple[int | str, ...], Tensor], above: tuple[int | str, ...] = ()) -> Any:
    """``value`` with its tensors replaced by ``parts``."""
    if isinstance(value, Tensor):
        return parts[above]
    if not any(steps[: len(above)] == above for steps in parts):
        return value
    inner = {step: _rebuilt(child, parts, (*above, step)) for step, child in children(value)}
    if not inner:
        return value
    try:
        return with_parts(value, inner)
    except (TypeError, ValueError) as error:
        raise EditError(f"a value of type {type(value).__name__} cannot be rebuilt for a replay: {error}") from error
