"""Layer-wise relevance propagation, at inputs and at any selected module, in one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdcache.attribution.base import SiteAttribution, Work
from tdcache.attribution.frame import Frame
from tdcache.attribution.gradients import Seen, key_of, one_backward
from tdcache.attribution.integrated import gap_key
from tdcache.attribution.lrp.linear import canonised, is_linear, linear_function
from tdcache.attribution.lrp.maps import BATCH_NORMS, RuleMap, Rules
from tdcache.attribution.lrp.replaced_backward import AfterTaps, ModuleCall, ReplacedBackward, install_replaced
from tdcache.attribution.lrp.rules import Epsilon, Pass, Rule, nonzero
from tdcache.attribution.modifiers import Installed
from tdcache.attribution.place import Place
from tdcache.attribution.point import PointRows, wide
from tdcache.errors import AttributionError, TdcacheWarning, listed, warn_user
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.hooks.transient import Transient
from tdcache.modules import HookedModule
from tdcache.selection import walk
from tdcache.types import Selector

__all__ = ["LRP", "RelevanceRules"]


class RelevanceRules(Installed):
    """The modifier that applies rules: gradients become relevance divided by activation.

    Args:
        rules: a rule for all linear modules, or pairs of a selector and a rule, of which the first that fits counts.
            What no pair selects keeps its ordinary backward.
        canonise: a batch norm in eval mode that reads what a linear module returned counts as part of that module;
            nothing of the model is changed.
    """

    rowwise = True

    def __init__(self, rules: RuleMap | Rule | None = None, *, canonise: bool = True) -> None:
        super().__init__()
        self.rules = Rules.of(Epsilon() if rules is None else rules)
        self.canonise = canonise

    def install(self, model: nn.Module, rows: PointRows | None, handle: MultiHookHandle) -> None:
        """Add the hooks, for some rows or (None) for all."""
        followers: dict[int, Any] = {}
        for path, module in [("", model), *walk(model)]:
            rule = self.rules.at(path, module)
            if rule is not None:
                applied = _Applied(rule, path)
                applied.check(module)
                install_replaced(module, ReplacedBackward(path, applied, rows, followers), handle)
            elif self.canonise and isinstance(module, BATCH_NORMS):
                norm = _CanonisedNorm(path, rows, followers)
                handle.add(attach(module, AfterTaps(norm.on_norm_input), "fwd_pre_kwargs", order=Order.CAPTURE))
                handle.add(attach(module, norm.on_output, order=norm.order))
        handle.add(attach(model, _Forget(followers).on_output, order=Order.EDIT))


class _Forget(Transient):
    """Drops, when the forward ends, the outputs that were kept to recognise the norms that read them."""

    order = Order.EDIT
    rowwise = True

    def __init__(self, followers: dict[int, Any]) -> None:
        self.followers = followers

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Drop the outputs of this forward."""
        self.followers.clear()


