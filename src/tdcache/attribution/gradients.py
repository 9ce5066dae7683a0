"""Scores from one forward and one backward: saliency, gradient times activation, Grad-CAM, guided backpropagation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdcache.attribution.base import Attribution, SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.modifiers import GuidedReLU
from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, View, wide
from tdcache.attribution.reductions import grad_cam, gradient_x_activation
from tdcache.errors import AttributionError
from tdcache.types import Selector

__all__ = [
    "GradCAM",
    "GradientXActivation",
    "GuidedBackpropagation",
    "InputXGradient",
    "Saliency",
    "Seen",
    "key_of",
    "one_backward",
    "same_rows",
]


def key_of(name: str | None, target: str | None, place: Place | str) -> tuple[Any, ...]:
    """The key of a score: ``("attr", name, target, place)``, without the parts that are None."""
    where, part = (place.name, place.part) if isinstance(place, Place) else (place, ())
    parts = (*((name,) if name is not None else ()), *((target,) if target is not None else ()))
    return ("attr", *parts, *(where if isinstance(where, tuple) else (where,)), *part)


@dataclass(slots=True)
class Seen:
    """A sink that keeps the values and gradients of one point, and the target's values.

    Places that did not run or got no gradient are left out; the pass raises for those that must not be missing.
    """

    places: Sequence[Place]
    values: dict[Place, Tensor] = field(default_factory=dict)
    grads: dict[Place, Tensor] = field(default_factory=dict)
    target: Tensor | None = None
    with_values: bool = True
    with_grads: bool = True

    def __call__(self, view: View) -> None:
        """Keep the values and gradients of the view."""
        if self.with_values:
            self.values = view.values(self.places)
        if self.with_grads:
            self.grads = view.grads(self.places)
        self.target = view.target

    def needed_target(self) -> Tensor:
        """The target's values.

        Raises:
            AttributionError: the target was not computed.
        """
        if self.target is None:
            raise AttributionError("the target was not computed")
        return self.target

    def beside(self, place: Place, value: Tensor) -> Tensor:
        """What this run has at a place, to be compared with another run's ``value``; see :func:`same_rows`."""
        return same_rows(place, self.values.get(place), value)

    def grad(self, place: Place, like: Tensor) -> Tensor:
        """The gradient, or zeros, in at least single precision."""
        return wide(self.grads[place]) if place in self.grads else torch.zeros_like(wide(like))


def same_rows(place: Place, there: Tensor | None, value: Tensor) -> Tensor:
    """``there``, which one run has at a place, to be combined with another run's ``value`` element by element.

    Raises:
        AttributionError: it has another shape, or there is none: a router gives an expert other rows in each run.
    """
    if there is None or there.shape != value.shape:
        found = "does not run" if there is None else f"has shape {tuple(there.shape)}"
        raise AttributionError(
            f"{place.name!r} has shape {tuple(value.shape)} for some inputs of this method and {found} for others, so "
            "that its rows cannot be compared; select modules that every row passes, such as the one around the experts"
        )
    return there


def one_backward(frame: Frame, places: Sequence[Place]) -> tuple[dict[str | None, Seen], list[Ask]]:
    """For each target the sink for the user's own rows, and the requests that fill it."""
    seen = {name: Seen(places) for name in frame.targets}
    asks = [
        frame.ask(frame.base, seen[name], target, values=places, grads=places) for name, target in frame.targets.items()
    ]
    return seen, asks


class _OneGradient(Attribution):
    """A method that scores the model's floating-point inputs, or the selected sites, from one gradient."""

    def work(self, frame: Frame) -> Work:
        """Request the values and gradients, and compute the scores."""
        places = frame.subjects()
        seen, asks = one_backward(frame, places)
        yield asks
        return {
            key_of(self.name, name, place): self._summed(self._score(wide(value), each.grad(place, value)))
            for name, each in seen.items()
            for place, value in each.values.items()
        }

    def _score(self, value: Tensor, grad: Tensor) -> Tensor:
        raise NotImplementedError


class Saliency(_OneGradient):
    """The gradient of the target with respect to the inputs (Simonyan et al. 2014, arXiv:1312.6034).

    Args:
        absolute: take absolute values.
        **options: see :class:`Attribution`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> with Saliency(target=1, absolute=False).prepare(model) as hooked:
        ...     td = hooked(TensorDict({"input": torch.ones(4, 3)}, batch_size=[4]))
        >>> bool((td["attr", "input"][0] == model.weight[1]).all())
        True
    """

    def __init__(self, *, absolute: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.absolute = absolute

    def _score(self, value: Tensor, grad: Tensor) -> Tensor:
        return grad.abs() if self.absolute else grad


class InputXGradient(_OneGradient):
    """The gradient times the input, elementwise (Shrikumar et al. 2016, arXiv:1605.01713)."""

    def _score(self, value: Tensor, grad: Tensor) -> Tensor:
        return gradient_x_activation(value, grad)


class GuidedBackpropagation(Saliency):
    """The gradient through ReLUs that pass only positive gradients (Springenberg et al. 2015, arXiv:1412.6806).

    Only ``nn.ReLU`` modules are changed, so the result may be negative.

    Args:
        selector: which modules count as ReLUs; all instances of ``nn.ReLU`` by default.
        absolute: take absolute values.
        **options: see :class:`Attribution`.
    """

    def __init__(self, selector: Selector | None = None, *, absolute: bool = False, **options: Any) -> None:
        modifiers = (*options.pop("modifiers", ()), GuidedReLU() if selector is None else GuidedReLU(selector))
        super().__init__(absolute=absolute, modifiers=modifiers, **options)


class GradientXActivation(_OneGradient, SiteAttribution):
    r"""The gradient times the activation at every selected module, all of them in one forward and one backward.

    Args:
        selector: which modules.
        multiply_by_inputs: multiply by the activation; with False, the scores are the gradients.
        **options: see :class:`SiteAttribution`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with GradientXActivation(r"\d", target=0).prepare(model) as hooked:
        ...     td = hooked(TensorDict({"input": torch.ones(4, 3)}, batch_size=[4]))
        >>> td["attr", "1"].shape
        torch.Size([4, 3])
    """

    def __init__(self, selector: Selector, *, multiply_by_inputs: bool = True, **options: Any) -> None:
        super().__init__(selector, **options)
        self.multiply_by_inputs = multiply_by_inputs

    def _score(self, value: Tensor, grad: Tensor) -> Tensor:
        return gradient_x_activation(value, grad) if self.multiply_by_inputs else grad


class GradCAM(_OneGradient, SiteAttribution):
    """Channels weighted by their mean gradient and summed (Selvaraju et al. 2017, arXiv:1610.02391).

    Scores have shape ``(batch, 1, *space)`` of the selected modules' outputs ``(batch, channels, *space)``.

    Args:
        selector: which modules, usually the last convolution.
        relu: keep only positive scores.
        **options: see :class:`SiteAttribution`.
    """

    def __init__(self, selector: Selector, *, relu: bool = False, **options: Any) -> None:
        super().__init__(selector, **options)
        self.relu = relu

    def _score(self, value: Tensor, grad: Tensor) -> Tensor:
        return grad_cam(value, grad, relu=self.relu)
