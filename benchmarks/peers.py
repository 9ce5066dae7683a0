"""What tdcache is held against: code written by hand, and other libraries, each behind one small function.

Imports of other libraries happen inside the functions, so that a missing one costs its own rows only.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import regex
import torch
from tensordict import TensorDict
from torch import Tensor, nn

Sites = Sequence[tuple[str, nn.Module]]


def matching(model: nn.Module, pattern: str) -> Sites:
    """What a hand-written selection does."""
    matches = regex.compile(pattern).fullmatch
    return [(path, module) for path, module in model.named_modules() if matches(path)]


def first(value: Any) -> Tensor:
    """The tensor of a value that may be a tuple."""
    return value[0] if isinstance(value, tuple) else value


# By hand.


def write_hook(kept: dict[str, Any], path: str, take: Callable[[Any], Any] | None = None) -> Callable[..., None]:
    """A forward hook that writes a dict."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept[path] = output

    def taking_hook(module: nn.Module, args: Any, output: Any) -> None:
        kept[path] = take(output)

    return hook if take is None else taking_hook


def hook_by_hand(stack: ExitStack, sites: Sites, take: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    """Leave hooks on until the stack closes; gives the dict they write."""
    kept: dict[str, Any] = {}
    for path, module in sites:
        stack.callback(module.register_forward_hook(write_hook(kept, path, take)).remove)
    return kept


def one_shot_by_hand(model: nn.Module, pattern: str, run: Callable[[], Any], take: Any = None) -> TensorDict:
    """Match, register, run, flush, remove."""
    return one_shot_on_sites(matching(model, pattern), run, take)


def one_shot_on_sites(sites: Sites, run: Callable[[], Any], take: Any = None) -> TensorDict:
    """Register, run, flush, remove."""
    kept: dict[str, Any] = {}
    handles = [module.register_forward_hook(write_hook(kept, path, take)) for path, module in sites]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return TensorDict(kept, batch_size=[])


def gradient_hook(
    kept: dict[str, Tensor] | None, grads: dict[str, Tensor], path: str, *, detach: bool = False
) -> Callable[..., None]:
    """A forward hook that sets a tensor hook; keeps the output too where ``kept`` is given."""

    def store(grad: Tensor) -> None:
        grads[path] = grad

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if kept is not None:
            kept[path] = output.detach() if detach else output
        if output.requires_grad:
            output.register_hook(store)

    return hook


def full_backward_hook(grads: dict[str, Tensor], path: str) -> Callable[..., None]:
    """The module's own backward hook."""

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        grads[path] = grad_output[0]

    return hook


class Reached(BaseException):
    """Ends a forward from a hook."""


def stop_hook(kept: dict[str, Any], path: str) -> Callable[..., None]:
    """A forward hook that ends the forward."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept[path] = output
        raise Reached

    return hook


# In the style of baukit: one object per layer name, each of which looks its module up and holds its own hook.


class Trace:
    """Retains the output of one layer that is given by name."""

    def __init__(self, model: nn.Module, name: str, *, detach: bool = True, stop: bool = False) -> None:
        self.output: Any = None
        self._detach, self._stop = detach, stop
        self._handle = self._find(model, name).register_forward_hook(self._retain)

    @staticmethod
    def _find(model: nn.Module, name: str) -> nn.Module:
        for path, module in model.named_modules():  # a search per name: this is what makes it quadratic
            if path == name:
                return module
        raise LookupError(name)

    def _retain(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output.detach() if self._detach else output
        if self._stop:
            raise Reached

    def close(self) -> None:
        self._handle.remove()


class TraceDict(dict[str, Trace]):
    """Traces of several layers, closed together; swallows the stop it asked for."""

    def __init__(self, model: nn.Module, names: Iterable[str], *, detach: bool = True, stop: bool = False) -> None:
        names = list(names)
        super().__init__((name, Trace(model, name, detach=detach, stop=stop and name == names[-1])) for name in names)

    def __enter__(self) -> TraceDict:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for trace in self.values():
            trace.close()
        return kind is not None and issubclass(kind, Reached)


# Other libraries.


def tdhook_caching(pattern: str, **options: Any) -> Any:
    """tdhook's factory; it matches prefixes, hence the ``$``."""
    from tdhook.latent.activation_caching import ActivationCaching

    return ActivationCaching(f"({pattern})$", **options)


def tdhook_take(*, output: Any = None, grad_output: Any = None, **_: Any) -> Tensor:
    """The callback that tdhook needs for tuples."""
    return first(output if output is not None else grad_output)


def nnsight_model(model: nn.Module) -> Any:
    """nnsight's wrapper. The import patches ``Tensor.backward``, which is why nothing here calls that."""
    from nnsight import NNsight

    return NNsight(model)


def nnsight_cache(wrapped: Any, modules: Sequence[Any], *inputs: Any) -> Any:
    """A trace with nnsight's cache."""
    with wrapped.trace(*inputs) as tracer:
        cache = tracer.cache(modules=modules)
    return cache  # noqa: RET504 - the body runs elsewhere, nothing may return from it


def nnsight_save(wrapped: Any, modules: Sequence[Any], *inputs: Any) -> list[Any]:
    """A trace that saves each output."""
    import nnsight

    with wrapped.trace(*inputs):
        kept = nnsight.save([module.output for module in modules])
    return kept  # noqa: RET504 - as above


def nnsight_gradients(wrapped: Any, modules: Sequence[Any], *inputs: Any) -> list[Tensor]:
    """A trace with a backward inside; gradients must be asked for in the order they arrive."""
    import nnsight

    with wrapped.trace(*inputs):
        outputs = [module.output for module in modules]
        loss = wrapped.output.sum()
        with loss.backward():
            grads = nnsight.save([output.grad for output in reversed(outputs)])
    return grads


def nnsight_stop(wrapped: Any, module: Any, *inputs: Any) -> Any:
    """A trace that ends at one module."""
    import nnsight

    with wrapped.trace(*inputs) as tracer:
        kept = nnsight.save(module.output)
        tracer.stop()
    return kept


def captum_layers(model: nn.Module, modules: Sequence[nn.Module]) -> Callable[[Tensor], Any]:
    """captum's way to read several layers."""
    from captum.attr import LayerActivation

    return LayerActivation(model, list(modules)).attribute


def pyvene_chain(model: nn.Module, count: int, width: int) -> Callable[[Tensor], Any]:
    """pyvene's collection on a chain; the model is wrapped once."""
    import pyvene

    model.config = types.SimpleNamespace()  # it asks every model for one
    places = [
        pyvene.RepresentationConfig(
            component=f"layers[{index}].output", intervention=pyvene.CollectIntervention(embed_dim=width)
        )
        for index in range(count)
    ]
    wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig(places), model)
    return lambda x: wrapped({"x": x})[0][1]


def pyvene_gpt2(model: nn.Module, layers: int) -> Callable[[Tensor], Any]:
    """pyvene's collection on GPT-2; the model is wrapped once."""
    import pyvene

    places = [
        pyvene.RepresentationConfig(layer=layer, component=part, intervention_type=pyvene.CollectIntervention)
        for layer in range(layers)
        for part in ("block_output", "attention_output", "mlp_output")
    ]
    wrapped = pyvene.IntervenableModel(pyvene.IntervenableConfig(places), model)
    return lambda ids: wrapped({"input_ids": ids})[0][1]


def backward(loss: Tensor) -> None:
    """``loss.backward()`` without the method that nnsight replaces."""
    torch.autograd.backward(loss)


def checked(
    call: Callable[[], Any], count: int, entries: Callable[[Any], Any] = lambda found: found
) -> Callable[[], Any]:
    """``call`` itself, after one call that must have captured ``count`` values."""
    found = len(list(entries(call())))
    if found != count:
        raise AssertionError(f"captured {found} of {count} values")
    return call
