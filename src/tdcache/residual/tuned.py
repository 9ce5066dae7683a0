"""The tuned lens: an affine map for each layer that brings the stream into the basis of the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from tdcache.errors import ResidualError
from tdcache.named_places import Names
from tdcache.residual.decomposition import accumulated
from tdcache.residual.logits import Readout
from tdcache.residual.parts import tensors
from tdcache.residual.stream import CachedStream, names_of

__all__ = ["TunedLens", "tuned_lens"]


class TunedLens(nn.Module):
    """For each value of the stream a translator ``x + x @ A + b``, which starts as the identity.

    Belrose et al. 2023, arXiv:2303.08112. The final norm and the unembedding stay the model's own and are no part of
    the module: its ``state_dict`` holds the translators alone.

    Args:
        keys: canonical names of the values that are translated.
        width: the number of units of the stream.
        dtype: of the translators.
        device: of the translators.
    """

    def __init__(
        self,
        keys: Sequence[str],
        width: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.maps = nn.ParameterList(torch.zeros(width, width, dtype=dtype, device=device) for _ in self.keys)
        self.biases = nn.ParameterList(torch.zeros(width, dtype=dtype, device=device) for _ in self.keys)
        self.losses: TensorDict = TensorDict()
        """By name, the loss at every step, ``(steps,)``: the first is that of the plain logit lens."""

    def translate(self, key: str, value: Tensor) -> Tensor:
        """``value`` of the stream at ``key`` as it would stand at the end.

        Raises:
            ResidualError: the lens was not fitted for it.
        """
        if key not in self.keys:
            raise ResidualError(f"this lens has no translator for {key!r}; it has {', '.join(self.keys)}", names=[key])
        at = self.keys.index(key)
        moved: Tensor = value @ self.maps[at] + self.biases[at]
        return value + moved

    def forward(self, cache: TensorDictBase, *, names: Names | None = None, prefix: str | None = None) -> TensorDict:
        """The logits that the lens reads from each value, and at last those of the model.

        Args:
            cache: canonical names to values, as :func:`tdcache.residual.accumulated` needs them.
            names: the table of names, where the cache does not carry it.
            prefix: which stream of a model with several; by default the one that logits are made of.
        """
        stack = accumulated(cache, names=names, prefix=prefix)
        readout = Readout.of(CachedStream.of(stack, None, stack.prefix))
        values = {
            key: self.translate(key, value) if key in self.keys else value for key, value in tensors(stack).items()
        }
        return TensorDict({key: readout(value) for key, value in values.items()})

    def __repr__(self) -> str:
        rows = [f"  {key}: KL {each[0]:.4f} -> {each[-1]:.4f}" for key, each in self.losses.items()]
        return "\n".join([f"TunedLens of {len(self.keys)} values, {len(self.biases[0])} units", *rows])


def tuned_lens(
    caches: TensorDictBase | Sequence[TensorDictBase],
    *,
    steps: int = 250,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    mid: bool = False,
    names: Names | None = None,
    prefix: str | None = None,
) -> TunedLens:
    """Fit a tuned lens to kept values: the divergence KL(model || lens) of each value's logits, by Adam.

    The model does not run and is not changed. Padding is best left out when values are kept: a context with
    ``positions=slice(None), reducer=Concatenate(flatten=2)`` gathers rows of real tokens.

    Args:
        caches: what :func:`accumulated` needs, of one batch or of several, which the steps take in turn.
        steps: the number of steps of the optimiser.
        lr: its step size.
        weight_decay: how strongly the maps are drawn to the identity.
        mid: also the values between attention and MLP.
        names: the table of names, where the caches do not carry it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        The lens, with the loss at every step in ``lens.losses``; ``print(lens)`` shows the first and the last.

    Raises:
        ResidualError: a cache lacks a value, or there is none.

    Example:
        ``lens = tuned_lens([cache_of_batch_1, cache_of_batch_2], steps=100)``
    """
    batches = [caches] if isinstance(caches, TensorDictBase) else list(caches)
    if not batches or steps < 1:
        raise ResidualError(
            f"a lens is fitted to at least one cache in at least one step, got {len(batches)} and {steps}"
        )
    table = names_of(batches[0], names)
    readout = Readout.of(CachedStream.of(batches[0], table, prefix))
    stacks = [_constants(accumulated(each, mid=mid, names=table, prefix=prefix)) for each in batches]
    *keys, last = stacks[0]
    end = stacks[0][last]
    with torch.no_grad():
        wanted = [F.log_softmax(readout(stack[last]), -1) for stack in stacks]
    lens = TunedLens(keys, end.shape[-1], dtype=end.dtype, device=end.device)
    optimizer = torch.optim.AdamW(lens.parameters(), lr=lr, weight_decay=weight_decay)
    losses = {key: end.new_zeros(steps) for key in keys}
    for step in range(steps):
        stack, target = stacks[step % len(stacks)], wanted[step % len(stacks)]
        for at, key in enumerate(keys):  # one at a time: the logits of one layer are in memory
            logits = readout(lens.translate(key, stack[key]))
            loss = F.kl_div(F.log_softmax(logits, -1), target, reduction="none", log_target=True).sum(-1).mean()
            own = (lens.maps[at], lens.biases[at])
            for parameter, grad in zip(own, torch.autograd.grad(loss, own), strict=True):
                parameter.grad = grad  # the model's own parameters get none
            losses[key][step] = loss.detach()
        optimizer.step()
    optimizer.zero_grad()
    lens.losses = TensorDict(losses)
    return lens


def _constants(stack: TensorDictBase) -> dict[str, Tensor]:
    """The entries without graph; those of ``inference_mode`` as copies, since autograd cannot save them."""
    found = {key: value.detach() for key, value in tensors(stack).items()}
    return {key: value.clone() if value.is_inference() else value for key, value in found.items()}
