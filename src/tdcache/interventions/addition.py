"""Activation addition: a steering vector from two sets of inputs, applied in the same call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.errors import EditError
from tdcache.hooks import MultiHookHandle
from tdcache.interventions.base import Intervention, InterventionContext, Side, with_inputs_of
from tdcache.interventions.edits import Edit
from tdcache.interventions.memory import Memory
from tdcache.interventions.regions import Along, Region
from tdcache.interventions.steering import AddVector
from tdcache.interventions.steps import Steps
from tdcache.modules import HookedModule
from tdcache.selection import Site
from tdcache.types import CacheKey, Match, Pick, Selector

__all__ = ["ActivationAddition"]

Pool = Literal["tokens", "last", "batch"]


class _Fit:
    """The vectors of a bound model, and the run that brings them."""

    def __init__(self) -> None:
        self.memory = Memory("contrast")
        self.vectors: dict[str, Tensor] = {}


@dataclass(slots=True)
class _AddFitted:
    """Adds the vector once it is known."""

    fit: _Fit
    path: str
    coefficient: float
    units: Region
    """Which entries of the vector."""

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The steered part; None while vectors are being made, and before there are any."""
        vector = self.fit.vectors.get(self.path)
        if vector is None or self.fit.memory.mode == "record":
            return None
        return AddVector(self.path, self.units.take(vector, self.path), self.coefficient)(part, full)


class ActivationAddition(Intervention):
    """Steers by the difference of means between positive and negative inputs.

    Turner et al. 2023, "Activation Addition", arXiv:2308.10248. ``hooked(data)`` runs ``data["positive", in_key]`` and
    ``data["negative", in_key]``, takes the difference of the mean activations at every site, and then, where ``data``
    has the model's own inputs, runs those with ``coefficient`` times the difference added. It returns a TensorDict
    without batch size that shares the entries of ``data`` and has the vectors under ``("steer", path)``; the outputs
    are written to ``data`` too. Until the block ends the vectors go on steering other calls, such as
    ``model.generate(...)``; in another block, hand them to :class:`SteeringVectors`.

    Args:
        selector: which modules.
        positive_key: where the positive inputs are.
        negative_key: where the negative ones are.
        steer_key: where the vectors are written.
        coefficient: what they are multiplied by.
        pool: how a value ``(batch, ..., features)`` becomes a vector: the mean over all but ``unit_dim``
            (``"tokens"``), the mean over the batch at the last position (``"last"``), or over the batch alone
            (``"batch"``).
        mask_key: with ``pool="tokens"``, the entry of the positive and negative inputs that is 1 where a token counts,
            for instance ``"attention_mask"``.
        positions: where the vector is added; see :class:`Intervention`, as ``units`` and the arguments behind it.
        units: likewise.
        direction: likewise.
        pick: likewise.
        steps: likewise.
        match: likewise.
        position_dim: likewise.
        unit_dim: likewise.

    Raises:
        ContextError: a call without positive or negative inputs, before there are vectors.
        EditError: an unknown ``pool``.
    """

    def __init__(
        self,
        selector: Selector,
        positive_key: CacheKey = "positive",
        negative_key: CacheKey = "negative",
        steer_key: CacheKey = "steer",
        *,
        coefficient: float = 1.0,
        pool: Pool = "tokens",
        mask_key: CacheKey | None = None,
        positions: Along = None,
        units: Along = None,
        direction: Side = "fwd",
        pick: Pick = None,
        steps: Steps = None,
        match: Match = "full",
        position_dim: int = 1,
        unit_dim: int = -1,
    ) -> None:
        super().__init__(
            selector, positions=positions, units=units, direction=direction, pick=pick, steps=steps, match=match,
            position_dim=position_dim, unit_dim=unit_dim,
        )  # fmt: skip
        if pool not in get_args(Pool):
            raise EditError(f"pool is one of {', '.join(map(repr, get_args(Pool)))}, got {pool!r}")
        self.positive_key = positive_key
        self.negative_key = negative_key
        self.steer_key = steer_key
        self.coefficient = coefficient
        self.pool = pool
        self.mask_key = mask_key

    def edit_at(self, site: Site, context: InterventionContext) -> Edit:
        """Add the vector, once there is one."""
        units = Region(units=self.units, unit_dim=self.unit_dim)
        return _AddFitted(context.state, site.path, self.coefficient, units)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, selection = module.hooking_context, self.select(module)
        context.state = context.state or _Fit()
        handle = self.hook_sites(module, selection)
        try:
            self.add_reads(handle, selection, context.state.memory)
        except BaseException:
            handle.remove()
            raise
        return handle

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        fit: _Fit = module.hooking_context.state
        in_keys: list[Any] = list(module.in_keys)
        if not fit.vectors or data.get(self.positive_key, None) is not None:
            means = []
            for key in (self.positive_key, self.negative_key):
                inputs = with_inputs_of(data, key, in_keys, self)
                with fit.memory.recording():
                    forward(inputs)
                means.append({path: self._pooled(values, inputs) for path, values in fit.memory.values.items()})
            fit.memory.values = {}
            fit.vectors = {path: means[0][path] - means[1][path] for path in means[0]}
        if all(data.get(key, None) is not None for key in in_keys):
            forward(data)
        found = TensorDict(dict(data.items()), batch_size=[], device=data.device)
        found[self.steer_key] = TensorDict(dict(fit.vectors), batch_size=[])
        return found

    def _pooled(self, values: list[Tensor], inputs: TensorDictBase) -> Tensor:
        mask = None if self.mask_key is None else inputs.get(self.mask_key)
        return sum((self._mean(value, mask) for value in values[1:]), self._mean(values[0], mask)) / len(values)

    def _mean(self, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.pool == "batch" or value.ndim < 3:
            return value.mean(0)
        if self.pool == "last":
            at, last = self.position_dim % value.ndim, value.select(self.position_dim, -1).mean(0)
            return last.unsqueeze(at - 1) if at > self.unit_dim % value.ndim else last
        if -self.unit_dim > value.ndim:
            raise EditError(f"unit_dim={self.unit_dim} is no axis of a value of shape {tuple(value.shape)}")
        others = [dim for dim in range(value.ndim) if dim != self.unit_dim % value.ndim]
        shape = value.shape[self.unit_dim], *(1,) * (-1 - self.unit_dim)  # broadcasts to the value
        if mask is None:
            return value.mean(others).reshape(shape)
        weight = mask.to(value).unsqueeze(self.unit_dim)
        return ((value * weight).sum(others) / weight.sum()).reshape(shape)
