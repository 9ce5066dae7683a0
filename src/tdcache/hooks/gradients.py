"""Gradients of a module's inputs and outputs, by tensor hooks.

torch's full backward hooks fail before an in-place operation, cost ten times as much and keep firing after they are
removed. Here a forward hook registers a tensor hook on the picked tensor. If the module did not compute that tensor (it
is an input, a parameter, or an input that the module returns), the tensor is replaced by an alias and the hook is
registered on that: the gradient of the tensor itself would be the sum over all its other uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import CO_VARKEYWORDS
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import InplaceModificationError
from tdcache.hooks.consumers import backward_consumers
from tdcache.hooks.values import leaves
from tdcache.introspect import add_tensor_hook, keyword_arguments

__all__ = [
    "Grads",
    "OnGrad",
    "alias_input",
    "alias_inputs",
    "handed_on",
    "note_views_out",
    "takes_names",
    "watch_made",
    "watch_output",
    "watch_outputs",
]

Grads = tuple[Tensor | None, ...]
OnGrad = Callable[[Tensor], Tensor | None]
"""Called with the gradient of one tensor; a return value other than None replaces it."""
OnGrads = Callable[[Grads], Grads | None]

_PASSAGE = "_tdcache_passage"


def handed_on(module: nn.Module, tensor: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether a module returned one of its arguments, namely this tensor."""
    if len(args) == 1 and isinstance(args[0], Tensor):  # the common case, and a hot path
        if args[0] is tensor:
            return True
    elif any(tensor is given for _, given in leaves(args)):
        return True
    if torch.compiler.is_compiling():
        return not args
    if args and not takes_names(module):
        return False
    return any(tensor is given for _, given in leaves(keyword_arguments(module)))


def takes_names(module: nn.Module) -> bool:
    """Whether ``module`` can be called with keyword arguments in addition to a positional one."""
    code = getattr(module.forward, "__code__", None)
    return code is None or code.co_argcount + code.co_kwonlyargcount != 2 or code.co_flags & CO_VARKEYWORDS != 0


def watch_output(module: nn.Module, args: Any, tensor: Tensor, on_grad: OnGrad, where: str) -> Tensor:
    """Call ``on_grad`` with the gradient of a tensor that ``module`` returns.

    Args:
        module: the module that returned it.
        args: the arguments of the module.
        tensor: the tensor, which requires grad.
        on_grad: called once per backward.
        where: the path, for messages.

    Returns:
        The tensor to return instead: itself or an alias.

    Raises:
        InplaceModificationError: in the backward, where a later in-place operation hides the gradient.
    """
    if not torch.is_grad_enabled():  # an alias would cut the returned input off from its graph
        return tensor
    if tensor.is_leaf or handed_on(module, tensor, args):
        return _Passage.through(module, (tensor,), _TensorWatcher(on_grad), where)[0]
    passage = _passage_of(tensor, module, is_input=False)
    if passage is None:
        watch_made(tensor, on_grad, where)
    else:  # an alias that an earlier hook made in the same call
        passage.watchers.append(_TensorWatcher(on_grad, passage.ids.index(id(tensor))))
    return tensor


def watch_made(tensor: Tensor, on_grad: OnGrad, where: str) -> None:
    """Call ``on_grad`` with the gradient of a tensor that the module at ``where`` computed."""
    base = tensor._base
    if base is None or torch.compiler.is_compiling():
        add_tensor_hook(tensor, on_grad)
        return
    # An in-place operation on a view or on its base removes the view, with its hook, from the graph.
    guard = _Guard(tensor, where)
    add_tensor_hook(tensor, _Guarded(on_grad, guard))
    if not base.is_leaf:
        add_tensor_hook(base, guard)


class _TensorWatcher:
    """A watcher of one of the tensors of a passage."""

    __slots__ = ("index", "on_grad", "tap")

    def __init__(self, on_grad: OnGrad, index: int = 0) -> None:
        self.on_grad = on_grad
        self.index = index
        self.tap = getattr(on_grad, "tap", None)

    def __call__(self, grads: Grads) -> Grads | None:
        at = self.index
        grad = grads[at]
        changed = None if grad is None else self.on_grad(grad)
        return None if changed is None else (*grads[:at], changed, *grads[at + 1 :])


