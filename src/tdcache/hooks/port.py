"""Ports: the input or the output of a place, and the only way to read, write and watch the picked tensor there.

A module returns or receives a tensor, or tensors somewhere in tuples, mappings, Hugging Face outputs or TensorDicts.
Which of them is picked, how it is replaced, and how its gradient is watched is decided here and nowhere else, so that
capturing, editing and attribution agree on it; a tap only decides what happens to the tensor.

The methods of a port take the arguments of a hook there, ``(module, args, output)`` or ``(module, args, kwargs)``, so
that a tap needs one method for both. A place need not be a module: anything that calls hooks in these two forms has
ports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType
from typing import Any, ClassVar

from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import CaptureError, EditError
from tdcache.hooks.gradients import OnGrad, alias_input, watch_output
from tdcache.hooks.loans import Loan, lend
from tdcache.hooks.on_demand import OnDemandPlace
from tdcache.hooks.values import (
    check_fits,
    children,
    exchanged,
    is_entries,
    leaves,
    pick_tensor,
    replace_tensor,
    tensor_only,
)
from tdcache.types import CacheKey, HookDirection, Pick

__all__ = ["InputPort", "OutputPort", "Port", "Steps", "own_entries", "port_at"]

Steps = tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class OutputPort:
    """The output of a module.

    Without ``pick`` the first tensor is picked; from the TensorDict that a TensorDict module returns, the first entry
    that the module itself wrote. An index counts these, not what the TensorDict held before.
    """

    path: str
    pick: Pick = None
    direction: ClassVar[HookDirection] = "fwd"

    def read(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The picked tensor (or TensorDict) of an output.

        Raises:
            CaptureError: there is no such tensor; the message names the path, the type and the parts.
        """
        if self.pick is None and type(output) is Tensor:
            return output
        return tensor_only(pick_tensor(output, self._pick_in(module, output), self.path), self.pick, self.path)

    def parts(self, module: nn.Module, args: Any, output: Any) -> Iterator[tuple[Steps, Tensor]]:
        """Every tensor with the steps that lead to it (``pick="all"``)."""
        return leaves(output)

    def write(self, module: nn.Module, args: Any, output: Any, new: Any) -> Any:
        """The return value with which a hook replaces the picked tensor by ``new``.

        A TensorDict is written in place, as the module itself does; other values are not changed.

        Raises:
            EditError: ``new`` differs in shape, dtype or device, or a callable pick cannot say where to put it.
        """
        if self.pick is None and isinstance(output, Tensor):
            check_fits(new, output, self.path)
            return new
        pick = self._pick_in(module, output)
        if isinstance(pick, str | tuple) and is_entries(output):
            check_fits(new, pick_tensor(output, pick, self.path), self.path)
            return output.set(pick, new)  # type: ignore[arg-type]  # an index is no key: the pick before refused it
        return replace_tensor(output, new, pick=pick, path=self.path)

    def watch(self, module: nn.Module, args: Any, output: Any, tensor: Tensor, on_grad: OnGrad) -> Any:
        """Call ``on_grad`` with the gradient of ``tensor``, which was read here and requires grad.

        Returns:
            The return value for the hook: None, or the output with the tensor replaced by an alias.
        """
        handed = watch_output(module, args, tensor, on_grad, self.path)
        if output is tensor:
            return None if handed is tensor else handed
        if is_entries(output) and not callable(self.pick):
            return self._entry_exchanged(output, tensor, handed)
        if handed is tensor:
            return None
        return exchanged(output, iter([handed if each is tensor else None for _, each in leaves(output)]))

    def _entry_exchanged(self, output: TensorDictBase, tensor: Tensor, handed: Tensor) -> Any:
        steps = next((steps for steps, each in leaves(output) if each is tensor), None)
        if steps is None:
            raise _made_anew(self.path)
        return None if handed is tensor else output.set(steps, handed)  # type: ignore[arg-type]

    def _pick_in(self, module: nn.Module, output: Any) -> Pick:
        pick = self.pick
        first = pick[0] if isinstance(pick, tuple) and pick else pick
        if not (first is None or isinstance(first, int)) or not is_entries(output):
            return pick
        own = own_entries(module, "out_keys")
        if first is None:
            return own[0] if own else None
        if own and not -len(own) <= first < len(own):
            raise CaptureError(
                f"pick={pick!r} finds nothing at {self.path!r}: the module writes {len(own)} entries, {own!r}",
                paths=(self.path,),
            )
        return (*_as_steps(own[first]), *_as_steps(pick)[1:]) if own else pick


