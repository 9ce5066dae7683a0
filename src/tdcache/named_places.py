"""Names that mean the same value in every model: what one stands for, and the table of one model's names.

Nothing is found out here, and no name is proved here: a table is data, which :func:`tdcache.names` makes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import regex
from torch import Tensor, nn

from tdcache.errors import CanonicalNameError, EditError, SelectionError, listed
from tdcache.named_models import root_among, structure_of
from tdcache.named_proof import Proof
from tdcache.named_roles import name_in_block, names_in_blocks
from tdcache.named_rows import place_rows, refusal_rows
from tdcache.named_streams import ResidualStream
from tdcache.paths import near_misses
from tdcache.tables import html_note, html_table, text_table
from tdcache.types import Pick

__all__ = [
    "NamedPlace",
    "Names",
    "Side",
]

Side = Literal["fwd", "fwd_pre"]
"""Which side of a place a name means: what is returned, or what is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPlace:
    """What one canonical name stands for in one model.

    Attributes:
        name: the canonical name, ``"blocks.3.attn.pattern"``; filled in by :class:`Names` where it is left out.
        path: a module's path, or a call in its forward (``"path::function.1"``, ``"path::pattern"``).
        side: ``"fwd"`` for what is returned there, ``"fwd_pre"`` for what it is called with.
        pick: which tensor of it, as in :class:`tdcache.ActivationCaching`; None for the first.
        call: which call of the module in one forward, from 0, where it runs several times; None where it runs once.
        axes: what the axes of the kept value are: ``"batch"``, ``"head"``, ``"kv_head"``, ``"position"``, ``"query"``,
            ``"key"``, ``"unit"``, ``"expert"``.
        heads: ``(n, axis)`` where that axis of the tensor holds ``n`` heads: it is split into heads and units, or into
            rows and heads where ``axes`` says so. None where nothing is split.
        order: the axes of the tensor, after that split, in the order of ``axes``; None where they are in order.
        note: one sentence where the name needs one, for instance on norms in the stream.
    """

    name: str = ""
    path: str
    side: Side = "fwd"
    pick: Pick = None
    call: int | None = None
    axes: tuple[str, ...] = ()
    heads: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.side not in ("fwd", "fwd_pre"):
            raise SelectionError(
                f"the side of {self.name or self.path!r} is 'fwd' (what is returned) or 'fwd_pre' (what is given), "
                f"got {self.side!r}",
                selector=self.name,
            )

    @property
    def where(self) -> str:
        """The place in words: ``"input of transformer.h.3.mlp"``."""
        side = "input of " if self.side == "fwd_pre" else ""
        pick = "" if self.pick is None else f"[{self.pick!r}]"
        call = "" if self.call is None else f", call {self.call}"
        return f"{side}{self.path or '(root)'}{pick}{call}"

    def shown(self, value: Tensor) -> Tensor:
        """A value of the model as the place has it: a view with heads split off and axes in order.

        Raises:
            EditError: the axis that holds the heads does not fall into that many.
        """
        if self.heads is not None:
            count, axis = self.heads
            if value.shape[axis] % count:
                raise EditError(
                    f"{self.name!r} has {count} heads along axis {axis}, and its value has shape {tuple(value.shape)}"
                )
            value = value.unflatten(axis, (-1, count) if self._heads_in_rows(axis, value.ndim) else (count, -1))
        return value if self.order is None else value.permute(self.order)

    def _heads_in_rows(self, axis: int, ndim: int) -> bool:
        """Whether the axis that is split holds the heads of every row, and not the units of every head."""
        axes = self.axes if self.order is None else [self.axes[self.order.index(at)] for at in range(len(self.axes))]
        return len(axes) > ndim and axes[axis % ndim + 1] in ("head", "kv_head")

    def given_back(self, value: Tensor) -> Tensor:
        """What :meth:`shown` made of a value, back in the layout that the model has."""
        if self.order is not None:
            value = value.permute([self.order.index(axis) for axis in range(len(self.order))])
        if self.heads is not None:
            axis = self.heads[1] % (value.ndim - 1)
            value = value.flatten(axis, axis + 1)
        return value


