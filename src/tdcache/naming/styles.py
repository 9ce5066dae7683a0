"""Other spellings of canonical names, with the layouts that their users know."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import regex

from tdcache.named_places import NamedPlace, Names
from tdcache.named_roles import block_name
from tdcache.naming.projections import before_rotation
from tdcache.naming.trace import ForwardTrace

__all__ = ["STYLES", "Style", "in_style"]

_TRANSFORMER_LENS = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "final_norm": "ln_final.hook_normalized",
    "unembed": "unembed.hook_out",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_mid_cross": "hook_resid_mid_cross",
    "resid_post": "hook_resid_post",
    "attn.contribution": "hook_attn_out",
    "cross_attn.contribution": "hook_cross_attn_out",
    "mlp.contribution": "hook_mlp_out",
    "attn.scores": "attn.hook_attn_scores",
    "cross_attn.scores": "cross_attn.hook_attn_scores",
}
"""What is spelled otherwise than by ``hook_`` before its last part."""
_NORM = regex.compile(r"ln\d(?:_post)?")
_STACKS = {"encoder.": "encoder_", "decoder.": "decoder_"}


def _transformer_lens(prefix: str, block: str, role: str) -> str:
    """The name as TransformerLens has it, for instance ``blocks.0.attn.hook_pattern``."""
    head = _STACKS.get(prefix, prefix) + block
    if role in _TRANSFORMER_LENS:
        return head + _TRANSFORMER_LENS[role]
    if _NORM.fullmatch(role):
        return f"{head}{role}.hook_normalized"
    above, dot, last = role.rpartition(".")
    return f"{head}{above}{dot}hook_{last}"


def _positions_first(place: NamedPlace) -> NamedPlace:
    """Queries, keys, values and their mixture as ``(batch, position, head, unit)``."""
    if len(place.axes) != 4 or place.axes[3] != "unit" or place.axes[1] not in ("head", "kv_head"):
        return place
    batch, head, _, unit = place.axes
    order = (0, 2, 1, 3) if place.order is None else tuple(place.order[axis] for axis in (0, 2, 1, 3))
    return replace(place, axes=(batch, "position", head, unit), order=order)


@dataclass(frozen=True, slots=True)
class Style:
    """Another spelling of names.

    Attributes:
        spell: prefix, block and role to a name.
        lay_out: a place to the same place in the layout of that style.
        meant: the table, with places for names that mean another value there, as one recorded forward shows them.
    """

    spell: Callable[[str, str, str], str]
    lay_out: Callable[[NamedPlace], NamedPlace]
    meant: Callable[[Names, ForwardTrace], Names]


STYLES: Mapping[str, Style] = {"transformer_lens": Style(_transformer_lens, _positions_first, before_rotation)}


def in_style(names: Names, style: str) -> Names:
    """The same table in another spelling; values are views in the layout of that style, read and written."""
    spell = STYLES[style].spell
    places = {_spelled(name, spell): STYLES[style].lay_out(place) for name, place in names.items()}
    spelling = {name: _spelled(names.spelled(name), spell) for name in (*names, *names.refused, *names.spelling)}
    refused = {_spelled(name, spell): _in_words(reason, spelling) for name, reason in names.refused.items()}
    return names.replaced(
        places={name: replace(place, name=name) for name, place in places.items()},
        refused={**_computed_elsewhere(places), **refused},
        style=style,
        spelling=spelling,
    )


def _computed_elsewhere(places: Mapping[str, NamedPlace]) -> dict[str, str]:
    """Names that TransformerLens' users know of values that are no places here, with where they are to be had."""
    known: dict[str, str] = {}
    for name in places:
        head, _, last = name.rpartition(".")
        if last == "hook_normalized":
            known[f"{head}.hook_scale"] = "a norm computes its scale inside; tdcache.residual.apply_norm goes by it"
        elif last == "hook_z":
            known[f"{head}.hook_result"] = (
                "what each head adds is computed from its z and the projection; tdcache.residual.head_results does it"
            )
    return known


def _in_words(reason: str, spelling: Mapping[str, str]) -> str:
    """A reason with the names in it spelled as the table spells them."""
    return regex.sub(r"[\w.]+", lambda word: spelling.get(word[0], word[0]), reason)


def _spelled(name: str, spell: Callable[[str, str, str], str]) -> str:
    parsed = block_name(name)
    if parsed is not None:
        return spell(parsed.prefix, f"blocks.{parsed.number}.", parsed.role)
    prefix = next((each for each in ("encoder.", "decoder.", "vision.", "audio.") if name.startswith(each)), "")
    return spell(prefix, "", name.removeprefix(prefix))