class _Applied:
    """A rule at one module, as the backward that takes the place of the module's own."""

    def __init__(self, rule: Any, path: str) -> None:
        self.rule = rule
        self.path = path

    def __repr__(self) -> str:
        return repr(self.rule)

    def check(self, module: nn.Module) -> None:
        """Refuse a rule that needs weights at a module that has none."""
        if isinstance(self.rule, Rule) and not isinstance(self.rule, Pass) and not is_linear(module):
            raise AttributionError(
                f"{self.rule!r} needs a linear module, and {self.path!r} is a {type(module).__name__}; choose others, "
                "or Pass()"
            )

    def gradient(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient that carries the relevance of the input."""
        if not isinstance(self.rule, Rule):
            found: Tensor = self.rule.gradient(call, x, y, grad)
            return found
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):  # the tiny numbers in place of zeros are those of the dtype
            x, y, grad = wide(nonzero(x)), wide(nonzero(y)), wide(grad)
        found = self.rule.change(x, y, grad) if isinstance(self.rule, Pass) else self._linear(call, x, y, grad)
        return found.to(dtype)

    def _linear(self, call: ModuleCall, x: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        weight, bias = canonised(call.module, call.norm)
        weight, bias = wide(weight), None if bias is None else wide(bias)
        linear = linear_function(call.module)
        # With a norm folded in, the relevance that arrives belongs to the norm's output, z' below.
        z = y if call.norm is None else linear(x, weight, bias)
        relevance_grad = grad if call.norm is None else grad * nonzero(y) / nonzero(z)
        found: Tensor = self.rule.input_gradient(linear, x, weight, bias, z, relevance_grad)
        return found


class _CanonisedNorm(ReplacedBackward):
    """A batch norm that counts as part of the linear module before it, and hands relevance on."""

    def __init__(self, path: str, rows: PointRows | None, followers: dict[int, Any]) -> None:
        super().__init__(path, _Applied(Pass(), path), rows)
        self.known = followers
        self._folded: list[bool] = []

    def on_norm_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note which call the input came from."""
        given = self.reads.read(module, args, kwargs)
        found = self.known.get(id(given))
        folds = found is not None and found.output is given and is_linear(found.module) and not module.training
        if folds and found is not None:
            found.norm = module
        self._folded.append(folds)
        return super().on_input(module, args, kwargs)

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Exchange the backward where the norm was folded."""
        if self._folded.pop():
            return super().on_output(module, args, output)
        self._ended_call()
        return None


class LRP(SiteAttribution):
    r"""Relevance of the inputs, or of what the selected modules return, by layer-wise relevance propagation.

    The target's value is the relevance at the output, so that in a net without biases the scores of the inputs, and of
    any layer that everything passes through, sum to it (Bach et al. 2015, doi:10.1371/journal.pone.0130140). The target
    should pick outputs, such as an index. ``("gap", ...)`` holds, per row, by how much the sum misses the target: what
    biases took, and what was lost or made at modules that have no rule, which a warning names. In half precision
    relevance is shared out in single precision.

    Args:
        selector: which modules; None for the inputs.
        rules: see :class:`RelevanceRules`; by default epsilon at linear modules, with activations passed through.
            :func:`~tdcache.attribution.lrp.epsilon_plus` and its relatives are ready maps, and
            :func:`~tdcache.attribution.lrp.relp` and :func:`~tdcache.attribution.lrp.attnlrp` those for transformers.
        canonise: fold batch norms; see :class:`RelevanceRules`.
        **options: see :class:`SiteAttribution`.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU())
        >>> with LRP(target=1, rules=Epsilon(0.0)).prepare(model) as hooked:
        ...     td = hooked(TensorDict({"input": torch.randn(5, 3)}, batch_size=[5]))
        >>> torch.allclose(td["attr", "input"].sum(-1), td["output"][:, 1], atol=1e-6)
        True
    """

    def __init__(
        self,
        selector: Selector | None = None,
        *,
        rules: RuleMap | Rule | None = None,
        canonise: bool = True,
        **options: Any,
    ) -> None:
        self.rules = RelevanceRules(rules, canonise=canonise)
        super().__init__(selector, modifiers=(*options.pop("modifiers", ()), self.rules), **options)

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        forgotten = self.rules.rules.forgotten(module.model, canonise=self.rules.canonise)
        if forgotten:
            named = listed([f"{path} ({type(each).__name__})" for path, each in forgotten.items()])
            warn_user(
                f"LRP has no rule for {named}: relevance goes through the ordinary gradient there, which may lose or "
                "make some; td['gap', ...] says how much. Give a rule, or a pair (selector, None) if this is meant",
                TdcacheWarning,
            )
        return super()._hook_module(module)

    def work(self, frame: Frame) -> Work:
        """Ask for what the scores need, and compute them."""
        places = frame.subjects()
        seen, asks = one_backward(frame, places)
        yield asks
        scores: dict[tuple[Any, ...], Tensor] = {}
        for name, each in seen.items():
            parts = {place: self._relevance(each, place) for place in each.values}
            for place, part in parts.items():
                whole = parts if self.selector is None else {place: part}
                scores[key_of(self.name, name, place)] = self._summed(part)
                scores[gap_key(self.name, name, place)] = frame.completeness_gap(whole, each.needed_target())
        return scores

    @staticmethod
    def _relevance(seen: Seen, place: Place) -> Tensor:
        value = seen.values[place]
        return wide(nonzero(value)) * seen.grad(place, value)  # R = a * g
