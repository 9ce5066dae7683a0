"""The input sequences of one call of a model, with their masks: which tokens the values at a site belong to.

A call can have two input sequences (encoder and decoder), a mask can be longer than the input (a cache), and each
library names masks differently. A site must get the mask of its own sequence, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import regex
import torch
from torch import Tensor

from tdcache.arguments import cached_in, length_of_first, tokens_fed
from tdcache.errors import SelectionError, listed
from tdcache.masks import attended_columns, real_columns
from tdcache.paths import near_misses
from tdcache.tokens import Tokens

__all__ = ["Fed", "Sequences"]

Role = Literal["", "encoder", "decoder"]

_MASKS = ("attention_mask", "src_key_padding_mask", "key_padding_mask", "mask")
_TORCH = ("src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask", "key_padding_mask")
_IDS = ("input_ids", "inputs_embeds", "src", "tgt", "hidden_states", "input_values")
_CROSS = regex.compile(r"(?i).*(cross_?att|encoder_attn|encdecattention|multihead_attn|crossattention)(?!.*norm).*")
"""Where a value may be of either sequence: cross-attention, its norms apart, which are in the decoder's stream."""


@dataclass(frozen=True, slots=True, eq=False)
class Fed:
    """One input sequence of a call."""

    role: Role
    length: int | None
    """How many tokens are fed; None if no argument tells."""
    mask: Any = None
    name: Any = None
    past: int | None = 0
    """How many columns are cached; None if some are and it is unknown how many."""
    more: bool = False
    position_ids: Tensor | None = None
    ids: bool = False
    """Whether ``length`` is that of token ids, so that an axis of another length is not one of tokens."""

    def tokens(self, path: str, batch: int, length: int, device: torch.device | None) -> Tokens:
        """The tokens of a value ``(batch, length, ...)`` at the site ``path``.

        Raises:
            SelectionError: the mask does not fit the value, or cannot be read.
        """
        ids = self._ids(batch, length, device)
        begin = 0
        if self.mask is None:
            if self.ids and length != self.length:
                raise SelectionError(
                    f"the value at {path!r} has {length} positions, and this call feeds {self.length} tokens; set "
                    "position_dim= to the axis of tokens, or count columns with mask_key=None",
                    selector=path,
                )
            real, known = torch.ones(batch, length, dtype=torch.bool, device=device), self.past is not None
            before = torch.full((batch,), self.past or 0, device=device)
        else:
            columns, begin = self._columns(path, batch, length)
            columns = columns.expand(batch, -1).to(device)
            real, before = columns[:, begin : begin + length], columns[:, :begin].sum(1)
            known = begin == self.past or (self.past is None and begin > 0)
        counted = self._counted(real, ids)
        if begin and not self.mask_is_flat:
            # Over queries and keys a window hides cached tokens as padding does; the position ids must agree.
            known = counted is not None and torch.equal(counted.to(before), before)
            counted = None
        tokens = Tokens.of_mask(real, before=before, position_ids=ids)
        return replace(tokens, before=before if known else counted, more=self.more)

    @property
    def mask_is_flat(self) -> bool:
        """Whether the mask is ``(batch, columns)``, so that all its columns can be counted."""
        return isinstance(self.mask, Tensor) and self.mask.dim() == 2

    def _columns(self, path: str, batch: int, length: int) -> tuple[Tensor, int]:
        """The mask over columns, and the first fed one."""
        mask = self.mask
        if isinstance(mask, Mapping):
            mask = mask.get("full_attention")
        if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4:
            raise self._unread(path, batch, length, f"a {type(self.mask).__name__}")
        if mask.shape[0] not in (1, batch):
            raise self._unread(path, batch, length, f"shape {tuple(mask.shape)}")
        if mask.dim() > 2:
            past = mask.shape[-1] - length if self.past is None else self.past
            if mask.shape[-2] != length or past < 0 or mask.shape[-1] < past + length or not _is_hf(self.name):
                raise self._unread(path, batch, length, f"shape {tuple(mask.shape)}")
            return attended_columns(mask, self.name, end=past + length), past
        if mask.shape[1] < length or (self.length is not None and self.length != length):
            raise self._unread(path, batch, length, f"shape {tuple(mask.shape)}")
        begin = mask.shape[1] - length
        if self.past is not None and mask.shape[1] >= self.past + length:
            begin = self.past
        elif self.past is not None and begin:
            raise self._unread(path, batch, length, f"shape {tuple(mask.shape)} beside {self.past} cached tokens")
        name = self.name.removeprefix("~") if isinstance(self.name, str) else self.name
        return real_columns(mask, name, marks_padding=name in _TORCH or name != self.name), begin

    def _unread(self, path: str, batch: int, length: int, got: str) -> SelectionError:
        return SelectionError(
            f"mask {self.name!r} ({got}) does not tell the real tokens of the value at {path!r}, which has {batch} "
            f"rows of {length}; name another by mask_key=, or count columns with mask_key=None",
            selector=self.name,
        )

    def _ids(self, batch: int, length: int, device: torch.device | None) -> Tensor | None:
        ids = self.position_ids
        fits = ids is not None and ids.dim() == 2 and ids.shape[0] in (1, batch) and ids.shape[1] == length
        return ids.to(device).expand(batch, -1) if fits and ids is not None else None

    @staticmethod
    def _counted(real: Tensor, ids: Tensor | None) -> Tensor | None:
        """How many tokens come before, by the position id of the first real column."""
        return None if ids is None else ids.gather(1, real.int().argmax(1, keepdim=True))[:, 0]