@dataclass(frozen=True, slots=True)
class InputPort:
    """The input of a module.

    A number picks an argument, counting positional ones first, then keyword ones. A name picks a keyword argument, a
    positional one by its name in the module's ``forward``, or an entry of the only argument. A tuple continues inside
    the argument. A callable gets all arguments as a tuple.

    Without ``pick`` the first tensor is picked; from the TensorDict passed to a TensorDict module, the first entry that
    the module reads.
    """

    path: str
    pick: Pick = None
    names: tuple[str, ...] | None = None
    """The names of the parameters, if something else than the module's ``forward`` is called."""
    direction: ClassVar[HookDirection] = "fwd_pre_kwargs"

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The picked tensor (or TensorDict) among the arguments.

        Raises:
            CaptureError: there is no such tensor; the message names the path and the arguments.
        """
        if self.pick is None and args and type(args[0]) is Tensor:
            return args[0]
        if callable(self.pick):
            return tensor_only(self.pick((*args, *kwargs.values())), self.pick, self.path)
        picked = pick_tensor((args, kwargs), self._steps(module, args, kwargs), self.path)
        return tensor_only(picked, self.pick, self.path)

    def parts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Steps, Tensor]]:
        """Every tensor with the steps that lead to it, starting with the argument's number (``pick="all"``)."""
        return leaves((*args, *kwargs.values()))

    def write(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], new: Any) -> Any:
        """The return value with which a pre-hook replaces the picked tensor by ``new``, in copies of containers.

        Raises:
            EditError: ``new`` differs in shape, dtype or device, or a callable pick cannot say where to put it.
        """
        if callable(self.pick):
            raise EditError(
                f"a callable pick= cannot say where to put the new value at {self.path!r}; use an index or a key"
            )
        return replace_tensor((args, kwargs), new, pick=self._steps(module, args, kwargs), path=self.path)

    def differentiable(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value to differentiate: the picked tensor (or TensorDict), or the first tensor that requires grad.

        None if it does not require grad.
        """
        if self.pick is None and not (args and is_entries(args[0])):
            return next((tensor for _, tensor in leaves((args, kwargs)) if tensor.requires_grad), None)
        picked = self.read(module, args, kwargs)
        return None if isinstance(picked, Tensor) and not picked.requires_grad else picked

    def watch(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensor: Tensor,
        on_grad: OnGrad,
        *,
        tap: object,
    ) -> tuple[Any, Tensor, Loan | None]:
        """Call ``on_grad`` with this module's share of the gradient of ``tensor``, an argument that requires grad.

        Returns:
            The return value for the pre-hook, the alias that the module gets, and the loan to end after the call.
        """
        alias = self.alias(module, tensor, on_grad, tap=tap)
        if alias is tensor:
            return None, alias, None
        wanted = None if callable(self.pick) else self._steps(module, args, kwargs)
        new: list[Tensor | None] = []
        for steps, each in leaves((args, kwargs)):
            meant = each is tensor and (wanted is None or _leads_to(wanted, steps))
            if meant and self.pick is None:  # of attention(x, x, x) the first argument, as in edits
                meant = all(other is None for other in new)
            new.append(alias if meant else None)
        if wanted is not None and not any(each is not None for each in new):
            raise _made_anew(self.path)
        args, kwargs, loan = lend(args, kwargs, iter(new))
        return (args, kwargs), alias, loan

    def alias(self, module: nn.Module, tensor: Tensor, on_grad: OnGrad, *, tap: object) -> Tensor:
        """An alias of an argument whose gradient ``on_grad`` receives; the argument itself if it is one already."""
        return alias_input(module, tensor, on_grad, self.path, tap=tap)

    def _steps(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pick:
        """The steps in ``(args, kwargs)`` that ``pick`` stands for; None for the first tensor."""
        pick = self.pick
        if pick is None:
            own = own_entries(module, "in_keys") if args and is_entries(args[0]) else None
            return (0, 0, *_as_steps(own[0])) if own else None
        first, *rest = _as_steps(pick)
        names = list(kwargs)
        if first in kwargs:
            return (1, first, *rest)
        if isinstance(first, int) and -len(args) - len(names) <= first < len(args) + len(names):
            at = first % (len(args) + len(names))
            return (0, at, *rest) if at < len(args) else (1, names[at - len(args)], *rest)
        parameters = _parameters(module) if self.names is None else self.names
        if first in parameters[: len(args)]:
            return (0, parameters.index(str(first)), *rest)
        if len(args) == 1 and first in dict(children(args[0])):
            return (0, 0, first, *rest)
        raise CaptureError(
            f"pick={pick!r} finds nothing at {self.path!r}: it was called with {len(args)} positional arguments and "
            f"{names!r}",
            paths=(self.path,),
        )


Port = OutputPort | InputPort
"""The two ports of a module: its output, or one of its inputs."""


def port_at(path: str, direction: str, pick: Pick = None) -> Port:
    """The port of a direction: the output for ``"fwd"`` and ``"bwd"``, otherwise the input."""
    return InputPort(path, pick) if direction in ("fwd_pre", "fwd_pre_kwargs", "grad_in") else OutputPort(path, pick)


def own_entries(module: nn.Module, keys: str) -> list[CacheKey]:
    """The keys of a TensorDict module's ``in_keys`` or ``out_keys``; none for other modules."""
    return [key for key in getattr(module, keys, None) or () if key != "_"]


def _made_anew(path: str) -> CaptureError:
    return CaptureError(
        f"the entry at {path!r} is made anew each time it is read (a lazily stacked TensorDict?), so its gradient "
        "cannot be watched; capture a module that returns the tensor itself",
        paths=(path,),
    )


def _as_steps(pick: Any) -> Steps:
    return pick if isinstance(pick, tuple) else (pick,)


def _leads_to(wanted: Pick, steps: Steps) -> bool:
    """Whether ``wanted``, which may count from the end or by position, leads to ``steps``."""
    return wanted == steps or not isinstance(wanted, tuple) or len(wanted) != len(steps) or wanted[:2] == steps[:2]


def _parameters(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, OnDemandPlace):
        return module.call_parameters
    code = getattr(type(module).forward, "__code__", None)
    return () if code is None else _names_of(code)


@lru_cache(maxsize=1024)
def _names_of(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[1 : code.co_argcount]
