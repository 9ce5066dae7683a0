"""Rules of layer-wise relevance propagation, one class each.

Relevance is carried as a gradient: at every tensor ``R = a * g``, so that sums, pooling and everything linear conserve
it by the ordinary backward, and a rule only says what the gradient of a module's input is. A rule gives relevances
``R_j``; they become gradients by dividing by ``a_j``, where zeros are replaced by a tiny number (:func:`nonzero`), and
reading relevance out multiplies with the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdcache.attribution.lrp.linear import Linear, transposed

__all__ = ["AlphaBeta", "Epsilon", "Flat", "Gamma", "Pass", "Rule", "WSquare", "ZPlus", "nonzero", "stabilised"]


def nonzero(tensor: Tensor) -> Tensor:
    """The tensor with a tiny number in place of exact zeros."""
    tiny = 1e-18 if torch.finfo(tensor.dtype).max > 1e30 else 1e-4
    return torch.where(tensor == 0, torch.full_like(tensor, tiny), tensor)


def stabilised(z: Tensor, eps: float) -> Tensor:
    """``z`` moved away from zero by ``eps``, towards its sign (zero counts as positive)."""
    return z + torch.where(z < 0, -eps, eps)


def _vjp(linear: Linear, x: Tensor, weight: Tensor, cotangent: Tensor) -> Tensor:
    """The transpose of the linear map, at a cotangent; ``x`` gives the shape."""
    short = transposed(linear, x, weight, cotangent)
    if short is not None:
        return short
    with torch.enable_grad():
        at = torch.zeros_like(x).requires_grad_()
        out = linear(at, weight, None)
    (found,) = torch.autograd.grad(out, at, cotangent, create_graph=torch.is_grad_enabled())
    return found


class Rule:
    """Base of the rules for linear modules: override :meth:`input_relevance`."""

    def input_relevance(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, relevance: Tensor
    ) -> Tensor:
        """The relevance of the input, from that of the output.

        Args:
            linear: the module's function.
            x: its input.
            weight: its weight.
            bias: its bias.
            z: its output.
            relevance: of the output, of the shape of ``z``.
        """
        raise NotImplementedError

    def input_gradient(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, grad: Tensor
    ) -> Tensor:
        """The gradient that carries the relevance of the input."""
        return self.input_relevance(linear, x, weight, bias, z, nonzero(z) * grad) / nonzero(x)


@dataclass(frozen=True, slots=True)
class Epsilon(Rule):
    """``R_j = sum_k x_j w_jk / (z_k + eps sign z_k) R_k`` (Bach et al. 2015); ``eps=0`` is the basic rule, LRP-0."""

    eps: float = 1e-6

    def input_gradient(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, grad: Tensor
    ) -> Tensor:
        """The ordinary gradient, scaled per output: needs no division by the input."""
        scaled = grad if self.eps == 0 else grad * z / stabilised(z, self.eps)
        return _vjp(linear, x, weight, scaled)


@dataclass(frozen=True, slots=True)
class Gamma(Rule):
    """Weights in favour are enlarged: ``w + gamma max(w, 0)`` (Montavon et al. 2019).

    In its form for inputs and outputs of both signs (Andéol et al. 2021): positive outputs favour positive
    contributions, negative outputs negative ones.
    """

    gamma: float = 0.25
    eps: float = 1e-6

    def input_relevance(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, relevance: Tensor
    ) -> Tensor:
        """The relevance of the input."""
        up, down = weight + self.gamma * weight.clamp(min=0), weight + self.gamma * weight.clamp(max=0)
        bias_up = None if bias is None else bias + self.gamma * bias.clamp(min=0)
        bias_down = None if bias is None else bias + self.gamma * bias.clamp(max=0)
        high, low = x.clamp(min=0), x.clamp(max=0)
        favoured = linear(high, up, bias_up) + linear(low, down, None)
        opposed = linear(high, down, bias_down) + linear(low, up, None)
        in_favour = torch.where(z > 0, relevance / stabilised(favoured, self.eps), 0.0)
        against = torch.where(z < 0, relevance / stabilised(opposed, self.eps), 0.0)
        of_high = _vjp(linear, x, up, in_favour) + _vjp(linear, x, down, against)
        of_low = _vjp(linear, x, down, in_favour) + _vjp(linear, x, up, against)
        return high * of_high + low * of_low


@dataclass(frozen=True, slots=True)
class AlphaBeta(Rule):
    """Positive contributions count ``alpha``, negative ones ``beta``; ``alpha - beta = 1`` (Bach et al. 2015)."""

    alpha: float = 2.0
    beta: float = 1.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(
                f"alpha and beta are not negative and alpha - beta = 1, got alpha={self.alpha:g}, beta={self.beta:g}"
            )

    def input_relevance(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, relevance: Tensor
    ) -> Tensor:
        """The relevance of the input."""
        parts = _Signed.split(linear, x, weight, bias)
        return self.alpha * parts.share(relevance, self.eps) - (
            self.beta * parts.opposite().share(relevance, self.eps) if self.beta else 0.0
        )


@dataclass(frozen=True, slots=True)
class ZPlus(Rule):
    """Only positive contributions count: :class:`AlphaBeta` with ``alpha=1, beta=0`` (Montavon et al. 2017)."""

    eps: float = 1e-6

    def input_relevance(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, relevance: Tensor
    ) -> Tensor:
        """The relevance of the input."""
        return _Signed.split(linear, x, weight, bias).share(relevance, self.eps)


@dataclass(frozen=True, slots=True)
class _Signed:
    """The contributions of one sign: inputs and weights of equal signs (positive), or of opposite ones."""

    linear: Linear
    high: Tensor
    low: Tensor
    with_high: Tensor
    with_low: Tensor
    bias: Tensor | None
    other_bias: Tensor | None
    both: bool
    """Whether some input is negative."""

    @classmethod
    def split(cls, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> _Signed:
        """Return the pairs of inputs and weights whose products are positive."""
        up, down = (None, None) if bias is None else (bias.clamp(min=0), bias.clamp(max=0))
        return cls(
            linear,
            x.clamp(min=0),
            x.clamp(max=0),
            weight.clamp(min=0),
            weight.clamp(max=0),
            up,
            down,
            bool((x < 0).any()),
        )

    def opposite(self) -> _Signed:
        """Return the pairs whose products are negative: the same inputs with the weights exchanged."""
        return _Signed(
            self.linear, self.high, self.low, self.with_low, self.with_high, self.other_bias, self.bias, self.both
        )

    def share(self, relevance: Tensor, eps: float) -> Tensor:
        """The relevance, shared in proportion to the contributions."""
        total = self.linear(self.high, self.with_high, self.bias)
        if not self.both:  # after a ReLU
            return self.high * _vjp(self.linear, self.high, self.with_high, relevance / stabilised(total, eps))
        per_unit = relevance / stabilised(total + self.linear(self.low, self.with_low, None), eps)
        of_high = _vjp(self.linear, self.high, self.with_high, per_unit)
        return self.high * of_high + self.low * _vjp(self.linear, self.low, self.with_low, per_unit)


@dataclass(frozen=True, slots=True)
class WSquare(Rule):
    """In proportion to squared weights, whatever the input: ``R_j = sum_k w_jk^2 / sum_i w_ik^2 R_k``."""

    eps: float = 1e-6

    def input_relevance(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, relevance: Tensor
    ) -> Tensor:
        """The relevance of the input."""
        return _regardless(linear, x, weight**2, relevance, self.eps)


@dataclass(frozen=True, slots=True)
class Flat(Rule):
    """In equal parts to all inputs of a unit."""

    eps: float = 1e-6

    def input_relevance(
        self, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, relevance: Tensor
    ) -> Tensor:
        """The relevance of the input."""
        return _regardless(linear, x, torch.ones_like(weight), relevance, self.eps)


def _regardless(linear: Linear, x: Tensor, weight: Tensor, relevance: Tensor, eps: float) -> Tensor:
    ones = torch.ones_like(x)
    return _vjp(linear, x, weight, relevance / stabilised(linear(ones, weight, None), eps))


@dataclass(frozen=True, slots=True)
class Pass(Rule):
    """Elementwise modules hand relevance on unchanged: ``g_in = g * f(x) / x``, at ``x = 0`` the ordinary gradient."""

    def change(self, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient that carries the input's relevance."""
        return grad * nonzero(y) / nonzero(x)
