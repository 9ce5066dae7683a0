"""Lazy values: stand for tensors that a run will produce, and record what is computed with them before that.

Inside the block of a run the model has not run yet, so ``run.get(...)`` can only return a proxy. Operators, tensor
methods and ``torch`` functions on it are recorded as a :class:`Computed`, which a ``set`` evaluates when it needs the
value. What cannot be deferred, such as a condition, is refused with an error that names the alternatives.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor

from tdcache.errors import ContextError

__all__ = ["Computed", "Lazy", "NoValueYet", "resolved"]

_VIEWS = ("T", "mT", "H", "mH", "real", "imag")
_FIELDS = ("values", "indices")  # of what max, sort, topk and their like return


class NoValueYet(Exception):  # noqa: N818  (it never reaches a user)
    """A proxy inside an expression has no value yet."""


class Lazy:
    """Base of values that are not known yet; a run returns a :class:`tdcache.modules.taps.ValueProxy`."""

    def resolve(self) -> Any:
        """The value, or None if it does not exist yet."""
        raise NotImplementedError

    @property
    def value(self) -> Any:
        """The value, once the run has ended.

        Raises:
            ContextError: the run has not ended.
        """
        value = self.resolve()
        if value is None:
            raise ContextError(
                f"{self!r} has no value yet; it is there when the block of its run has ended. Inside the block compute "
                "with the proxy itself, e.g. run.set(path, proxy * 2)"
            )
        return value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Computed:
        name = getattr(func, "__name__", repr(func))
        if func in _COMPARED:
            _refuse(f"a comparison ({name})")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            _refuse(f"an operation that writes in place ({name})")
        return Computed(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name in _VIEWS:
            return Computed(getattr, (self, name), {})
        method = None if name.startswith("_") else getattr(Tensor, name, None)
        if method is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if not callable(method) or name.endswith("_") or name in _NOT_LAZY:
            raise AttributeError(
                f"{name!r} is not known before the run has ended; ask the value after the block: proxy.value.{name}"
            )
        return _TensorMethod(self, name)

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:  # noqa: PLE0304  (it always raises)
        _refuse("a condition (if, and, or, not)")

    def __len__(self) -> int:  # noqa: PLE0303  (it always raises)
        _refuse("len()")

    def __iter__(self) -> Iterator[Any]:
        _refuse("a loop or unpacking")

    def __float__(self) -> float:
        _refuse("float()")

    def __int__(self) -> int:
        _refuse("int()")

    def __contains__(self, other: object) -> bool:
        _refuse("'in'")

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse("an assignment to a part (instead: run.set(path, value, positions=..., units=...))")


class Computed(Lazy):
    """A deferred call. It is evaluated at each :meth:`resolve`, since another run may produce new values.

    Args:
        function: the function to call.
        args: its arguments; proxies may occur anywhere inside tuples, lists, mappings and slices.
        kwargs: its keyword arguments.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._function = function
        self._args = args
        self._kwargs = dict(kwargs)

    def __repr__(self) -> str:
        given = [_brief(each) for each in self._args] + [f"{key}={_brief(each)}" for key, each in self._kwargs.items()]
        return f"{getattr(self._function, '__name__', self._function)}({', '.join(given)})"

    def __getattr__(self, name: str) -> Any:
        return Computed(getattr, (self, name), {}) if name in _FIELDS else super().__getattr__(name)

    def resolve(self) -> Any:
        """The result, or None if an argument has no value yet.

        Raises:
            InplaceModificationError: an in-place operation has overwritten one of the values.
            Exception: any exception of the function, with a note that names the expression.
        """
        try:
            args, kwargs = resolved(self._args), resolved(self._kwargs)
        except NoValueYet:
            return None
        try:
            return self._function(*args, **kwargs)
        except Exception as error:
            error.add_note(f"while {self!r} was computed from the values of a run")
            raise


class _TensorMethod:
    """A tensor method of a value that does not exist yet."""

    def __init__(self, owner: Lazy, name: str) -> None:
        self.owner = owner
        self.__name__ = name

    def __repr__(self) -> str:
        return f"{self.owner!r}.{self.__name__}"

    def __call__(self, *args: Any, **kwargs: Any) -> Computed:
        return Computed(getattr(Tensor, self.__name__), (self.owner, *args), kwargs)


def resolved(value: Any) -> Any:
    """``value`` with every proxy replaced by its value, including those inside tuples, lists, mappings and slices.

    Raises:
        NoValueYet: one of them has no value yet.
    """
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "resolve"):
        found = value.resolve()
        if found is None:
            raise NoValueYet(value)
        return found
    if type(value) in (tuple, list):
        return type(value)(map(resolved, value))
    if type(value) is dict:
        return {key: resolved(each) for key, each in value.items()}
    if type(value) is slice:
        return slice(*map(resolved, (value.start, value.stop, value.step)))
    return value


def _brief(value: Any) -> str:
    return f"Tensor{tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _refuse(what: str) -> NoReturn:
    raise ContextError(
        f"{what} asks for a value that is not there before the run has ended; torch.where(torch.gt(proxy, 0), ...) "
        "chooses element by element when it is, callback= sees it in the run, and proxy.value has it after the block"
    )


def _forward(function: Callable[..., Any]) -> Callable[..., Computed]:
    return lambda self, *others: Computed(function, (self, *others), {})


def _reflected(function: Callable[..., Any]) -> Callable[..., Computed]:
    return lambda self, other: Computed(function, (other, self), {})


def _refused(symbol: str) -> Callable[..., NoReturn]:
    return lambda self, other: _refuse(f"a comparison ({symbol})")


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARED = frozenset(getattr(Tensor, name) for name in _COMPARISONS)  # how torch dispatches tensor == proxy
_NOT_LAZY = frozenset({"item", "tolist", "numpy", "size", "dim", "backward", "values", "register_hook"})

for _name in _BINARY:
    _operation = getattr(operator, f"__{_name}__")
    setattr(Lazy, f"__{_name}__", _forward(_operation))
    setattr(Lazy, f"__r{_name}__", _reflected(_operation))
for _name in ("neg", "pos", "abs", "invert", "getitem"):
    setattr(Lazy, f"__{_name}__", _forward(getattr(operator, f"__{_name}__")))
for _name, _symbol in _COMPARISONS.items():
    setattr(Lazy, f"__{_name}__", _refused(_symbol))
