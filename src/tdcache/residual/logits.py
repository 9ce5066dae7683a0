"""From the stream to logits: directions of tokens, what each part adds to a logit, and the logit lens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdcache.errors import ResidualError
from tdcache.named_places import Names
from tdcache.norms import wide
from tdcache.residual.columns import Columns
from tdcache.residual.decomposition import accumulated
from tdcache.residual.linear import LinearMap, run
from tdcache.residual.norm import final_norm, frozen_norm
from tdcache.residual.parts import Parts, tensors
from tdcache.residual.stream import CachedStream, names_of
from tdcache.tokens import Positions

__all__ = ["Readout", "logit_attribution", "logit_lens", "token_directions"]


def token_directions(
    names: Names, tokens: int | Tensor, incorrect: int | Tensor | None = None, *, prefix: str | None = None
) -> Tensor:
    """The direction of the normed stream that raises a token's logit, scaled as the model scales its logits.

    Args:
        names: the table of the model.
        tokens: a token, or a tensor of them of any shape.
        incorrect: tokens whose directions are subtracted, for differences of logits.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        ``(*tokens.shape, unit)``, in at least single precision.

    Raises:
        CanonicalNameError: the model has no unembedding.
        ResidualError: it is not affine.
    """
    stream = CachedStream.of(Parts(), names, prefix)
    return _Directions.of(stream, tokens, incorrect).weight


def logit_attribution(
    stack: TensorDictBase,
    tokens: int | Tensor,
    incorrect: int | Tensor | None = None,
    *,
    cache: TensorDictBase | None = None,
    normed: bool | None = None,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> TensorDict:
    """What each part adds to the logit of a token, or to a difference of two: its product with the token's direction.

    The final norm is applied first, with its scale frozen, unless it was. With the bias of the norm and that of the
    unembedding, which have entries of their own (``"final_norm.bias"``, ``"unembed.bias"``), the scores of a whole
    decomposition sum to the logit: scaled as the model scales it, before it is capped where the model caps it.

    Args:
        stack: values ``(batch, position, unit)`` by name, such as :func:`decompose` gives.
        tokens: one token for all rows, ``(batch,)`` for each row, or ``(batch, position)``.
        incorrect: tokens whose logits are subtracted.
        cache: where the whole value is kept, for stacks that do not carry it.
        normed: whether the final norm was applied already; needed for a TensorDict that is not from here.
        positions: where ``stack`` holds some positions, the same ones, for the whole value in ``cache``.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where neither ``stack`` nor ``cache`` carries it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        Scores ``(batch, position)`` by name.

    Raises:
        CanonicalNameError: the model has no unembedding, or no norm before it.
        ResidualError: whether the norm was applied is unknown; or the tokens do not fit the rows.
    """
    if not (isinstance(stack, Parts) and stack.table is not None):
        if normed is None:
            raise ResidualError(
                f"a {type(stack).__name__} does not say whether the final norm was applied to it; pass normed=False "
                "(with cache=) or normed=True"
            )
        table = names_of(cache, names)
    else:
        table, normed = names_of(stack, names), stack.normed if normed is None else normed
        prefix = stack.prefix if prefix is None else prefix
    stream = CachedStream.of(Parts() if cache is None else cache, table, prefix, Columns(positions, mask))
    parts = tensors(stack)
    key, first = next(iter(parts.items()))
    directions = _Directions.of(stream, tokens, incorrect, first.shape[-1])
    aligned, biases = directions.over(first, key), {}
    path = None if normed else final_norm(stream)
    if path is not None:
        name = stream.name("final_norm")
        norm = frozen_norm(stack, stream, path, name)
        if norm.bias is not None:
            biases[f"{name}.bias"] = (norm.bias * aligned).sum(-1)
        aligned = norm.back(aligned)  # once, in place of the norm of every part
    if directions.bias is not None:
        biases[stream.name("unembed.bias")] = _leading(directions.bias, first.ndim - 1)
    scores = {key: (part * aligned).sum(-1) for key, part in parts.items()}
    like = next(iter(scores.values()))
    return TensorDict({**scores, **{key: bias.to(like).expand_as(like) for key, bias in biases.items()}})


def logit_lens(
    cache: TensorDictBase,
    *,
    of: str | None = None,
    mid: bool = False,
    tokens: int | Tensor | None = None,
    positions: Positions = None,
    mask: Tensor | None = None,
    names: Names | None = None,
    prefix: str | None = None,
) -> TensorDict:
    """The logits if the model ended there, for every value of the stream (nostalgebraist 2020).

    Each value goes through the final norm, with a scale of its own, and the unembedding, scaled and capped as the model
    does it; the last entry is what the model returned.

    Args:
        cache: canonical names to values, as :func:`accumulated` needs them.
        of: the value of the stream to go up to; the last ``resid_post`` that is kept by default.
        mid: also between attention and MLP of each block.
        tokens: keep the logits of these only, as in :func:`logit_attribution`; None for the whole vocabulary.
        positions: which positions; None for all.
        mask: the attention mask, so that positions count real tokens; None counts columns.
        names: the table of names, where the cache does not carry it.
        prefix: which stream of a model with several; by default the one that logits are made of.

    Returns:
        ``(batch, position, vocabulary)`` by name of the value; with ``tokens``, ``(batch, position)``.

    Raises:
        CanonicalNameError: the model has no unembedding, or no norm before it.
        ResidualError: the cache lacks a value.
    """
    stack = accumulated(cache, of=of, mid=mid, positions=positions, mask=mask, names=names, prefix=prefix)
    readout = Readout.of(CachedStream.of(stack, None, stack.prefix))
    found = {key: readout(value) for key, value in tensors(stack).items()}
    if tokens is not None:
        found = {key: _picked(value, tokens, key) for key, value in found.items()}
    return TensorDict(found)


@dataclass(frozen=True, slots=True, eq=False)
class Readout:
    """The end of a model as a function of its stream: final norm, unembedding, scale and cap.

    Args:
        steps: the modules that run one after the other.
        scale: what their result is multiplied by.
        cap: the ``c`` of ``c * tanh(logits / c)``, or None.
    """

    steps: tuple[nn.Module, ...]
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, stream: CachedStream) -> Readout:
        """The readout of a stream."""
        facts = stream.stream
        paths = (final_norm(stream), _unembed(stream))
        return cls(tuple(stream.modules(*paths)), facts.logit_scale, facts.logit_softcap)

    def __call__(self, value: Tensor) -> Tensor:
        """Logits ``(..., vocabulary)`` of values ``(..., unit)``, in at least single precision."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and value.requires_grad):
            for step in self.steps:
                value = run(step, value)
        logits = wide(value) if self.scale == 1 else wide(value) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True, slots=True, eq=False)
