"""Causal tracing: adds noise to the embeddings and restores the clean activation at one place after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.current_call import CurrentCall
from tdcache.errors import EditError
from tdcache.hooks import MultiHookHandle, OutputPort
from tdcache.interventions.base import Intervention
from tdcache.interventions.blocks import repeated, rows_of
from tdcache.interventions.edit_tap import EditTap, ReadTap, attach_taps
from tdcache.interventions.memory import Memory
from tdcache.interventions.options import EditKeywords
from tdcache.interventions.sweep import Sweep
from tdcache.interventions.trials import Metric, SweepOver, check_over
from tdcache.modules import HookedModule
from tdcache.regions import Along, Region
from tdcache.types import Selector

__all__ = ["CausalTracing"]


@dataclass(slots=True)
class _AddNoise:
    """Adds fixed noise, the same to every block of a batch."""

    path: str
    noise: Tensor | None = None

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        if self.noise is None:
            return None
        noise = self.noise.to(full)
        return full + noise.repeat(full.shape[0] // noise.shape[0], *(1,) * (full.ndim - 1))


class _Trace:
    """The sweep of one bound model, its noise, and the output of the embedding."""

    def __init__(self, sweep: Sweep, noise: _AddNoise, call: CurrentCall) -> None:
        self.sweep = sweep
        self.noise = noise
        self.embedded = Memory("clean")
        self.call = call
        self.subject: Region | None = None
        """The subject's columns in the current batch."""


@dataclass(frozen=True, slots=True)
class _Embedded:
    """Keeps the output of the embedding, and which of its columns belong to the subject."""

    state: _Trace
    subject: Region

    def __call__(self, path: str, value: Tensor) -> None:
        self.state.embedded.record(path, value)
        if self.state.embedded.mode == "record":
            self.state.subject = self.state.call.region_at(path, value, self.subject)


class CausalTracing(Intervention):
    """Which activations carry the information of the corrupted tokens? Restores them one by one in a noised run.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv:2202.05262. ``hooked(data)`` runs the
    model clean, then with Gaussian noise on the embeddings of the ``subject`` positions, then once per site and
    position with the clean value restored there (and in a ``window`` of sites around it). It returns a TensorDict with
    the metric of the clean and of the corrupted run under ``"clean"`` and ``"corrupted"``, and under ``"restored"`` one
    entry per site, ``(positions,)``. Gradients are disabled.

    Args:
        selector: the sites, in the order of the layers.
        embedding: the module whose output is noised.
        subject: the positions to add noise to.
        metric: ``metric(data) -> scalar``, as in :class:`ActivationPatching`; it sees ``samples`` copies of the rows.
        noise: standard deviation of the noise, in standard deviations of the embedding's output.
        samples: the number of noise samples, stacked along the batch.
        seed: the seed of the noise.
        window: how many neighbouring sites are restored together.
        sweep: True (whole sites), ``"position"``, ``"head"`` or both.
        chunk: the number of interventions per forward, as in :class:`ActivationPatching`.
        replay: whether layers before the first patch of a forward are replayed, as in :class:`ActivationPatching`.
        stack_by: the named group of the pattern that becomes a leading axis of the restored values.
        **options: the part that is restored: ``positions``, ``units`` and the others of :class:`tdcache.EditOptions`,
            without ``steps``. A sweep over heads needs ``heads=``.

    Raises:
        EditError: options are incompatible, or the embedding does not run exactly once per forward.
        SelectionError: a selector matches nothing, or the embedding is several modules.
    """

    source: Any = "clean"  # tells a sweep that values come from an earlier run
    patch_fn = None
    patch_key = "patched"
    _sweeps_heads: ClassVar[bool] = True

    def __init__(
        self,
        selector: Selector,
        embedding: Selector,
        *,
        subject: Along,
        metric: Metric,
        noise: float = 3.0,
        samples: int = 10,
        seed: int = 0,
        window: int = 1,
        sweep: bool | SweepOver | Sequence[SweepOver] = "position",
        chunk: int = 16,
        replay: bool = True,
        stack_by: str | None = None,
        **options: Unpack[EditKeywords],
    ) -> None:
        super().__init__(selector, **options)
        if self.steps is not None:
            raise EditError("steps= is not for causal tracing, which calls the model itself")
        if window < 1 or samples < 1:
            raise EditError(f"window and samples are 1 or more, got window={window}, samples={samples}")
        self.embedding, self.subject, self.metric = embedding, subject, metric
        self.noise, self.samples, self.seed, self.window = noise, samples, seed, window
        self.sweep, self.chunk, self.replay, self.stack_by = sweep, chunk, replay, stack_by
        named = self.names is not None
        self._over = check_over(sweep or True, metric, self.heads, chunk, region=self.region, named=named) or ()
        self._subject = Region(positions=subject, position_dim=self.position_dim)

    def value_at(self, path: str) -> Any:
        """None, since the clean run provides the values."""
        return None

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        embeddings = module.hooking_context.select(self.embedding, match=self.match)
        if len(embeddings) > 1:
            raise EditError(f"embedding={self.embedding!r} selects {len(embeddings)} modules; name one")
        site = embeddings[0]
        call = CurrentCall(module.model, self.options)
        state = _Trace(Sweep(self, self.select(module), self._over), _AddNoise(site.path), call)
        state.sweep.window = self.window
        handle = state.sweep.attach(module.model)
        port = OutputPort(site.path, self.pick)
        with handle.installing():
            call.wants_tokens = True
            call.attach(handle)
            edit, read = EditTap(port, state.noise, region=Region()), ReadTap(port, _Embedded(state, self._subject))
            attach_taps(site.module, handle, edit, read)
        module.hooking_context.state = state
        return handle

    @torch.no_grad()
    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        state: _Trace = module.hooking_context.state
        in_keys, out_keys = list(module.in_keys), list(module.out_keys)
        every = repeated(data, list(data.keys()), self.samples, rows_of(data, in_keys))
        clean, corrupted = every.copy(), every.copy()
        sweep, noise = state.sweep, state.noise
        sweep.begin()
        try:
            with sweep.memory.recording(), state.embedded.recording(), sweep.alike():
                forward(clean)
            embedded = state.embedded.values.pop(noise.path, [])
            if len(embedded) != 1:
                raise EditError(
                    f"embedding={self.embedding!r}: {noise.path!r} ran {len(embedded)} times in one forward; noise "
                    "needs a module that runs once"
                )
            noise.noise = self._drawn(embedded[0], noise.path, state.subject)
            with sweep.alike():
                forward(corrupted)
            restored = sweep.run_on(every, every, forward, in_keys, out_keys)
        finally:
            noise.noise = None
            sweep.end()
        runs = {"clean": clean, "corrupted": corrupted}
        baselines = {name: torch.as_tensor(self.metric(ran)) for name, ran in runs.items()}
        return TensorDict({**baselines, "restored": restored}, batch_size=[])

    def _drawn(self, embedded: Tensor, path: str, subject: Region | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(embedded.shape, generator=generator, dtype=torch.float32).to(embedded)
        scale = self.noise * embedded.std()
        noise = torch.zeros_like(embedded)
        if subject is not None:
            subject.write(noise, subject.take(drawn, path) * scale, path)
        return noise
