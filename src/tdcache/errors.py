"""Every error and warning that tdcache raises, in one tree.

    TdcacheError
    ├── SelectionError(ValueError)         a selector matches nothing, or cannot be used
    │   ├── PathError                      an explicit path that no module has
    │   └── CanonicalNameError(KeyError)   a canonical name that a model does not have, or that is refused for it
    ├── DirectionError(ValueError)         an unknown direction, or one that cannot be used here
    ├── HookSignatureError(ValueError)     a hook or callback with the wrong parameters
    ├── ContextError(RuntimeError)         a context used in a state that does not allow it
    ├── CaptureError(RuntimeError)         a value that cannot be kept
    │   ├── InplaceModificationError       a kept alias was overwritten afterwards
    │   └── CacheWriteError                the cache cannot take the value
    ├── EditError(RuntimeError)            a replacement that does not fit
    ├── AttributionError(RuntimeError)     scores that cannot be computed as asked
    ├── ResidualError(RuntimeError)        a residual stream that cannot be taken apart as asked
    └── StoreError(RuntimeError)           stored tensors that cannot be written or read
        ├── DamagedError                   bytes that are not those that were written
        └── SpecError                      a store that was made of something else, or another way

    TdcacheWarning(UserWarning)
    ├── RepeatedCallWarning                one module ran twice in a forward and only one value is kept
    └── UnfiredSiteWarning                 a selected site saw no value

``StopForward`` is no error: it derives from ``BaseException`` so that a model's own ``except Exception`` does not
swallow it on its way to the context that asked for the stop.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

__all__ = [
    "AttributionError",
    "CacheWriteError",
    "CanonicalNameError",
    "CaptureError",
    "ContextError",
    "DamagedError",
    "DirectionError",
    "EditError",
    "HookSignatureError",
    "InplaceModificationError",
    "PathError",
    "RepeatedCallWarning",
    "ResidualError",
    "SelectionError",
    "SpecError",
    "StopForward",
    "StoreError",
    "TdcacheError",
    "TdcacheWarning",
    "UnfiredSiteWarning",
    "listed",
    "warn_user",
]


class TdcacheError(Exception):
    """Base of every error that tdcache raises on purpose. A traceback ends with the page that explains it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        known = next(
            kind for kind in type(self).__mro__ if kind.__module__ == __name__
        )  # a user's subclass has no page
        self.add_note(f"what it means, with wrong and right code: docs/errors/{known.__name__}.md")


class SelectionError(TdcacheError, ValueError):
    """A selector matches nothing or cannot be used.

    Attributes:
        selector: what the user passed.
        near: the names that come closest, best first.
    """

    def __init__(self, message: str, *, selector: object = None, near: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.selector = selector
        self.near = tuple(near)


class PathError(SelectionError):
    """An explicit path that names no module; ``near`` holds the closest names."""


class CanonicalNameError(SelectionError, KeyError):
    """A canonical name that a model does not have, or that would not mean there what it says.

    Attributes:
        reason: why the name is refused; empty where there is no such name.
    """

    __str__ = Exception.__str__  # KeyError shows the repr of its message

    def __init__(self, message: str, *, selector: object = None, near: Sequence[str] = (), reason: str = "") -> None:
        super().__init__(message, selector=selector, near=near)
        self.reason = reason


class DirectionError(TdcacheError, ValueError):
    """An unknown direction, or one that cannot be used where it was asked for."""


class HookSignatureError(TdcacheError, ValueError):
    """A hook or callback whose parameters do not fit its direction."""


class ContextError(TdcacheError, RuntimeError):
    """A context or hooked module used in a state that does not allow it."""


class CaptureError(TdcacheError, RuntimeError):
    """A value that cannot be kept.

    Attributes:
        paths: the sites concerned.
    """

    def __init__(self, message: str, *, paths: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.paths = tuple(paths)


class InplaceModificationError(CaptureError):
    """A kept alias was overwritten by a later in-place operation, so it no longer is the activation."""


class CacheWriteError(CaptureError):
    """The cache cannot take a value: locked, another shape or dtype, or a key that is already in use."""


class EditError(TdcacheError, RuntimeError):
    """A replacement value that does not fit the value it replaces."""


class StoreError(TdcacheError, RuntimeError):
    """Stored tensors that cannot be written or read.

    Attributes:
        path: the file or folder concerned.
    """

    def __init__(self, message: str, *, path: object = None) -> None:
        super().__init__(message)
        self.path = path


class DamagedError(StoreError):
    """A file whose bytes are not those that were written: truncated, flipped, forged or missing."""


class SpecError(StoreError):
    """A store that was made of something else, or another way, than was asked for.

    Attributes:
        fields: the names of the fields that differ.
    """

    def __init__(self, message: str, *, path: object = None, fields: Sequence[str] = ()) -> None:
        super().__init__(message, path=path)
        self.fields = tuple(fields)


class AttributionError(TdcacheError, RuntimeError):
    """Scores that cannot be computed: a target that is not one scalar per row, or a site that gets no gradient."""


class ResidualError(TdcacheError, RuntimeError):
    """A residual stream that cannot be taken apart as asked.

    Attributes:
        names: the canonical names concerned: what the cache lacks, or what is not the sum of its parts.
    """

    def __init__(self, message: str, *, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class StopForward(BaseException):
    """Raised by a stopping hook to end the forward; the run or context that asked for it swallows it.

    Attributes:
        key: the path at which the forward was stopped.
        source: who asked for it, where that is a context: it swallows this when it is left.
    """

    def __init__(self, key: str, *, source: object = None) -> None:
        super().__init__(f"the forward was stopped at {key!r}")
        self.key = key
        self.source = source


class TdcacheWarning(UserWarning):
    """Base of every warning that tdcache issues."""


class RepeatedCallWarning(TdcacheWarning):
    """A module ran more than once in one forward while only one of its values is kept."""


class UnfiredSiteWarning(TdcacheWarning):
    """A selected site saw no value in the forwards (or backwards) that ran."""


def warn_user(message: str, category: type[TdcacheWarning]) -> None:
    """Warn, pointing at the line of the user's code that led here, however deep in this package it happens."""
    level, frame = 2, sys._getframe(1)  # noqa: SLF001  (warnings' own skip_file_prefixes needs Python 3.12)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


_NOT_THE_USER = frozenset({"tdcache", "torch", "tensordict", "contextlib"})


def listed(names: Sequence[object], limit: int = 5) -> str:
    """Names for a message: quoted, comma-separated, cut after ``limit``.

    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
