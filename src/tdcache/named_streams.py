"""What is known of a residual stream: the blocks that add to it, and what happens to it in each of them.

A stream is a sum only where nothing acts on it between the additions. Some models norm or scale it there, so a sum is
proved, and taken apart, by following the changes that are listed here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

__all__ = ["ResidualStream", "StreamChange", "changes_by_names"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChange:
    """One change of the stream within a block.

    Attributes:
        kind: ``"add"`` of a contribution or a parameter, ``"norm"`` of the stream itself, or ``"scale"`` by a constant.
        name: the canonical name of the contribution, or of what the norm returns; empty where a parameter is added, and
            for a scale.
        path: the path of the norm's module, or of the parameter that is added, or that the stream is multiplied by;
            empty otherwise.
        factor: the number that the stream is multiplied by, where it is no parameter.
        norm: the name of the norm through which a contribution's sublayer reads the stream; empty without one.
        post: the name of the norm between the sublayer and its contribution; empty without one.
        reads: after how many changes of the block the stream is what that sublayer reads.
        after: the name that the stream has after this change; empty where it has none.
    """

    kind: Literal["add", "norm", "scale"]
    name: str = ""
    path: str = ""
    factor: float = 1.0
    norm: str = ""
    post: str = ""
    reads: int = 0
    after: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualStream:
    """What is known of one residual stream: a stack of blocks, what goes into it and what reads it.

    Attributes:
        prefix: what the names of the stack begin with: ``""``, ``"encoder."``, ``"vision."``.
        layouts: of each block, ``"pre-norm"``, ``"post-norm"``, ``"parallel"``, ``"sandwich"``, or ``"mixed"`` where
            the stream is normed or scaled in another order, which ``changes`` tells.
        changes: of each block, what happens to the stream from ``resid_pre`` to ``resid_post``; empty where the layout
            and the names say it all.
        embeddings: the names whose values sum to the first ``resid_pre``.
        embedding_norm: the path of the norm that this sum goes through first; None if there is none.
        final_norm: the path of the norm after the last block; None if there is none.
        unembed: the path of the module that makes logits; None if there is none.
        out_projections: of each block, the path of what maps ``z`` back to the stream; None where there is none.
        down_projections: of each block, the path of what maps ``mlp.post`` back to the stream; None as before.
        logit_scale: what the unembedding's result is multiplied by to give the logits.
        logit_softcap: the ``c`` of ``c * tanh(logits / c)``; None if logits are not capped.
    """

    prefix: str = ""
    layouts: tuple[str, ...] = ()
    changes: tuple[tuple[StreamChange, ...], ...] = ()
    embeddings: tuple[str, ...] = ()
    embedding_norm: str | None = None
    final_norm: str | None = None
    unembed: str | None = None
    out_projections: tuple[str | None, ...] = ()
    down_projections: tuple[str | None, ...] = ()
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.layouts)

    def changes_in(self, block: int, names: Collection[str]) -> tuple[StreamChange, ...]:
        """The changes of one block: those that are listed, else what its layout and the names of a table say.

        Args:
            block: its number.
            names: the canonical names of the table.
        """
        if block < len(self.changes):
            return self.changes[block]
        layout = self.layouts[block] if block < self.blocks else ""
        return changes_by_names(f"{self.prefix}blocks.{block}.", layout, names)


_ORDER = ("attn", "mixer", "cross_attn", "mlp")
_NORM = "{}ln{}"


def changes_by_names(head: str, layout: str, names: Collection[str]) -> tuple[StreamChange, ...]:
    """The changes of a block of which only names are known: its contributions are added in the usual order.

    Args:
        head: what the names of the block begin with, ``"blocks.3."``.
        layout: of the block; ``"post-norm"`` norms the stream after each addition, anything else does not norm it.
        names: the canonical names that there are.
    """
    end = ".contribution"
    labels = [name[len(head) : -len(end)] for name in names if name.startswith(head) and name.endswith(end)]
    labels.sort(key=lambda label: (_rank(label), label))
    middles = {"attn": "resid_mid", "mixer": "resid_mid", "cross_attn": "resid_mid_cross"}
    found: list[StreamChange] = []
    for number, label in enumerate(labels, 1):
        last = number == len(labels)
        middle = middles.get(_kind(label), "") if not last and _rank(labels[number]) > 1 else ""
        after = f"{head}resid_post" if last else f"{head}{middle}" if middle and layout != "parallel" else ""
        norm, post = _NORM.format(head, number), f"{_NORM.format(head, number)}_post"
        normed = layout == "post-norm"
        add = StreamChange(
            kind="add",
            name=f"{head}{label}{end}",
            norm=norm if norm in names and not normed else "",
            post=post if post in names else "",
            reads=0 if layout == "parallel" or _rank(label) < 2 else len(found),
            after="" if normed else after,
        )
        found += [add, StreamChange(kind="norm", name=norm, after=after)] if normed else [add]
    return tuple(found)


def _kind(label: str) -> str:
    return label.rstrip("0123456789")


def _rank(label: str) -> int:
    kind = _kind(label)
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