class _Guard:
    """A tensor hook on the base of a watched view: raises if a gradient bypassed the view."""

    __slots__ = ("content", "fired", "version", "where")

    def __init__(self, view: Tensor, where: str) -> None:
        self.content = view.detach()  # shares the version counter, and holds no graph
        self.version = view._version
        self.where = where
        self.fired = False

    def __call__(self, grad: Tensor) -> None:
        if not self.fired:
            self.check()

    def check(self) -> None:
        """Raise if the gradient that arrived is incomplete."""
        if self.content._version != self.version:
            raise InplaceModificationError(
                f"the output of {self.where!r} is a view that was changed in place afterwards, so the gradient there "
                "cannot be told; capture direction 'bwd' of the module that produces what it is a view of, or of the "
                "one that changes it",
                paths=(self.where,),
            )


class _Guarded:
    """A tensor hook on a computed view: calls ``on_grad`` if the gradient is complete."""

    __slots__ = ("guard", "on_grad")

    def __init__(self, on_grad: OnGrad, guard: _Guard) -> None:
        self.on_grad = on_grad
        self.guard = guard

    def __call__(self, grad: Tensor) -> Tensor | None:
        self.guard.fired = True
        self.guard.check()
        return self.on_grad(grad)


class _Gate(torch.autograd.Function):
    """The identity on several tensors; its backward receives all their gradients together."""

    @staticmethod
    def forward(ctx: Any, on_grads: OnGrads, copies: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.on_grads = on_grads
        ctx.set_materialize_grads(False)
        # torch refuses in-place operations on several views from one node; copies of the outputs allow them.
        return tuple(tensor.clone() if copies else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        changed = ctx.on_grads(grads)
        return (None, None, *(grads if changed is None else changed))


def _alias(tensor: Tensor) -> Tensor:
    # The backward of a view makes a new tensor over the same memory. Two leaves would each adopt one as their .grad and
    # then accumulate into each other's. The backward of alias passes the same gradient tensor on.
    alias: Tensor = torch.ops.aten.alias.default(tensor)
    return alias


class _Passage:
    """The aliases and watchers of tensors that enter or leave one call of a module that did not compute them.

    All watchers of a call share the aliases. If each had its own, the last one registered would see the gradient first,
    and a later in-place operation would disconnect all but the first.
    """

    __slots__ = (
        "content", "fired", "ids", "is_input", "is_out", "is_whole", "output", "owner", "version", "watchers", "where"
    )  # fmt: skip

    def __init__(self, owner: nn.Module, first: OnGrads, where: str, *, is_input: bool) -> None:
        self.owner = owner
        self.ids: tuple[int, ...] = ()
        """The ids of the aliases; a reference to them would keep the graph alive."""
        self.watchers = [first]
        self.where = where
        self.is_input = is_input
        self.is_out = not is_input
        """Whether code outside the module has the alias, or a view of it."""
        self.fired = False
        self.content: Tensor | None = None

    @classmethod
    def through(
        cls, owner: nn.Module, tensors: Sequence[Tensor], on_grads: OnGrads, where: str, *, is_input: bool = False
    ) -> list[Tensor]:
        """Aliases of ``tensors`` whose gradients ``on_grads`` sees."""
        passage = cls(owner, on_grads, where, is_input=is_input)
        if len(tensors) > 1:
            aliases = list(_Gate.apply(passage, not is_input, *tensors))  # type: ignore[no-untyped-call]
        elif torch.compiler.is_compiling():
            aliases = [tensors[0].view_as(tensors[0])]
            aliases[0].register_hook(passage.pass_on)
        else:
            aliases = [passage._only(tensors[0])]
        if not torch.compiler.is_compiling():  # tensors in a graph have no attributes
            passage.ids = tuple(map(id, aliases))
            for alias in aliases:
                setattr(alias, _PASSAGE, passage)
        return aliases

    def _only(self, tensor: Tensor) -> Tensor:
        alias = _alias(tensor)
        add_tensor_hook(alias, self.on_only)
        base = tensor if tensor._base is None else tensor._base
        if not base.is_leaf:
            # Do not hold the base: a tensor referred to by its own hook keeps the graph alive until a gc run.
            self.is_whole = base is tensor
            self.content, self.version = alias.detach(), alias._version
            self.output = base.output_nr
            add_tensor_hook(base, self.on_base)
        return alias

    def __call__(self, grads: Grads) -> Grads | None:
        """Call each watcher with the result of the previous one."""
        self.fired = True
        changed = None
        for watcher in self.watchers:
            returned = watcher(grads)
            if returned is not None:
                changed = grads = returned
        return changed

    def watched_by(self, tap: object) -> bool:
        """Whether one of the watchers belongs to this tap."""
        return any(getattr(watcher, "tap", None) is tap for watcher in self.watchers)

    def on_only(self, grad: Tensor) -> Tensor | None:
        """Receive the gradient of the only alias; it is incomplete if the outside tensor was changed in place."""
        if self.is_out and self._is_overwritten():
            raise self._untellable()
        return self.pass_on(grad)

    def pass_on(self, grad: Tensor) -> Tensor | None:
        """Call the watchers with the gradient of the only alias."""
        changed = self((grad,))
        if changed is None:
            return None
        return torch.zeros_like(grad) if changed[0] is None else changed[0]

    def on_base(self, grad: Tensor) -> Tensor | None:
        """Receive the gradient of the aliased tensor, in case an in-place operation cut the alias off the graph.

        It is the alias' own gradient only if nothing but that operation uses the tensor.
        """
        if self.fired or not self._is_overwritten():
            return None
        if self.is_input or not self.is_whole or not self._is_used_once():
            raise self._untellable()
        return self.pass_on(grad)

    def _is_used_once(self) -> bool:
        consumers = backward_consumers(self.output)
        return consumers is not None and [type(each).__name__ for each in consumers] == ["CopySlices"]

    def _is_overwritten(self) -> bool:
        return self.content is not None and self.content._version != self.version

    def _untellable(self) -> InplaceModificationError:
        if self.is_input:
            what = f"the input of {self.where!r} was changed in place after the module took a view of it"
            noun = "there"
        else:
            what = f"{self.where!r} passes its input on, and that was changed in place afterwards"
            noun = "of its output"
        return InplaceModificationError(
            f"{what}, so the gradient {noun} cannot be told; capture direction 'bwd' of the module that produces it "
            "instead",
            paths=(self.where,),
        )


def note_views_out(aliases: Sequence[Tensor], output: Any) -> None:
    """Record, when a module returns, which of its ``aliases`` its output is a view of."""
    returned = (output,) if type(output) is Tensor else [tensor for _, tensor in leaves(output)]
    bases = [tensor._base for tensor in returned if tensor._base is not None]
    for alias in aliases if bases else ():
        if any(alias._base is base for base in bases):
            getattr(alias, _PASSAGE).is_out = True


def _passage_of(tensor: Tensor, owner: nn.Module, *, is_input: bool) -> _Passage | None:
    """The passage that made ``tensor`` as an alias for an input (or output) of ``owner``, or None."""
    passage = None if torch.compiler.is_compiling() else getattr(tensor, _PASSAGE, None)
    if passage is None or passage.owner is not owner or passage.is_input != is_input:
        return None
    return passage  # type: ignore[no-any-return]


def alias_input(module: nn.Module, tensor: Tensor, on_grad: OnGrad, where: str, *, tap: object) -> Tensor:
    """:func:`alias_inputs` for one input; ``on_grad`` receives its gradient only."""
    passage = _passage_of(tensor, module, is_input=True)
    if passage is None or passage.watched_by(tap):
        return _Passage.through(module, (tensor,), _TensorWatcher(on_grad), where, is_input=True)[0]
    passage.watchers.append(_TensorWatcher(on_grad, passage.ids.index(id(tensor))))
    return tensor


def alias_inputs(
    module: nn.Module, tensors: Sequence[Tensor], on_grads: OnGrads, where: str, *, tap: object
) -> list[Tensor]:
    """Aliases for the inputs of one call that require grad: ``on_grads`` receives this module's share of the gradients.

    Hooks of one call share them: if an earlier hook made them already, they are ``tensors`` themselves.

    Args:
        module: the module that is about to run.
        tensors: its inputs, as it would get them.
        on_grads: called with a gradient per tensor; its attribute ``tap`` is the tap that it belongs to.
        where: the path, for messages.
        tap: the calling tap. If it watches these aliases already, they belong to an outer call of the same module.
    """
    passage = _passage_of(tensors[0], module, is_input=True)
    if passage is not None and passage.ids == tuple(map(id, tensors)) and not passage.watched_by(tap):
        passage.watchers.append(on_grads)
        return list(tensors)
    return _Passage.through(module, tensors, on_grads, where, is_input=True)


def watch_outputs(
    module: nn.Module, args: Any, tensors: Sequence[Tensor], on_grads: OnGrads, where: str
) -> list[Tensor]:
    """:func:`watch_output` for several tensors; ``on_grads`` receives their gradients together."""
    if len(tensors) > 1:
        return _Passage.through(module, tensors, on_grads, where)
    return [watch_output(module, args, tensors[0], _Together(on_grads), where)]


class _Together:
    """Adapts a watcher of several tensors to the gradient of a single one."""

    __slots__ = ("on_grads",)

    def __init__(self, on_grads: OnGrads) -> None:
        self.on_grads = on_grads

    def __call__(self, grad: Tensor) -> Tensor | None:
        changed = self.on_grads((grad,))
        if changed is None:
            return None
        return torch.zeros_like(grad) if changed[0] is None else changed[0]
