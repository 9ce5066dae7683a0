"""Causal tracing: noise at the embeddings, and the clean activation put back at one place after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.errors import EditError
from tdcache.hooks import MultiHookHandle, OutputPort, attach
from tdcache.interventions.base import Intervention, Side
from tdcache.interventions.edits import EditTap, ReadTap
from tdcache.interventions.memory import Memory
from tdcache.interventions.regions import Along, Region
from tdcache.interventions.sweep import Sweep, repeated, rows_of
from tdcache.interventions.trials import Metric, SweepOver, check_over
from tdcache.modules import HookedModule
from tdcache.selection import select
from tdcache.types import Match, Pick, Selector

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
    """The sweep of one bound model, its noise, and what the embedding gave."""

    def __init__(self, sweep: Sweep, noise: _AddNoise) -> None:
        self.sweep = sweep
        self.noise = noise
        self.embedded = Memory("clean")


class CausalTracing(Intervention):
    """Which activations carry what the corrupted tokens said? Restores them one by one in a run on noised embeddings.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv:2202.05262. ``hooked(data)`` runs the
    model clean, then with Gaussian noise on the embeddings of the ``subject`` positions, then once per site and
    position with the clean value put back there (and in a ``window`` of sites around it). It returns a TensorDict with
    the metric of the clean and of the corrupted run under ``"clean"`` and ``"corrupted"``, and under ``"restored"`` one
    entry per site, ``(positions,)``. Gradients are off.

    Args:
        selector: the sites, in the order of the layers.
        embedding: the module whose output is noised.
        subject: which positions of it.
        metric: ``metric(data) -> scalar``, as in :class:`ActivationPatching`; it sees ``samples`` copies of the rows.
        noise: standard deviation of the noise, in standard deviations of the embedding's output.
        samples: how many draws of noise, side by side along the batch.
        seed: of the draws.
        window: how many neighbouring sites are restored together.
        sweep: True (whole sites), ``"position"``, ``"head"`` or both.
        heads: see :class:`ActivationPatching`, as ``chunk``, ``replay`` and ``stack_by``.
        chunk: likewise.
        replay: likewise.
        stack_by: likewise, for the restored values.
        positions: which positions are restored, all by default.
        units: which features are restored, all by default.
        direction: see :class:`Intervention`, as the arguments behind it.
        pick: likewise.
        match: likewise.
        position_dim: likewise.
        unit_dim: likewise.

    Raises:
        EditError: options that do not go together, or an embedding that does not run once in a forward.
        SelectionError: a selector that matches nothing, or several modules as the embedding.
    """

    source: Any = "clean"  # what a sweep asks: whether values come from a run before
    patch_fn = None
    patch_key = "patched"

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
        heads: int | None = None,
        chunk: int = 16,
        replay: bool = True,
        stack_by: str | None = None,
        positions: Along = None,
        units: Along = None,
        direction: Side = "fwd",
        pick: Pick = None,
        match: Match = "full",
        position_dim: int = 1,
        unit_dim: int = -1,
    ) -> None:
        super().__init__(
            selector, positions=positions, units=units, direction=direction, pick=pick, match=match,
            position_dim=position_dim, unit_dim=unit_dim,
        )  # fmt: skip
        if window < 1 or samples < 1:
            raise EditError(f"window and samples are 1 or more, got window={window}, samples={samples}")
        self.embedding, self.subject, self.metric = embedding, subject, metric
        self.noise, self.samples, self.seed, self.window = noise, samples, seed, window
        self.sweep, self.heads, self.chunk, self.replay, self.stack_by = sweep, heads, chunk, replay, stack_by
        self._over = check_over(sweep or True, metric, heads, chunk, patch_fn=None, region=self.region) or ()
        self._subject = Region(positions=subject, position_dim=position_dim)

    def value_at(self, path: str) -> Any:
        """Nothing yet: the clean run brings it."""
        return None

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        embeddings = select(module.model, self.embedding, match=self.match)
        if len(embeddings) > 1:
            raise EditError(f"embedding={self.embedding!r} selects {len(embeddings)} modules; name one")
        site = embeddings[0]
        state = _Trace(Sweep(self, self.select(module), self._over), _AddNoise(site.path))
        state.sweep.window = self.window
        handle = state.sweep.attach(module.model)
        port = OutputPort(site.path, self.pick)
        for tap in (EditTap(port, state.noise, region=Region()), ReadTap(port, state.embedded.record)):
            handle.add(attach(site.module, tap.on_call, order=tap.order))
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
        with sweep.memory.recording(), state.embedded.recording():
            forward(clean)
        embedded = state.embedded.values.pop(noise.path, [])
        try:
            if len(embedded) != 1:
                raise EditError(
                    f"embedding={self.embedding!r}: {noise.path!r} ran {len(embedded)} times in one forward; noise "
                    "needs a module that runs once"
                )
            noise.noise = self._drawn(embedded[0], noise.path)
            forward(corrupted)
            restored = sweep.run_on(every, every, forward, in_keys, out_keys)
        finally:
            noise.noise, sweep.recording, sweep.memory.values = None, None, {}
        runs = {"clean": clean, "corrupted": corrupted}
        baselines = {name: torch.as_tensor(self.metric(ran)) for name, ran in runs.items()}
        return TensorDict({**baselines, "restored": restored}, batch_size=[])

    def _drawn(self, embedded: Tensor, path: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(embedded.shape, generator=generator, dtype=torch.float32).to(embedded)
        scale = self.noise * embedded.std()
        noise = torch.zeros_like(embedded)
        self._subject.write(noise, self._subject.take(drawn, path) * scale, path)
        return noise