class Names(Mapping[str, NamedPlace]):
    """The canonical names of one model: an immutable mapping from name to :class:`NamedPlace`.

    ``table["blocks.3.attn.pattern"]`` says where that value is. A name that this model does not have, or that would
    not mean there what it says, is refused with the reason and the nearest names. ``print(table)`` shows the table;
    rows that differ in nothing but the number of the block are printed as one.

    The model is held weakly, and not at all after pickling.

    Args:
        places: name to place, or to the path of a module or call.
        refused: names that would not mean in this model what they say: the reason, and what comes nearest.
        streams: by prefix, what is known of each residual stream.
        proof: what was checked; None where nothing was.
        style: whose spelling the names have; None for the canonical one.
        model: the model whose places these are.
        made_for: in its place, the name of its class and its structure, as another table has them.
        spelling: of a style, from canonical names to those of the table.

    Example:
        >>> table = Names({"embed": "wte", "blocks.0.mlp.out": NamedPlace(path="h.0.mlp")})
        >>> table["blocks.0.mlp.out"].path
        'h.0.mlp'
    """

    __slots__ = (
        "__weakref__",
        "_model",
        "_places",
        "_structure",
        "model_name",
        "proof",
        "refused",
        "spelling",
        "streams",
        "style",
    )

    def __init__(
        self,
        places: Mapping[str, str | NamedPlace],
        *,
        refused: Mapping[str, str] | None = None,
        streams: Mapping[str, ResidualStream] | None = None,
        proof: Proof | None = None,
        style: str | None = None,
        model: nn.Module | None = None,
        made_for: tuple[str, str] = ("", ""),
        spelling: Mapping[str, str] | None = None,
    ) -> None:
        self._places = {name: _as_place(name, place) for name, place in places.items()}
        self.refused: Mapping[str, str] = MappingProxyType(dict(refused or {}))
        """Why a name is refused in this model."""
        self.streams: Mapping[str, ResidualStream] = MappingProxyType(dict(streams or {}))
        """By prefix (``""`` where there is one stack), what is known of each residual stream."""
        self.proof = proof
        self.style = style
        self.spelling: Mapping[str, str] = MappingProxyType(dict(spelling or {}))
        self._model = None if model is None else weakref.ref(model)
        self.model_name, self._structure = made_for if model is None else (type(model).__name__, structure_of(model))

    def __getitem__(self, name: str) -> NamedPlace:
        """The place of a name.

        Raises:
            CanonicalNameError: the model has no such name, or it is refused; the message says why.
        """
        place = self._places.get(name)
        if place is None:
            raise self.error(name)
        return place

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def get(self, name: str, default: Any = None) -> Any:
        """The place of a name, or ``default``."""
        return self._places.get(name, default)

    def __hash__(self) -> int:
        return hash((self.style, frozenset(self._places)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names):
            return NotImplemented
        return self.style == other.style and self._places == other._places

    def __reduce__(self) -> Any:
        return _unpickled, (self._arguments(),)

    def _arguments(self) -> dict[str, Any]:
        """The arguments that make this table anew, without the model."""
        return {
            "places": self._places,
            "refused": dict(self.refused),
            "streams": dict(self.streams),
            "proof": self.proof,
            "style": self.style,
            "made_for": self.made_for,
            "spelling": dict(self.spelling),
        }

    @property
    def made_for(self) -> tuple[str, str]:
        """The class of the model, and what its structure comes to: models that agree in both have the same places."""
        return self.model_name, self._structure

    @property
    def model(self) -> nn.Module | None:
        """The model whose places these are; None where it is gone, or was never given."""
        return None if self._model is None else self._model()

    def bound_to(self, model: nn.Module) -> Names:
        """The same table, of the model that is hooked with it: ``self`` where it is the one that the names are from."""
        root = self.root_in(model)
        return self if root is self.model else self.replaced(model=root)

    def replaced(self, **changes: Any) -> Names:
        """The same table except for the arguments in ``changes``, as :func:`dataclasses.replace` does."""
        return Names(**{**self._arguments(), "model": self.model, **changes})

    def root_in(self, model: nn.Module) -> nn.Module:
        """The module that the paths of the table are relative to, where ``model`` is to be hooked.

        That is ``model``, or what it wraps (``torch.compile``, ``DistributedDataParallel``, an adapter), or what wraps
        it; or another model of the same structure.

        Raises:
            CanonicalNameError: the table was made for another model.
        """
        paths = [place.path.partition("::")[0] for place in self._places.values()]
        root = root_among(model, self.model, self.made_for, paths)
        if root is None:
            what, other = self.model_name or "other modules", type(model).__name__
            how = "another one: modules, shapes or numbers of heads differ" if what == other else other
            raise CanonicalNameError(
                f"these names were made for {what}, and this is {how}; make its own with tdcache.names(model)",
                selector=self,
            )
        return root

    def stream(self, prefix: str = "") -> ResidualStream:
        """What is known of the residual stream whose names begin with ``prefix``.

        Raises:
            CanonicalNameError: no stream of that prefix; the message names those that there are.
        """
        if prefix not in self.streams:
            known = listed(tuple(self.streams)) if self.streams else "none: its blocks are not known"
            raise CanonicalNameError(
                f"{self.model_name or 'this model'} has no residual stream with prefix {prefix!r}; its prefixes are "
                f"{known}",
                selector=prefix,
                near=tuple(self.streams),
            )
        return self.streams[prefix]

    def reading_stream(self) -> ResidualStream:
        """The residual stream that logits are made of.

        Raises:
            CanonicalNameError: there is none, for no unembedding is known.
        """
        found = [stream for stream in self.streams.values() if stream.unembed is not None]
        if not found:
            raise self.error(self.spelled("unembed"))
        return found[-1]

    def spelled(self, name: str) -> str:
        """A canonical name as this table spells it: itself, unless the table has a style."""
        return self.spelling.get(name, name)

    def in_blocks(self, *roles: str, prefix: str | None = None) -> list[str]:
        """The names of canonical roles in all blocks of one stack, block by block: ``in_blocks("resid_post")``.

        Args:
            *roles: what comes after ``blocks.3.``; those that a block does not have are left out.
            prefix: of the stack, where there are several.

        Raises:
            CanonicalNameError: several stacks and no prefix, or no block has such a name.
        """
        return names_in_blocks(self, roles, prefix)

    def in_block(self, role: str, layer: int) -> str:
        """The name of a role in one block: ``("attn.pattern", 3)`` gives ``"blocks.3.attn.pattern"``.

        Negative layers count from the last block. Where no name is exactly that, the one that ends with the role is
        meant, if there is one alone: ``("pattern", 3)`` may be ``"blocks.3.attn.hook_pattern"``.

        Raises:
            CanonicalNameError: there is no such block or name, or several.
        """
        return name_in_block(self, role, layer)

    def error(self, name: object) -> CanonicalNameError:
        """What is raised for a name that is not in the table: the reason where it is refused, else the nearest."""
        model = self.model_name or "this model"
        if name in self.refused:
            reason = self.refused[str(name)]
            return CanonicalNameError(f"{name!r} is refused for {model}: {reason}", selector=name, reason=reason)
        near = near_misses(regex.escape(name), list(self)) if isinstance(name, str) else ()
        hint = f"; did you mean {listed(near, 3)}?" if near else "; print(table) shows the names that there are"
        return CanonicalNameError(
            f"{name!r} is none of the {len(self)} names of {model}{hint}", selector=name, near=near
        )

    def __repr__(self) -> str:
        return "\n".join([self._title(), *text_table(_HEAD, place_rows(self._places)), *self._refusals()])

    def _repr_html_(self) -> str:
        refused = "".join(map(html_note, self._refusals()))
        return html_table(self._title(), _HEAD, place_rows(self._places)) + refused

    def _title(self) -> str:
        style = "" if self.style is None else f", spelled as in {self.style}"
        proof = "not proved" if self.proof is None else f"{len(self.proof.identities)} identities proved"
        return f"{len(self)} names of {self.model_name or 'a model'}{style} ({proof})"

    def _refusals(self) -> list[str]:
        return ["refused:", *refusal_rows(self.refused)] if self.refused else []


_HEAD = ("name", "place", "axes", "note")


def _as_place(name: str, place: object) -> NamedPlace:
    if isinstance(place, str):
        return NamedPlace(name=name, path=place)
    if isinstance(place, NamedPlace):
        return place if place.name == name else replace(place, name=name)
    raise SelectionError(
        f"{name!r} stands for {place!r} ({type(place).__name__}); a name stands for a path such as 'layers.0.mlp', or "
        "for a NamedPlace",
        selector=name,
    )


def _unpickled(arguments: dict[str, Any]) -> Names:
    return Names(**arguments)