class Sequences:
    """The sequences of one call.

    Args:
        arguments: the call's arguments by name, as :func:`tdcache.arguments.named_arguments` gives them.
        mask_key: the name of the mask among them. ``"auto"`` finds it: ``attention_mask`` and
            ``decoder_attention_mask``, torch's ``..._key_padding_mask`` (where True is padding), ``mask`` of shape
            ``(batch, seq)``. ``"~name"`` is a mask in which True, or 1, marks padding. None means no mask: positions
            are columns.

    Raises:
        SelectionError: there is no such argument, or a padding mask whose sense its name does not tell.

    Example:
        >>> ids, mask = torch.tensor([[0, 7, 8]]), torch.tensor([[0, 1, 1]])
        >>> Sequences({"input_ids": ids, "attention_mask": mask}).at("h.0", batch=1, length=3).place
        tensor([[-1,  0,  1]])
    """

    def __init__(self, arguments: Mapping[Any, Any], *, mask_key: Any = "auto") -> None:
        given = {name: each for name, each in arguments.items() if each is not None}
        self._shapes = [each.shape for each in given.values() if isinstance(each, Tensor) and each.dim()]
        self.fed: tuple[Fed, ...]
        if mask_key is None:
            self.fed = (Fed("", None),)
        elif mask_key != "auto":
            self.fed = (_chosen(given, arguments, mask_key),)
        else:
            self.fed = _found(given, arguments)

    def at(self, path: str, *, batch: int, length: int, device: torch.device | None = None) -> Tokens:
        """The tokens of a value of ``batch`` rows and ``length`` positions at the site ``path``.

        Raises:
            SelectionError: no sequence has this length, two have it, or the mask cannot be read.
        """
        return self.own(path, length).tokens(path, batch, length, device)

    def check_rows(self, path: str, value: Tensor, axis: int) -> None:
        """Check that a value has the rows of this call along ``axis``.

        Without this check an expert, which is given a list of tokens, would have tokens taken for rows.

        Raises:
            SelectionError: no input of the call has that many.
        """
        # Rows may come second where a model works on positions first, and the edges of a graph are columns.
        sizes = {size for shape in self._shapes for size in shape[:2]}
        if sizes and value.shape[axis] not in sizes:
            raise SelectionError(
                f"the value at {path!r} has shape {tuple(value.shape)}, and no input of this call has "
                f"{value.shape[axis]} along its first two axes ({listed(sorted(sizes))}): without rows of the batch, "
                "rows= and positions= mean nothing there; select a module that every row passes, or set position_dim=",
                selector=path,
            )

    def own(self, path: str, length: int) -> Fed:
        """The sequence that the value at ``path``, of ``length`` positions, consists of.

        Raises:
            SelectionError: no sequence has this length, or two have it.
        """
        fits = [each for each in self.fed if each.length in (None, length)]
        if len(self.fed) == 1:
            fits = list(self.fed)
        if len(fits) > 1 and not _CROSS.fullmatch(path):
            under = next((part for part in path.split(".") if part in ("encoder", "decoder")), None)
            fits = [each for each in fits if each.role == under] or fits
        if len(fits) == 1 or (fits and all(each.mask is None and each.past == 0 for each in fits)):
            return fits[0]
        lengths = [f"{each.role or 'the only one'}: {each.length}" for each in self.fed]
        found = "no sequence" if not fits else "more than one sequence"
        raise SelectionError(
            f"the value at {path!r} has {length} positions, the length of {found} of this call ({', '.join(lengths)}), "
            "so it cannot be told which mask is its own; name it by mask_key=, or count columns with mask_key=None",
            selector=path,
        )


def _named(given: Mapping[Any, Any], key: Any) -> Any:
    found = given.get(key.removeprefix("~") if isinstance(key, str) else key)
    if found is not None:
        return found
    names = [str(each) for each in given]
    near = near_misses(regex.escape(str(key)), names)
    hint = f"did you mean {listed(near)}?" if near else f"the call has {listed(names)}"
    raise SelectionError(
        f"mask_key={key!r} is no argument of this call; {hint} (mask_key=None counts columns)", selector=key, near=near
    )


