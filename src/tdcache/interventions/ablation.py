"""Ablation: removes the information at a site, in four ways.

The ways differ in what they assume. Zero is rarely a value that the model has seen; a mean, another example's value or
a projection stays closer to its distribution, so they are modes of one class and easy to compare.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import EditError
from tdcache.interventions.base import Intervention, InterventionContext, entry_of
from tdcache.interventions.edit_tap import Edit, RegionEdit
from tdcache.interventions.options import EditKeywords
from tdcache.regions import Region
from tdcache.selection import Site
from tdcache.types import Selector

__all__ = ["Ablation"]

Mode = Literal["zero", "mean", "resample", "project"]


@dataclass(frozen=True, slots=True)
class _Zero:
    path: str

    def __call__(self, part: Tensor, full: Tensor) -> Tensor:
        return torch.zeros_like(part)


@dataclass(frozen=True, slots=True)
class _MeanValue:
    """The given mean, broadcast to the value; by default the mean over the batch."""

    path: str
    mean: Tensor | None

    def edit_region(self, part: Tensor, full: Tensor, region: Region) -> Tensor:
        if self.mean is None:
            return part.mean(region.part_row_axis(full), keepdim=True).expand_as(part).clone()
        mean = self.mean.to(full)
        try:
            return region.take(mean.expand_as(full), self.path).clone()
        except RuntimeError:
            raise _misfit("mean", self.path, mean, full) from None


@dataclass(frozen=True, slots=True)
class _Resample:
    """Rows of the given activations, or the batch's own rows in an order that keeps none in place."""

    path: str
    rows: Tensor | None
    seed: int

    def edit_region(self, part: Tensor, full: Tensor, region: Region) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.rows is None:
            return self._exchanged(part, region.part_row_axis(full), generator, region)
        rows = self.rows.to(full)
        if rows.shape[1:] != full.shape[1:]:
            raise _misfit("rows to resample from", self.path, rows, full)
        if region.row_axis(full):
            raise EditError(f"source= has rows along axis 0, and the value at {self.path!r} along axis 1")
        drawn = rows[torch.randint(len(rows), (len(full),), generator=generator).to(full.device)]
        return region.take(drawn, self.path)

    def _exchanged(self, part: Tensor, axis: int, generator: torch.Generator, region: Region) -> Tensor:
        """The part with its rows in another order."""
        if region.joins_rows:
            raise EditError(
                f"resampling within a batch exchanges rows, but at {self.path!r} the positions are a mask, in which "
                "rows can have different numbers of them, so that values would move between the positions of one row: "
                "give as many positions for each row, as numbers or a tensor (batch, k), or rows to draw from, source="
            )
        if part.shape[axis] < 2:
            raise EditError(f"resampling within a batch needs 2 rows or more at {self.path!r}; give source=")
        order = torch.randperm(part.shape[axis], generator=generator).to(part.device)
        new = part.clone()
        new.index_copy_(axis, order, part.index_select(axis, order.roll(1)))  # a single cycle: no row keeps its own
        return new


@dataclass(frozen=True, slots=True)
class _Project:
    """Removes the component along the directions: x - (x - c) Q Q^T, with Q an orthonormal basis of them."""

    path: str
    basis: Tensor
    center: Tensor | None

    def __call__(self, part: Tensor, full: Tensor) -> Tensor:
        basis = self.basis.to(part)
        if basis.shape[0] != part.shape[-1]:
            raise _misfit("directions", self.path, basis.T, part)
        centred = part if self.center is None else part - self.center.to(part)
        return part - (centred @ basis) @ basis.T


def _basis(directions: Tensor) -> Tensor:
    """An orthonormal basis ``(features, rank)`` of the span of the directions, which may be linearly dependent."""
    wide = (directions if directions.ndim == 2 else directions[None]).double()
    left, values, _ = torch.linalg.svd(wide.T, full_matrices=False)
    kept = values > values.max() * max(wide.shape) * torch.finfo(directions.dtype).eps
    basis: Tensor = left[:, kept].to(directions.dtype)
    return basis


def _misfit(what: str, path: str, given: Tensor, value: Tensor) -> EditError:
    return EditError(
        f"the {what} of shape {tuple(given.shape)} does not fit at {path!r}, where the value has "
        f"shape {tuple(value.shape)}"
    )


class Ablation(Intervention):
    """Removes the information at the selected sites, to see what the model does without it.

    ================  =====================================================  =======================================
    mode              the value becomes                                      ``source``
    ================  =====================================================  =======================================
    ``"zero"``        zero                                                   none
    ``"mean"``        a mean: the given one, or the batch's                  means by path, for instance of a cache
                                                                             with ``reducer=Mean()``; or none
    ``"resample"``    the value of another example, drawn with ``seed``      activations by path, rows first; or none
                                                                             for other rows of the same batch
    ``"project"``     its component orthogonal to some directions            directions by path, ``(features,)`` or
                                                                             ``(k, features)``
    ================  =====================================================  =======================================

    Args:
        selector: which modules.
        mode: see the table. Resampling is causal scrubbing's (Chan et al. 2022).
        source: see the table: a TensorDict or mapping by path, or one tensor for all sites.
        seed: for ``"resample"``; the same rows are drawn at every site and in every forward of the same size.
        center: for ``"project"``: subtracted before projecting, by path or one for all; zero by default.
        **options: where and when it acts: ``positions``, ``units`` and the others of :class:`tdcache.EditOptions`.

    Raises:
        EditError: the mode is unknown, or the source is missing, superfluous, or does not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
        >>> with Ablation("0").prepare(model) as hooked, torch.no_grad():
        ...     print(hooked(torch.ones(1, 2)))
        tensor([[0.]])
    """

    _finds_calls = True

    def __init__(
        self,
        selector: Selector,
        mode: Mode = "zero",
        source: TensorDictBase | Mapping[str, Tensor] | Tensor | None = None,
        *,
        seed: int = 0,
        center: TensorDictBase | Mapping[str, Tensor] | Tensor | None = None,
        **options: Unpack[EditKeywords],
    ) -> None:
        super().__init__(selector, **options)
        if mode not in get_args(Mode):
            raise EditError(f"mode is one of {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")
        if mode == "zero" and source is not None:
            raise EditError("mode='zero' takes no source; use mode='mean' to put given values in place")
        if mode == "project" and source is None:
            raise EditError("mode='project' needs the directions: source= a tensor (k, features), or one per path")
        if mode != "project" and center is not None:
            raise EditError(f"center= is of mode='project', got mode={mode!r}")
        self.mode: Mode = mode
        self.source = source
        self.seed = seed
        self.center = center

    @property
    def _traceable(self) -> bool:
        return super()._traceable and self.mode != "resample"  # dynamo knows no generators

    def edit_at(self, site: Site, context: InterventionContext) -> Edit | RegionEdit:
        """The edit of the mode at this site."""
        given = self._given(self.source, site.path, "source=")
        if self.mode == "zero":
            return _Zero(site.path)
        if self.mode == "mean":
            return _MeanValue(site.path, given)
        if self.mode == "resample":
            return _Resample(site.path, given, self.seed)
        return _Project(site.path, _basis(given), self._given(self.center, site.path, "center="))

    def _given(self, source: Any, path: str, what: str) -> Any:
        if source is None or isinstance(source, Tensor):
            return source
        return entry_of(source, path, self.direction, what)