class _Directions:
    """Directions of tokens, ``(*tokens, unit)``, and what the unembedding adds to their logits whatever comes."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, stream: CachedStream, tokens: int | Tensor, incorrect: int | Tensor | None, width: int | None = None
    ) -> _Directions:
        path = _unembed(stream)
        (module,) = stream.modules(path)
        linear = LinearMap.of(module, path, _width(module, path) if width is None else width)
        found = cls._rows(linear, stream.stream.logit_scale, tokens)
        if incorrect is None:
            return found
        less = cls._rows(linear, stream.stream.logit_scale, incorrect)
        bias = None if found.bias is None or less.bias is None else found.bias - less.bias
        return cls(found.weight - less.weight, bias)

    @classmethod
    def _rows(cls, linear: LinearMap, scale: float, tokens: int | Tensor) -> _Directions:
        index = torch.as_tensor(tokens, device=linear.weight.device)
        size = linear.weight.shape[1]
        if index.is_floating_point() or index.dtype == torch.bool or bool(((index < 0) | (index >= size)).any()):
            raise ResidualError(f"tokens are integers from 0 to {size - 1}, got {tokens!r}")
        rows = linear.weight.T[index] * scale
        return cls(rows, None if linear.bias is None else linear.bias[index] * scale)

    def over(self, part: Tensor, key: str) -> Tensor:
        """The direction of every row of a part ``(batch, position, unit)``, to be broadcast over the others."""
        rows = self.weight.shape[:-1]
        if part.ndim <= len(rows) or part.shape[: len(rows)] != rows:
            raise ResidualError(
                f"tokens of shape {tuple(rows)} do not fit {key!r}, which is {tuple(part.shape)}: give one token, one "
                "for each row, or one for each row and position",
                names=[key],
            )
        return _leading(self.weight.to(part), part.ndim, keep=1)


def _leading(value: Tensor, ndim: int, *, keep: int = 0) -> Tensor:
    """``value`` with axes of size 1 after those of the rows, before the ``keep`` last: it broadcasts from the left."""
    rows = value.ndim - keep
    return value.reshape(*value.shape[:rows], *(1,) * (ndim - value.ndim), *value.shape[rows:])


def _picked(logits: Tensor, tokens: int | Tensor, key: str) -> Tensor:
    index = torch.as_tensor(tokens, device=logits.device)
    if index.ndim >= logits.ndim or logits.shape[: index.ndim] != index.shape:
        raise ResidualError(
            f"tokens of shape {tuple(index.shape)} do not fit the logits of {key!r}, which are {tuple(logits.shape)}: "
            "give one token, one for each row, or one for each row and position",
            names=[key],
        )
    rows = logits.shape[:-1]
    return logits.gather(-1, _leading(index, len(rows)).expand(rows).unsqueeze(-1)).squeeze(-1)


def _unembed(stream: CachedStream) -> str:
    path = stream.stream.unembed
    if path is None:
        raise stream.error(stream.name("unembed"))
    return path


def _width(module: nn.Module, path: str) -> int:
    found = getattr(module, "in_features", None)
    if not isinstance(found, int):
        raise ResidualError(
            f"{path!r} is a {type(module).__name__} that does not say in in_features how wide the stream is, so the "
            "directions of tokens cannot be read from it alone; logit_attribution() sees the width of the parts"
        )
    return found
