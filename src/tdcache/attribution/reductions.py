"""From activations and gradients to scores: plain algebra, for tensors and for whole TensorDicts, online or stored."""

from __future__ import annotations

from typing import TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

__all__ = ["attention_rollout", "difference_x_gradient", "grad_cam", "gradient_x_activation"]

Values = TypeVar("Values", Tensor, TensorDictBase)


def gradient_x_activation(activations: Values, gradients: Values) -> Values:
    """The gradient times the activation, elementwise: ``gradient_x_activation(cache["fwd"], cache["bwd"])``."""
    return activations * gradients


def difference_x_gradient(base: Values, patched: Values, gradients: Values) -> Values:
    """The first-order estimate of ``metric(patched) - metric(base)``; ``gradients`` are those of the base run."""
    return (patched - base) * gradients


def grad_cam(activations: Tensor, gradients: Tensor, *, relu: bool = False) -> Tensor:
    """Channels weighted by their mean gradient and summed (Selvaraju et al. 2017): ``(batch, 1, *space)``.

    Args:
        activations: ``(batch, channels, *space)``.
        gradients: the same shape.
        relu: keep only what speaks for the target.
    """
    space = tuple(range(2, gradients.ndim))
    weights = gradients.mean(dim=space, keepdim=True) if space else gradients
    scores = (weights * activations).sum(dim=1, keepdim=True)
    return scores.relu() if relu else scores


def attention_rollout(
    patterns: list[Tensor], gradients: list[Tensor] | None = None, *, residual: float = 0.5
) -> Tensor:
    """How much of each input token reaches each position (Abnar and Zuidema 2020, arXiv:2005.00928).

    Args:
        patterns: attention probabilities of each layer, first layer first, ``(batch, heads, query, key)``.
        gradients: of the target with respect to them; heads are then weighted by the positive part of gradient times
            pattern (Chefer et al. 2021, arXiv:2103.15679) instead of averaged.
        residual: the share of the skip connection. With gradients a layer is ``2 * (residual * I + (1 - residual) *
            heads)``, which at one half is the paper's ``I + heads``.

    Returns:
        ``(batch, query, key)``.
    """
    joint: Tensor | None = None
    for layer, pattern in enumerate(patterns):
        mixed = (pattern if gradients is None else (pattern * gradients[layer]).relu()).mean(dim=1)
        eye = torch.eye(mixed.shape[-1], dtype=mixed.dtype, device=mixed.device)
        mixed = (1 - residual) * mixed + residual * eye
        # R = prod_l norm((mean_h P_l + I) / 2); weighted by gradients, rows have no sum to keep.
        step = mixed / mixed.sum(-1, keepdim=True) if gradients is None else 2 * mixed
        joint = step if joint is None else step @ joint
    if joint is None:
        raise ValueError("attention_rollout needs at least one layer")
    return joint
