"""Steering: adds a direction to activations of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import EditError, TdcacheWarning, warn_user
from tdcache.interventions.base import Intervention, InterventionContext, entry_of
from tdcache.interventions.edit_tap import Edit
from tdcache.interventions.options import EditKeywords
from tdcache.selection import Site
from tdcache.types import Selector

__all__ = ["AddVector", "CallSteer", "SteeringVectors", "UnitAxis"]


@dataclass(slots=True)
class AddVector:
    """Adds ``coefficient * vector``, cast and moved to the value; the cast is cached while the vector is unchanged."""

    path: str
    vector: Tensor
    coefficient: float
    axis: UnitAxis | None = None
    """The check of the first value, before anything is added."""
    _cast: tuple[int, Tensor] | None = field(init=False, default=None, repr=False)
    """The version counter of the vector, and its cast."""

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The steered part; for coefficient zero None, so that the value stays bit-identical."""
        if self.coefficient == 0:
            return None
        if self.axis is not None:
            self.axis.check(full, self.vector)
            self.axis = None
        vector = self._like(part)
        try:
            return part + self.coefficient * vector
        except EditError:
            raise
        except RuntimeError:
            raise EditError(
                f"the vector of shape {tuple(vector.shape)} cannot be added at {self.path!r}, where "
                "the value has shape "
                f"{tuple(part.shape)}; a vector has one entry per feature, and may have axes in front of it"
            ) from None

    def _like(self, part: Tensor) -> Tensor:
        vector = self.vector
        if _alike(vector, part):
            return vector
        # A cached cast could refer to a freed graph, or be an inference tensor outside of inference mode.
        if vector.requires_grad or vector.is_inference() or torch.is_inference_mode_enabled():
            return vector.to(part)
        if self._cast is None or self._cast[0] != vector._version or not _alike(self._cast[1], part):
            self._cast = vector._version, vector.to(part)
        return self._cast[1]


@dataclass(frozen=True, slots=True)
class UnitAxis:
    """Checks that a one-dimensional vector is meant to run along the last axis."""

    path: str
    channels: str | None
    """The type of the module, if its features are channels before spatial axes."""

    def check(self, value: Tensor, vector: Tensor) -> None:
        """Refuse a vector that would run along the width; warn if two axes have its size.

        Raises:
            EditError: the message says how to steer channels.
        """
        size, shape = vector.shape[0], tuple(value.shape)
        if self.channels is not None:
            space = int(self.channels[-2])
            is_norm = self.channels.endswith(f"Norm{space}d")
            if value.ndim > space + is_norm:
                raise EditError(
                    f"a vector of {size} numbers would be added along the last axis at {self.path!r}, but the channels "
                    f"of {self.channels} are axis {-1 - space} of {shape}: give unit_dim={-1 - space}"
                )
        twins = [dim - value.ndim for dim in range(1, value.ndim - 1) if value.shape[dim] == size]
        if twins:
            warn_user(
                f"a vector of {size} numbers is added along the last axis at {self.path!r}, and axis {twins[-1]} of "
                f"{shape} has as many: give unit_dim={twins[-1]} if that is meant, else the vector as vector[None]",
                TdcacheWarning,
            )


def _channels_of(module: nn.Module) -> str | None:
    names = [each.__name__ for each in type(module).__mro__ if each.__module__.startswith("torch.nn.modules")]
    return next((name for name in names if name[-2:] in ("1d", "2d", "3d")), None)


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


@dataclass(frozen=True, slots=True)
class CallSteer:
    """Calls ``steer_fn`` for the new value."""

    path: str
    steer_fn: Callable[..., Tensor | None]

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The result of the function, which gets a copy that it may modify."""
        given = part.clone()
        made = self.steer_fn(module_key=self.path, output=given)
        return made if made is given or not isinstance(made, Tensor) else made.clone()


class SteeringVectors(Intervention):
    """Adds a vector at every selected site, or applies ``steer_fn`` there.

    Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation Addition", arXiv:2312.06681. With coefficient 0 the
    model's result is bit-identical. Gradients flow to the vectors.

    Args:
        selector: which modules.
        vectors: one tensor for all sites, or a TensorDict or mapping by path; each ``(features,)``, which runs
            along ``unit_dim``, or anything that broadcasts to the value. Cast and moved to the value's dtype and
            device.
        steer_fn: ``steer_fn(module_key=, output=)`` gets the path and a copy of the value there, and returns the new
            value, or None for no change. It may be given instead of ``vectors``, also by position.
        coefficient: the factor of the vectors.
        **options: where and when it acts: ``positions``, ``units`` and the others of :class:`tdcache.EditOptions`.

    Raises:
        EditError: not exactly one of ``vectors`` and ``steer_fn`` is given; a site has no vector, or one that does not
            fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Identity())
        >>> with SteeringVectors("1", torch.tensor([1.0, 0.0]), coefficient=2.0).prepare(model) as hooked:
        ...     print(hooked(torch.zeros(1, 2)) - model[0].bias)
        tensor([[2., 0.]], grad_fn=<SubBackward0>)
    """

    _finds_calls = True

    def __init__(
        self,
        selector: Selector,
        vectors: Tensor | TensorDictBase | Mapping[str, Tensor] | Callable[..., Tensor | None] | None = None,
        steer_fn: Callable[..., Tensor | None] | None = None,
        *,
        coefficient: float = 1.0,
        **options: Unpack[EditKeywords],
    ) -> None:
        super().__init__(selector, **options)
        if callable(vectors) and steer_fn is None:
            vectors, steer_fn = None, vectors
        if (vectors is None) == (steer_fn is None):
            raise EditError("steering needs either vectors (a tensor, or one per path) or steer_fn=, and not both")
        if isinstance(vectors, Sequence):
            raise EditError(f"vectors is a tensor, or a mapping of one per path, got a {type(vectors).__name__}")
        self.vectors: Any = vectors
        self.steer_fn = steer_fn
        self.coefficient = coefficient

    def edit_at(self, site: Site, context: InterventionContext) -> Edit:
        """The edit that adds the vector or calls the function."""
        if self.steer_fn is not None:
            return CallSteer(site.path, self.steer_fn)
        vector = self.vectors
        if not isinstance(vector, Tensor):
            vector = entry_of(vector, site.path, self.direction, "vectors=")
        if vector.ndim != 1 or self.unit_dim != -1:
            along = vector.reshape(-1, *(1,) * (-1 - self.unit_dim)) if vector.ndim == 1 else vector
            return AddVector(site.path, along, self.coefficient)
        return AddVector(site.path, vector, self.coefficient, UnitAxis(site.path, _channels_of(site.module)))
