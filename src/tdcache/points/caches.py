"""Runs that cache the values at hook points.

Names and order of the parameters are those of TransformerLens, so that positional calls work unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import ContextError
from tdcache.hooks import MultiHookHandle
from tdcache.hooks.compiled import running_eagerly
from tdcache.hooks.opened import OpenedHere
from tdcache.hooks.values import first_tensor
from tdcache.points.capture import CaptureOptions, PointCapture
from tdcache.points.names import NamesFilter
from tdcache.points.point_cache import PointCache
from tdcache.points.positions import PositionSlice
from tdcache.points.surface import PointSurface, bracket_with
from tdcache.reducers import Last, Reducer
from tdcache.types import Hold

__all__ = ["CachingSurface", "backward"]

Cache = TensorDictBase | MutableMapping[str, Any]


class CachingSurface(PointSurface):
    """The methods of a model with hook points, including caches."""

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: Cache | None = None,
        pos_slice: Any = None,
        *,
        hold: Hold = "snapshot",
        reducer: Reducer | None = None,
    ) -> tuple[Any, list[Any], list[Any]]:
        """Hooks that cache, to be combined with other hooks in :meth:`hooks` or :meth:`run_with_hooks`.

        They keep copies by default, since it is not known for how long the values must stay unchanged.

        Returns:
            The cache (a new TensorDict unless one was given), the pairs for ``fwd_hooks``, and those for ``bwd_hooks``.
        """
        options = _options(incl_bwd, device, remove_batch_dim, pos_slice, hold=hold, reducer=reducer)
        kept = PointCache() if cache is None else cache
        capture = PointCapture(self.chosen_points(names_filter), options, kept)
        self.is_caching = True
        return kept, capture.hooks(gradient=False), capture.hooks(gradient=True) if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: Cache | None = None,
        *,
        pos_slice: Any = None,
        hold: Hold = "snapshot",
        reducer: Reducer | None = None,
    ) -> Any:
        """Add hooks that cache until :meth:`reset_hooks`; returns the cache, which every forward updates."""
        options = _options(incl_bwd, device, remove_batch_dim, pos_slice, hold=hold, reducer=reducer)
        kept = PointCache() if cache is None else cache
        self._leave_hooks(PointCapture(self.chosen_points(names_filter), options, kept))
        return kept

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        hold: Hold | None = None,
        reducer: Reducer | None = None,
        gradient: Tensor | None = None,
        keep_parameter_grads: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, TensorDictBase]:
        """Run the model once and cache the values at its hook points.

        Args:
            *model_args: positional arguments of the model.
            names_filter: a name, a regex on the whole name, a predicate on names, or several of these; None selects
                every point. A filter that matches nothing is an error.
            device: move entries there.
            remove_batch_dim: remove the first axis, which must have size 1.
            incl_bwd: call ``backward()`` on the output (the first tensor in it) and keep gradients, under the points'
                names with ``"_grad"`` appended.
            reset_hooks_end: with False, the caching hooks stay, like those of :meth:`add_caching_hooks`.
            clear_contexts: empty the points' ``ctx`` at the end.
            pos_slice: a position, a slice, a tuple of its arguments, or several positions: see :class:`PositionSlice`.
            hold: ``"detached"`` (an alias; overwriting it in place is an error), ``"snapshot"`` (a copy) or ``"live"``
                (with its graph). By default an alias, but a copy if the points have hooks, which may edit in place.
            reducer: for points that fire more than once: ``Last()``, which warns, ``Stack()``...
            gradient: the gradient of the output, if that is not a scalar.
            keep_parameter_grads: let the backward accumulate into the parameters' ``.grad``; by default these do not
                change.
            **model_kwargs: keyword arguments of the model.

        Returns:
            The model's output, and a TensorDict with an entry per point.

        Raises:
            SelectionError: the filter matches nothing.
            CaptureError: a batch of more than one with ``remove_batch_dim``; positions out of range.
            InplaceModificationError: a kept alias was overwritten; ask for ``hold="snapshot"``.

        """
        points = self.hook_dict
        hold = hold or ("snapshot" if any(point.fwd_hooks for point in points.values()) else "detached")
        options = _options(incl_bwd, device, remove_batch_dim, pos_slice, hold=hold, reducer=reducer)
        capture = PointCapture(self.choose_among(points, names_filter), options, PointCache())
        with ExitStack() as undo:
            if reset_hooks_end:
                undo.callback(capture.recorder.close)
                with undo.enter_context(OpenedHere(self.points_root)):
                    undo.enter_context(capture.attached(self.points_root))
                undo.enter_context(running_eagerly(self.called_model))
            else:
                self._leave_hooks(capture)
            output = self.called_model(*model_args, **model_kwargs)
            if incl_bwd:
                backward(output, gradient, self.points_root.parameters(), keep_parameter_grads)
            capture.recorder.refresh()
            if names_filter is not None:  # without a filter, points that do not run are not reported
                capture.recorder.report_unfired(self.points_root)
        if clear_contexts:
            self.clear_contexts()
        return output, cast(TensorDictBase, capture.cache)

    def _leave_hooks(self, capture: PointCapture) -> None:
        """Add the hooks of a capture to its points permanently."""
        self.refuse_stale_graph()
        with MultiHookHandle().installing() as handle:
            for gradient in (False, True)[: 1 + capture.options.incl_bwd]:
                for name, hook in capture.hooks(gradient=gradient):
                    added = capture.points[name].add_hook(hook, "bwd" if gradient else "fwd")
                    handle.add(added.hook)
                    bracket_with(added, hook, self.points_root)
        self.is_caching = True


def _options(
    incl_bwd: bool,
    device: torch.device | str | None,
    remove_batch_dim: bool,
    pos_slice: Any,
    *,
    hold: Hold,
    reducer: Reducer | None,
) -> CaptureOptions:
    return CaptureOptions(
        incl_bwd=incl_bwd,
        device=device,
        remove_batch_dim=remove_batch_dim,
        pos_slice=PositionSlice.of(pos_slice),
        hold=hold,
        reducer=Last() if reducer is None else reducer,
    )


def backward(output: Any, gradient: Tensor | None, parameters: Iterable[nn.Parameter], keep_grads: bool) -> None:
    """Run the backward of the first tensor in ``output``; without ``keep_grads``, restore the parameters' grads.

    Raises:
        ContextError: the output has no graph, or is not a scalar and ``gradient`` is not given.
    """
    loss = first_tensor(output)
    if loss is None or not loss.requires_grad:
        raise ContextError(
            "incl_bwd=True calls backward() on the output, which has no graph; run with grad enabled and let something "
            "require grad"
        )
    if gradient is None and loss.numel() != 1:
        raise ContextError(
            f"incl_bwd=True calls backward() on the output, which has shape {tuple(loss.shape)} and is no scalar; pass "
            "its gradient, e.g. gradient=torch.ones_like(output)"
        )
    before: Mapping[nn.Parameter, Tensor | None] = {}
    if not keep_grads:
        before = {parameter: parameter.grad for parameter in parameters}
        for parameter in before:
            parameter.grad = None
    try:
        torch.autograd.backward(loss, gradient)
    finally:
        for parameter, grad in before.items():
            parameter.grad = grad