def _single(given: Mapping[Any, Any], mask: Any, name: Any) -> Fed:
    cached = cached_in(given)
    fed = tokens_fed(given) if mask is None else None
    ids = fed is not None and fed.dim() == 2 and not fed.is_floating_point()
    length = fed.shape[1] if fed is not None and ids else _length_in(given, _IDS)
    if name in _TORCH:
        length = _of_torch("", given, name).length
    return Fed("", length, mask, name, cached.length, cached.cache is not None, given.get("position_ids"), ids)


def _chosen(given: Mapping[Any, Any], arguments: Mapping[Any, Any], key: Any) -> Fed:
    """The sequence that the mask of this name belongs to: of an encoder and a decoder, the one whose mask it is."""
    mask = _named(given, key)
    sides = _sides(given, arguments)
    return next((each for each in sides if each.name == key), None) or _single(given, mask, key)


def _length_in(given: Mapping[Any, Any], names: Sequence[str]) -> int | None:
    """The second size of the first tensor of two axes or more among these arguments."""
    found = (given.get(name) for name in names)
    return next((each.shape[1] for each in found if isinstance(each, Tensor) and each.dim() >= 2), None)


def _found(given: Mapping[Any, Any], arguments: Mapping[Any, Any]) -> tuple[Fed, ...]:
    sides = _sides(given, arguments)
    if len(sides) == 2:
        return sides
    own = _single(given, *_auto(given))
    return (replace(own, role="decoder"), *sides) if sides else (own,)


def _sides(given: Mapping[Any, Any], arguments: Mapping[Any, Any]) -> tuple[Fed, ...]:
    """Encoder and decoder of a call that feeds both; the encoder alone of a call with its states; else nothing."""
    if "decoder_input_ids" in arguments or "decoder_inputs_embeds" in arguments:
        return _encoder_decoder(given)
    if "src" in given and "tgt" in given:
        return _of_torch("encoder", given, "src_key_padding_mask"), _of_torch("decoder", given, "tgt_key_padding_mask")
    states = given.get("encoder_hidden_states")
    if states is None:
        return ()
    name = "encoder_attention_mask"
    return (Fed("encoder", length_of_first(states), given.get(name), name),)


def _of_torch(role: Role, given: Mapping[Any, Any], name: str) -> Fed:
    mask = given.get(name)  # tells the length; what is fed may have its sequence along axis 0
    return Fed(role, mask.shape[-1] if isinstance(mask, Tensor) else None, mask, name)


def _encoder_decoder(given: Mapping[Any, Any]) -> tuple[Fed, ...]:
    cached = cached_in(given)
    length = _length_in(given, ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
    source = [given.get(name) for name in ("encoder_outputs", "input_ids", "inputs_embeds")]
    mask = given.get("attention_mask")
    encoder = next((length_of_first(each) for each in source if each is not None), None)
    if encoder is None and isinstance(mask, Tensor):
        encoder = mask.shape[-1]
    return (
        Fed("encoder", encoder, mask, "attention_mask"),
        Fed(
            "decoder", length, given.get("decoder_attention_mask"), "decoder_attention_mask", cached.length,
            cached.cache is not None, given.get("decoder_position_ids"),
        ),
    )  # fmt: skip


def _auto(given: Mapping[Any, Any]) -> tuple[Any, Any]:
    for name in _MASKS:
        mask = given.get(name)
        if mask is not None and (name != "mask" or _is_row_mask(mask, given)):
            return mask, name
    unclear = [name for name in given if isinstance(name, str) and "padding" in name and "mask" in name]
    if unclear:
        raise SelectionError(
            f"whether 1 in {unclear[0]!r} marks a token or padding is not told by its name; give "
            f"mask_key={unclear[0]!r} if a token, mask_key='~{unclear[0]}' if padding, or mask_key=None for columns",
            selector=unclear[0],
        )
    return None, None


def _is_row_mask(mask: Any, given: Mapping[Any, Any]) -> bool:
    """Whether an argument that is just called ``mask`` has a row per sample; torch's own are ``(seq, seq)``.

    Raises:
        SelectionError: it can be both.
    """
    others = [each for name, each in given.items() if name != "mask" and isinstance(each, Tensor) and each.dim() >= 2]
    if not isinstance(mask, Tensor) or "src" in given or not others or mask.shape != others[0].shape[:2]:
        return False
    if mask.shape[0] == mask.shape[1]:
        raise SelectionError(
            f"'mask' of shape {tuple(mask.shape)} can be one of rows and tokens or one of queries and keys; give "
            "mask_key='mask' if it has a row per sample, or mask_key=None to count columns",
            selector="mask",
        )
    return True


def _is_hf(name: Any) -> bool:
    """Whether True in a mask of this name over queries and keys means to look there; in torch's own it can be both."""
    return isinstance(name, str) and name.endswith("attention_mask")
