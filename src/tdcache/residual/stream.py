"""A cache with canonical names, seen as one residual stream: what is kept of it, and what the model adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import regex
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import CanonicalNameError, ResidualError, SelectionError, listed
from tdcache.named_places import NamedPlace, Names
from tdcache.named_streams import ResidualStream, StreamChange
from tdcache.norms import wide
from tdcache.paths import resolve
from tdcache.residual.columns import Columns

__all__ = ["CachedStream", "names_of"]


def names_of(cache: object, names: Names | None) -> Names:
    """The table of names that belongs to a cache, unless another is given.

    Raises:
        ResidualError: there is none.
    """
    found = getattr(cache, "table", None) if names is None else names
    if not isinstance(found, Names):
        raise ResidualError(
            f"this {type(cache).__name__} does not say which model its names belong to; pass "
            "names=tdcache.names(model), or take the cache of a context that was opened with names="
        )
    return found


_ADDED = ".contribution"


@dataclass(frozen=True, slots=True, eq=False)
class CachedStream:
    """The entries of a cache that belong to one residual stream.

    Args:
        cache: canonical names to values.
        names: the table that the names are from.
        stream: what is known of the stream.
        columns: which positions of the values are wanted.
    """

    cache: TensorDictBase
    names: Names
    stream: ResidualStream
    columns: Columns

    @classmethod
    def of(
        cls, cache: TensorDictBase, names: Names | None, prefix: str | None, columns: Columns | None = None
    ) -> CachedStream:
        """The stream with that prefix; None for the only one, or the one that logits are made of.

        Raises:
            CanonicalNameError: there is no such stream, or there are several of which none makes logits.
        """
        table = names_of(cache, names)
        if prefix is None:
            streams = list(table.streams.values())
            meant = streams if len(streams) == 1 else [each for each in streams if each.unembed is not None]
            prefix = meant[-1].prefix if meant else ""
        return cls(cache, table, table.stream(prefix), columns or Columns())

    def with_all_positions(self) -> CachedStream:
        """The same stream, at every position that is kept."""
        return replace(self, columns=Columns())

    def name(self, role: str, block: int | None = None) -> str:
        """The canonical name of a role, of one block or of the model."""
        return f"{self.stream.prefix}{role}" if block is None else f"{self.stream.prefix}blocks.{block}.{role}"

    def keeps(self, name: str) -> bool:
        """Whether the cache has an entry of that name."""
        return self.names.spelled(name) in self.cache.keys()  # noqa: SIM118  # `in` takes a name for a nested key

    def raw(self, name: str) -> Any:
        """What is kept under that name, as it is."""
        return self.cache.get(self.names.spelled(name))

    def whole(self, name: str) -> Tensor:
        """The kept value of all positions, in at least single precision.

        Raises:
            CanonicalNameError: the model has no such name, or it is refused there.
            ResidualError: it was not kept.
        """
        if not self.keeps(name):
            self.require([name])
        value = self.raw(name)
        if not isinstance(value, Tensor):
            raise ResidualError(f"{name!r} is a {type(value).__name__}, not one tensor", names=[name])
        return wide(self._with_rows(value, self.place(name).axes))

    def _with_rows(self, value: Tensor, axes: tuple[str, ...]) -> Tensor:
        """``value``, with rows and positions apart that the model holds as one axis, ``("position", "unit")``."""
        if axes[:1] != ("position",) or value.ndim != len(axes):
            return value
        both = ("batch", "position")
        whole = [
            each
            for name in self.canonical(refused=False)
            if self.keeps(name)
            and (place := self.place(name)).axes[:2] == both
            and (each := self.raw(name)).ndim == len(place.axes)
        ]
        rows = next((each.shape[:2] for each in whole), None)
        return value if rows is None or rows.numel() != len(value) else value.unflatten(0, rows)

    def value(self, name: str) -> Tensor:
        """The kept value ``(..., position, unit)`` at the wanted positions."""
        return self.columns.of(self.whole(name), name)

    def split(self, name: str) -> Tensor:
        """A kept value that has heads, as ``(..., position, head, unit)`` at the wanted positions.

        Raises:
            ResidualError: its axes are not known.
        """
        value, axes = self.whole(name), self.place(name).axes
        if self.whole(f"{name.rpartition('.')[0]}.contribution").ndim == 2:  # one position of each row was kept
            axes = tuple(axis for axis in axes if axis not in ("position", "query"))
        if value.ndim != len(axes) or not {"head", "unit"} <= set(axes):
            raise ResidualError(
                f"{name!r} is {tuple(value.shape)}, with axes {axes or 'that the table does not name'}; axes with "
                "'head' and 'unit' are needed",
                names=[name],
            )
        rest = [axis for axis, what in enumerate(axes) if what not in ("head", "unit")]
        return self.columns.of(value.permute(*rest, axes.index("head"), axes.index("unit")), name, axis=-3)

    def place(self, name: str) -> NamedPlace:
        """What the name stands for."""
        return self.names[self.names.spelled(name)]

    def path_of(self, name: str) -> str:
        """The path of the module that a name stands for; of what is no name, the path that it is."""
        spelled = self.names.spelled(name)
        return self.names[spelled].path if spelled in self.names else name

    def require(self, names: Sequence[str]) -> None:
        """Refuse a cache that lacks any of the names.

        Raises:
            CanonicalNameError: one of them means nothing in this model.
            ResidualError: they were not kept.
        """
        missing = [self.names.spelled(name) for name in names if not self.keeps(name)]
        for name in missing:
            self.names[name]
        if missing:
            raise ResidualError(
                f"the cache lacks {listed(missing, 4)}; keep what is needed: "
                "ActivationCaching(residual.needed(table), names=table)",
                names=missing,
            )

    def contributions(self, block: int) -> list[str]:
        """What is added to the stream in one block, in the order of the table: ``["attn", "mlp"]``."""
        return [name[len(self.name("", block)) : -len(_ADDED)] for name in self._added(block, refused=False)]

    def changes(self, block: int) -> tuple[StreamChange, ...]:
        """What happens to the stream in one block."""
        known = block < len(self.stream.changes)
        return self.stream.changes_in(block, () if known else self.canonical(refused=False))

    def refused(self, block: int) -> list[str]:
        """The contributions to one block that are refused: there is none, or one that cannot be read."""
        return self._added(block, refused=True)

    def _added(self, block: int, *, refused: bool) -> list[str]:
        start = self.name("", block)
        return [name for name in self.canonical(refused=refused) if name.endswith(_ADDED) and name.startswith(start)]

    def canonical(self, *, refused: bool) -> list[str]:
        """The names that the table has, or those that it refuses, in their canonical spelling."""
        names: Mapping[str, Any] = self.names.refused if refused else self.names
        return [name for name, spelled in self.names.spelling.items() if spelled in names] or list(names)

    def error(self, name: str) -> CanonicalNameError:
        """What is raised for a name that the table does not have."""
        return self.names.error(self.names.spelled(name))

    def kept_posts(self) -> list[str]:
        """The names of the ``resid_post`` that the cache keeps, in the order of the blocks."""
        return [name for block in range(self.stream.blocks) if self.keeps(name := self.name("resid_post", block))]

    def last(self) -> str:
        """The name of the last ``resid_post`` that the cache keeps.

        Raises:
            ResidualError: it keeps none.
        """
        kept = self.kept_posts()
        if not kept:
            raise ResidualError(
                f"the cache keeps no {self.name('resid_post', 0)!r}, nor that of another block, so there is nothing to "
                "take apart; keep one, or say which value is meant with of="
            )
        return kept[-1]

    def until(self, of: str | None) -> tuple[str, int, str]:
        """A value of the stream by name, with the number of its block and its role there.

        Raises:
            SelectionError: it is no value of the stream.
        """
        of = self.last() if of is None else self._canonical_of(of)
        found = regex.fullmatch(rf"{regex.escape(self.stream.prefix)}blocks\.(\d+)\.(resid_(?:pre|mid|post))", of)
        if found is None or int(found[1]) >= self.stream.blocks:
            raise SelectionError(
                f"of={of!r} is no value of a stream of {self.stream.blocks} blocks; it is such as "
                f"{self.name('resid_post', self.stream.blocks - 1)!r}",
                selector=of,
            )
        self.place(of)
        return of, int(found[1]), found[2]

    def _canonical_of(self, name: str) -> str:
        return next((each for each, spelled in self.names.spelling.items() if spelled == name), name)

    def blocks(self, layers: int | Sequence[int] | None, kind: str = "") -> list[int]:
        """Numbers of blocks, counted from either end; None for those up to the last ``resid_post`` that is kept.

        Args:
            layers: which ones.
            kind: with None, those that have this contribution alone: in some models attention is not in every block.

        Raises:
            SelectionError: there is no such block.
        """
        count = self.stream.blocks
        if layers is None:
            found = range(self.until(None)[1] + 1)
            return [block for block in found if not kind or kind in self.contributions(block)]
        asked = [layers] if isinstance(layers, int) else list(layers)
        if wrong := [each for each in asked if not -count <= each < count]:
            raise SelectionError(f"layers={wrong[0]!r} is none of {count} blocks", selector=layers)
        return [each % count for each in asked]

    def parameter(self, path: str) -> Tensor:
        """The parameter at a path."""
        (module,) = self.modules("")
        return module.get_parameter(path)

    def modules(self, *paths: str | None) -> Iterator[nn.Module]:
        """The modules behind paths; nothing for None.

        Raises:
            ResidualError: the model is gone.
        """
        model = self.names.model
        if model is None:
            raise ResidualError(
                "the names no longer know their model, which they hold weakly; keep it alive, or pass "
                "names=tdcache.names(model)"
            )
        yield from (resolve(model, path) for path in paths if path is not None)
