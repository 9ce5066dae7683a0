"""A public name that is asked for in the wrong package, or misspelt: the error says where it is.

Most of the names live in subpackages that are imported only when needed, so Python's own hint, which knows what is
loaded, would not find ``tdcache.IntegratedGradients`` or ``tdcache.attribution.SteeringVectors``.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

__all__ = ["MissingName", "PACKAGES"]

PACKAGES = (
    *("attribution", "function_calls", "harvesting", "interventions", "naming", "pipeline", "plot", "points"),
    *("reducers", "residual", "store"),
)
"""The subpackages that ``import tdcache`` gives lazily."""


@dataclass(frozen=True, slots=True)
class MissingName:
    """The ``__getattr__`` of a package: an error for every name, with a hint.

    Args:
        package: its full name.
    """

    package: str

    def __call__(self, name: str) -> Any:
        """Raise.

        Raises:
            AttributeError: always; it names the package that has ``name``, or the nearest name there is.
        """
        hint = "" if name.startswith("_") else _hint(name)
        raise AttributeError(f"module {self.package!r} has no attribute {name!r}{hint}")


def _hint(name: str) -> str:
    packages = ("tdcache", *(f"tdcache.{package}" for package in PACKAGES))
    home: dict[str, str] = {}
    for package in packages:
        for public in import_module(package).__all__:
            home.setdefault(public, package)
    if name in home:
        return f"; it is in {home[name]}"
    near = get_close_matches(name, home, n=1)
    return f"; did you mean {near[0]!r}, in {home[near[0]]}?" if near else ""
