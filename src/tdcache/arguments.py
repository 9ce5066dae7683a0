"""The arguments of a forward by name, and how much a key-value cache among them holds.

Masks, caches and token ids may be passed by position, by keyword, or as entries of a mapping or TensorDict. They are
looked up here only, so that all of the library finds the same ones.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import regex
from tensordict import TensorDictBase
from torch import Tensor, nn

__all__ = [
    "Cached",
    "cached_in",
    "call_with",
    "forward_names",
    "length_of_first",
    "named_arguments",
    "takes_cache",
    "tokens_fed",
]

_CACHE = regex.compile(
    r"(?:(?:past|prev|previous|last|init|initial|incremental|recurrent|rnn|lstm|gru|ssm|conv|layer|decoder|h|c)_)*"
    r"(?:states?|hidden|(?<!last_)hidden_state|carry|hx)"
    r"|(?:(?:past|prev|previous|kv|k|v|key|value|keys|values|and|layer|attn|decoder)_)*(?:caches?|mems?|memories|pasts?|kv)"
    r"|past_key_values?|past_buckets_states|cache_params|inference_params"
)
"""What a forward calls the argument with the state of the tokens before."""

_OFFSETS = ("cache_position", "input_pos", "start_pos")
"""What a forward that keeps the cache in itself calls the number of the first token that is fed."""

# Legacy caches under these names hold keys of shape (batch, heads, tokens, d_head); other states do not tell a length.
_KEYS_AND_VALUES = ("past_key_values", "past_key_value", "past", "layer_past", "cache", "kv_cache")
_FED = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds", "tgt", "tokens", "idx")
_known: WeakKeyDictionary[FunctionType, tuple[str, ...]] = WeakKeyDictionary()
"""By method, what :func:`forward_names` returns; reading the signatures of a whole model takes milliseconds."""
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of a module's forward that can be given by position; empty if there is no signature.

    >>> forward_names(nn.LSTM(1, 1))
    ('input', 'hx')
    """
    forward = module.forward
    function = getattr(forward, "__func__", None)
    if type(function) is not FunctionType:
        return _positional(forward)
    if function not in _known:
        _known[function] = _positional(function)[1:]
    return _known[function]


def _positional(function: Any) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(each.name for each in parameters if each.kind in _POSITIONAL)


def call_with(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a user's ``inputs=``, and return its result.

    Args:
        model: the model.
        inputs: a tuple of arguments, a mapping of keyword arguments, or a tensor, TensorDict or other single argument.
    """
    if isinstance(inputs, Mapping) and not isinstance(inputs, TensorDictBase):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def named_arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """The arguments of one call by name; entries of a mapping or TensorDict given by position are added by their keys.

    A name that was not given is there with None, so that ``name in arguments`` says whether the forward takes it.

    Args:
        names: what :func:`forward_names` gives; further positional arguments have no name and are left out.
        args: the positional arguments.
        kwargs: the keyword arguments.
    """
    found: dict[Any, Any] = {}
    for each in args:
        if isinstance(each, Mapping) or (hasattr(each, "batch_size") and hasattr(each, "keys")):
            found |= dict(each.items())
    return dict.fromkeys(names) | found | dict(zip(names, args, strict=False)) | dict(kwargs)


class Cached(NamedTuple):
    """The cache that a call was given."""

    cache: Any
    """The cache object, or None."""
    length: int | None
    """How many tokens it holds; None if it holds some and does not say how many."""

    @property
    def filled(self) -> bool:
        """Whether it holds anything."""
        return self.length != 0


@functools.cache
def _is_cache(name: Any) -> bool:
    return isinstance(name, str) and _CACHE.fullmatch(name) is not None


def takes_cache(names: Sequence[str]) -> bool:
    """Whether a forward with these parameters is told what was fed before; the first of them is what is fed now."""
    return any(_is_cache(name) or name in _OFFSETS for name in names[1:])


def cached_in(arguments: Mapping[Any, Any]) -> Cached:
    """The first cache among the arguments of a call that tells its length, or else the first; what is fed is none."""
    given = {name: each for name, each in arguments.items() if each is not None and _is_cache(name)}
    fed = tokens_fed(arguments) if given else None
    found = [Cached(cache, _length(cache, name, arguments)) for name, cache in given.items() if cache is not fed]
    telling = (each for each in found if each.length is not None)
    return next(telling, found[0]) if found else Cached(None, _offset(arguments) or 0)


def _offset(arguments: Mapping[Any, Any]) -> int | None:
    position = next((arguments[name] for name in _OFFSETS if arguments.get(name) is not None), None)
    if isinstance(position, Tensor) and position.numel():
        return int(position.reshape(-1)[0])
    return position if type(position) is int else None


def _length(cache: Any, name: str, arguments: Mapping[Any, Any]) -> int | None:
    if hasattr(cache, "get_seq_length"):
        return _counted(cache)
    position = getattr(cache, "seqlen_offset", None)  # of mamba_ssm
    position = _offset(arguments) if position is None else position
    if position is not None:
        return int(position)
    first = cache
    while isinstance(first, Mapping | tuple | list) and first:
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    if isinstance(first, Mapping | tuple | list):
        return 0
    if name in _KEYS_AND_VALUES and isinstance(first, Tensor) and first.dim() >= 3:
        return int(first.shape[-2])
    return None


def _counted(cache: Any) -> int | None:
    """How many tokens a cache of transformers says it holds."""
    try:
        length = int(cache.get_seq_length())
        if not length:  # of the first layer alone, which may count nothing (MiniMax)
            layers = [each for each in getattr(cache, "layers", ()) if hasattr(each, "get_seq_length")]
            length = max((int(each.get_seq_length()) for each in layers), default=0)
        return length
    except (ValueError, NotImplementedError):  # transformers' caches of linear attention (Mamba) count no tokens
        has_state = getattr(cache, "has_previous_state", None)
        return None if not callable(has_state) or has_state() else 0


def tokens_fed(arguments: Mapping[Any, Any]) -> Tensor | None:
    """The token ids ``(batch, seq)`` or embeddings ``(batch, seq, d)`` that a call feeds; the decoder's, if it has one.

    A forward without such names feeds its first tensor of two or more axes.
    """
    for name in _FED:
        fed = arguments.get(name)
        if isinstance(fed, Tensor):
            return fed
        if name == "decoder_inputs_embeds" and "decoder_input_ids" in arguments:
            labels = arguments.get("labels")  # from which transformers makes the decoder's ids
            if isinstance(labels, Tensor):
                return labels
    return next((each for each in arguments.values() if isinstance(each, Tensor) and each.dim() >= 2), None)


def length_of_first(value: Any) -> int | None:
    """The size of the second axis of the first tensor in a value, such as the tokens of ``encoder_outputs``."""
    while isinstance(value, Mapping | tuple | list) and value:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value.shape[1] if isinstance(value, Tensor) and value.dim() >= 2 else None
