"""What was checked before a table of canonical names was returned.

Without this record, a proved table could not be distinguished from a guessed one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdcache.tables import text_table

__all__ = ["Proof", "ProvedIdentity", "deviation"]


def deviation(one: Tensor, other: Tensor) -> float:
    """The largest difference of two values relative to the largest number in them; infinite where shapes disagree."""
    if one.shape != other.shape:
        if one.numel() != other.numel():
            return float("inf")
        other = other.reshape(one.shape)
    if not one.numel():
        return 0.0
    one, other = one.detach(), other.detach()
    size, off = max(_largest(one), _largest(other)), _largest(one - other)
    return off / size if size else off


def _largest(value: Tensor) -> float:
    low, high = value.aminmax()
    return max(float(high), -float(low)) if bool(low == low) else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvedIdentity:
    """One identity that was checked, at all places it applies to.

    Attributes:
        identity: the identity, ``"resid_pre + attn.contribution + mlp.contribution == resid_post"``.
        names: the canonical names that it proves.
        error: the largest deviation found, relative to the largest value.
        tolerance: what was allowed.
    """

    identity: str
    names: tuple[str, ...] = ()
    error: float = 0.0
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """All that was checked before a table was returned; ``print(proof)`` shows it.

    Attributes:
        inputs: the input that the values were taken from, in words.
        dtype: the dtype of the model during the check.
        identities: what held.
        skipped: the names of what was asked to be left out.
    """

    inputs: str = ""
    dtype: str = ""
    identities: tuple[ProvedIdentity, ...] = ()
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"checked on {self.inputs or 'no input'}" + (f" in {self.dtype}" if self.dtype else "")
        rows = [
            (each.identity, f"{each.error:.1e}", f"{each.tolerance:.0e}", f"{len(each.names)}")
            for each in self.identities
        ]
        table = text_table(("identity", "largest error", "allowed", "names"), rows) if rows else []
        skipped = [f"skipped: {', '.join(self.skipped)}"] if self.skipped else []
        return "\n".join([head, *table, *skipped])
