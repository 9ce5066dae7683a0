"""Activation addition: computes a steering vector from two sets of inputs and applies it in the same call.

Pooling must leave out padding and the two runs must see the same sites, which is easy to get wrong in a script of one's
own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.current_call import CurrentCall
from tdcache.errors import EditError
from tdcache.hooks import MultiHookHandle
from tdcache.interventions.base import Intervention, InterventionContext, with_inputs_of
from tdcache.interventions.edit_tap import Edit
from tdcache.interventions.memory import Memory
from tdcache.interventions.options import EditKeywords
from tdcache.interventions.random_state import SharedRandomState
from tdcache.interventions.steering import AddVector
from tdcache.introspect import in_backward
from tdcache.modules import HookedModule
from tdcache.regions import Region
from tdcache.selection import Site
from tdcache.types import CacheKey, Selector

__all__ = ["ActivationAddition"]

Pool = Literal["tokens", "last", "batch"]


class _Fit:
    """The vectors of a bound model, and the run that computes them."""

    def __init__(self) -> None:
        self.vectors: dict[str, Tensor] = {}
        self.pooled = Memory("fitting")

    def means_of(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        """The mean over the calls of each site in one run."""
        try:
            with self.pooled.recording():
                run()
            return {path: torch.stack(values).mean(0) for path, values in self.pooled.values.items()}
        finally:
            self.pooled.values = {}


@dataclass(frozen=True, slots=True)
class _Pooling:
    """Keeps the pooled vector of each value while vectors are computed."""

    recipe: ActivationAddition
    fit: _Fit
    call: CurrentCall

    def __call__(self, path: str, value: Tensor) -> None:
        if self.fit.pooled.mode == "record" and not in_backward():
            self.fit.pooled.record(path, self.recipe.pooled(path, value, self.call))


@dataclass(slots=True)
class _AddFitted:
    """Adds the vector once it is known."""

    fit: _Fit
    path: str
    coefficient: float
    units: Region
    """Which entries of the vector to add."""

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The steered part; None while vectors are being computed, and before there are any."""
        vector = self.fit.vectors.get(self.path)
        if vector is None or self.fit.pooled.mode == "record":
            return None
        return AddVector(self.path, self.units.take(vector, self.path), self.coefficient)(part, full)


class ActivationAddition(Intervention):
    """Steers by the difference of means between positive and negative inputs.

    Turner et al. 2023, "Activation Addition", arXiv:2308.10248. ``hooked(data)`` runs ``data["positive", in_key]`` and
    ``data["negative", in_key]``, takes the difference of the mean activations at every site, and then, if ``data``
    has the model's own inputs, runs those with ``coefficient`` times the difference added. It returns a TensorDict
    without batch size that shares the entries of ``data`` and has the vectors under ``("steer", path)``; the outputs
    are written to ``data`` as well. Until the block ends, the vectors also steer other calls, such as
    ``model.generate(...)``; to use them in another block, pass them to :class:`SteeringVectors`.

    Args:
        selector: which modules.
        positive_key: the key of the positive inputs.
        negative_key: the key of the negative inputs.
        steer_key: the key under which the vectors are written.
        coefficient: the factor of the vectors.
        pool: how a value ``(batch, ..., features)`` becomes a vector: the mean over all but ``unit_dim``
            (``"tokens"``), the mean over the batch at the last position (``"last"``), or over the batch alone
            (``"batch"``). Padding is left out of the first two: ``mask_key`` is an argument of the model or an
            entry of the positive and negative inputs, found by its name by default.
        **options: where and when the vector is added: ``positions``, ``units`` and the others of
            :class:`tdcache.EditOptions`.

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
        **options: Unpack[EditKeywords],
    ) -> None:
        super().__init__(selector, **options)
        if pool not in get_args(Pool):
            raise EditError(f"pool is one of {', '.join(map(repr, get_args(Pool)))}, got {pool!r}")
        self.positive_key = positive_key
        self.negative_key = negative_key
        self.steer_key = steer_key
        self.coefficient = coefficient
        self.pool = pool

    def edit_at(self, site: Site, context: InterventionContext) -> Edit:
        """The edit that adds the vector, once there is one."""
        units = Region(units=self.units, unit_dim=self.region_at(site.path).unit_dim)
        return _AddFitted(context.state, site.path, self.coefficient, units)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        context, selection = module.hooking_context, self.select(module)
        context.state = fit = context.state or _Fit()
        handle = self.hook_sites(module, selection)
        with handle.installing():
            if context.current_call is None:
                context.current_call = CurrentCall(module.model, self.options)
                context.current_call.attach(handle)
            self.add_reads(handle, selection, _Pooling(self, fit, context.current_call))
        return handle

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        fit: _Fit = module.hooking_context.state
        call: CurrentCall = module.hooking_context.current_call
        in_keys: list[Any] = list(module.in_keys)
        if not fit.vectors or data.get(self.positive_key, None) is not None:
            means, random = [], SharedRandomState(module.model)
            for key in (self.positive_key, self.negative_key):
                inputs = with_inputs_of(data, key, in_keys, self)
                call.further, call.wants_tokens = dict(inputs.items()), True
                try:
                    with random.run():
                        means.append(fit.means_of(partial(forward, inputs)))
                finally:
                    call.further, call.wants_tokens = {}, self.positions is not None
            fit.vectors = {path: means[0][path] - means[1][path] for path in means[0]}
        if all(data.get(key, None) is not None for key in in_keys):
            forward(data)
        found = TensorDict(dict(data.items()), batch_size=[], device=data.device)
        found[self.steer_key] = TensorDict(dict(fit.vectors), batch_size=[])
        return found

    def pooled(self, path: str, value: Tensor, call: CurrentCall) -> Tensor:
        """The pooled vector of a value."""
        if self.pool == "batch" or value.ndim < 3:
            return value.mean(self.region.row_axis(value))
        region = self.region_at(path)
        if -region.unit_dim > value.ndim:
            raise EditError(f"unit_dim={region.unit_dim} is no axis of a value of shape {tuple(value.shape)}")
        others = [dim for dim in range(value.ndim) if dim != region.unit_dim % value.ndim]
        mask = call.further.get(self.mask_key) if self.pool == "tokens" else None
        if isinstance(mask, Tensor) and mask.ndim > 2 and mask.shape == tuple(value.shape[dim] for dim in others):
            return self._mean(value, mask.to(value).unsqueeze(region.unit_dim), others)
        at, unit, row = region.position_dim % value.ndim, region.unit_dim % value.ndim, region.row_axis(value)
        tokens = None if at == unit else call.tokens_at(path, value.shape[row], value.shape[at], value.device)
        if self.pool == "last":
            if tokens is not None:
                chosen = Region(positions=tokens.columns(-1), position_dim=region.position_dim)
                value = chosen.take(value, path).movedim(1, at)
            last = value.select(at, -1).mean(0)
            return last.unsqueeze(at - 1) if at > unit else last
        if tokens is None:
            return self._mean(value, None, others)
        weight = tokens.real.to(value).reshape(*tokens.real.shape, *(1,) * (value.ndim - 2)).movedim(1, at)
        return self._mean(value, weight.expand(*(1 if dim == unit else n for dim, n in enumerate(value.shape))), others)

    def _mean(self, value: Tensor, weight: Tensor | None, others: list[int]) -> Tensor:
        """The mean over ``others``, with an axis of size 1 for each that comes after the units."""
        mean = value.mean(others) if weight is None else (value * weight).sum(others) / weight.sum()
        return mean.reshape(-1, *(1,) * (-1 - self.unit_dim))
