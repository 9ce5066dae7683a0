"""``Splice``: puts an encode/decode pair into a running model, with latents, reconstruction and error as sites.

Replacing a module by a wrapper would change paths, state dict and class; a hook that only calls an autoencoder would
leave its latents out of reach of selectors, caches and interventions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from tdcache.contexts import HookingContext, HookingContextFactory
from tdcache.errors import CaptureError, ContextError, InplaceModificationError, SelectionError, listed
from tdcache.function_calls.stand_in import check_selector, resolve_site
from tdcache.hooks import InputPort, MultiHookHandle, Order, OutputPort, attach_ports, direction_row
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import first_tensor
from tdcache.inplace import eager_version_of
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.pipeline.autoencoder import Autoencoder, Sites, as_autoencoder
from tdcache.pipeline.shown_modules import plant, shown_path
from tdcache.place_modules import refuse_at_names
from tdcache.selection import Site, distinct_sites
from tdcache.types import Match, Pick, Selector

__all__ = ["Splice", "SpliceContext", "SpliceSite", "sparse_latents"]


class SpliceSite(Transient, nn.Module):
    """The modules that a splice adds to the model's tree: identities for its latents, reconstruction and error.

    It has no parameters: those of the autoencoder stay outside the model.
    """

    autoencoder: Autoencoder
    sites: Sites
    latents: nn.Module
    reconstruction: nn.Module
    error: nn.Module

    def __init__(self, path: str, autoencoder: Autoencoder, *, add_error: bool) -> None:
        super().__init__()
        self.path = path
        self.add_error = add_error
        self.__dict__["autoencoder"] = autoencoder  # not by setattr, which would register a module
        shown = {name: nn.Identity() for name in ("latents", "reconstruction", "error")}
        for name, module in shown.items():
            self.add_module(name, module)
        self.__dict__["sites"] = Sites(**shown)

    def forward(self, *values: Any) -> Tensor:
        """Replace the first value by encoding the second; only the splice's own hook calls this.

        Raises:
            ContextError: other code calls it.
        """
        if len(values) != 2:
            raise ContextError(
                f"{self.path!r} was called by other code than its splice: a module that runs all of its children, or a "
                "list that was iterated over while the splice is open; splice the module around it"
            )
        x, source = values
        return self.sites.run(x, self.autoencoder, add_error=self.add_error, source=source)

    def extra_repr(self) -> str:
        """Path and error term, for the repr."""
        return f"{self.path!r}, add_error={self.add_error}"


@dataclass(slots=True, eq=False)
class _SourceTap(Transient):
    """Records the input of a spliced module, if the input is what is encoded."""

    port: InputPort
    order: int = Order.CAPTURE
    noted: list[tuple[Tensor, int]] = field(default_factory=list)
    """The inputs of the running calls, with their version counters."""

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the first tensor of the input; of a TensorDict, the first entry that the module reads."""
        source = self.port.read(module, args, kwargs)
        self.noted.append((source, eager_version_of(source)))

    def taken(self) -> Tensor:
        """The input of the latest call."""
        source, version = self.noted.pop()
        if eager_version_of(source) != version:
            raise InplaceModificationError(
                f"{self.port.path!r} writes into its input, which is to be encoded; splice with reads='output', or on "
                "another module",
                paths=(self.port.path,),
            )
        return source


@dataclass(slots=True, eq=False)
class _DictionaryTap(Transient):
    """Passes the output of a module through its splice."""

    port: OutputPort
    site: SpliceSite
    source: _SourceTap | None
    order: int = Order.EDIT

    def on_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace the picked tensor of the output by the result of the splice."""
        x = self.port.read(module, args, output)
        source = x if self.source is None else self.source.taken()
        return self.port.write(module, args, output, self.site(x, source))


class SpliceContext(HookingContext):
    """The context of a splice, which owns the modules that it added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sites: dict[str, SpliceSite] = {}
        """The modules added to the model's tree, by the path of the spliced module; kept while paused."""

    def _leave(self, error: BaseException | None) -> None:
        try:
            super()._leave(error)
        finally:
            self.sites = {}


class Splice(HookingContextFactory):
    """Puts an encode/decode pair into a model: the output of each selected module passes through it.

    While the context is open, ``latents``, ``reconstruction`` and ``error`` are modules of the model, under paths such
    as ``"layers.3.mlp/sae.latents"``; at a call ``"layers.3::gelu"``, ``"layers.3.gelu/sae.latents"``. Contexts entered
    after the splice can select, capture, reduce, edit and differentiate them like any other site; in a composite, list
    the splice first. Captures at the spliced site itself see the output of the splice. Everything is removed on exit;
    the autoencoder's parameters never become part of the model.

    With the error term the splice is the identity, in the forward and for the gradient of its input. The gradient of
    the latents is the decoder transpose applied to the gradient of the output, that of the error is the gradient of the
    output; an edit of the latents changes the output by exactly the decoded change. Without the error term the output
    is the reconstruction, and ``error`` is read-only.

    Args:
        selector: which modules; one with several names is spliced once.
        autoencoder: an object with ``encode(x)`` and ``decode(latents)``, a pair of such functions, or a mapping from
            paths to these. Both must be deterministic, and on the model's device.
        add_error: add the error of the reconstruction.
        reads: the value to encode: the module's ``"output"``, or its ``"input"``, as for a transcoder.
        name: the part of paths after the slash; two splices on one module need two names.
        pick: which tensor of a structured output is replaced, the first by default; the rest is kept.
        match: ``"full"``, ``"prefix"`` or ``"search"``.
        names: the canonical names of the model, ``tdcache.names(model)``: the selector and the mapping then mean names,
            and what is shown is at paths such as ``"blocks.3.mlp.out/sae.latents"``. The value of a name is what is
            encoded.

    Raises:
        HookSignatureError: ``autoencoder`` is not one.
        SelectionError: the selector is invalid; on entering, it matches nothing, or a path has no autoencoder.
        ContextError: on entering, the name is in use.
        EditError: in the forward, the autoencoder does not fit the output.

    Example:
        >>> import torch
        >>> model, basis = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.eye(3)
        >>> with Splice("0", (lambda x: x @ basis, lambda z: z @ basis.T)).prepare(model):
        ...     print(*[path for path, _ in model.named_modules() if "/" in path])
        0/sae 0/sae.latents 0/sae.reconstruction 0/sae.error
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = SpliceContext

    def __init__(
        self,
        selector: Selector,
        autoencoder: Any,
        *,
        add_error: bool = True,
        reads: Literal["output", "input"] = "output",
        name: str = "sae",
        pick: Pick = None,
        match: Match = "full",
        names: Names | None = None,
    ) -> None:
        super().__init__()
        refuse_at_names(names, ["fwd" if reads == "output" else "fwd_pre"])
        self.names = names
        check_selector(selector, match)
        self._selector, self._match = selector, match
        self._pairs: Autoencoder | Mapping[str, Autoencoder]
        if isinstance(autoencoder, Mapping) and not hasattr(autoencoder, "encode"):
            self._pairs = {path: as_autoencoder(each) for path, each in autoencoder.items()}
        else:
            self._pairs = as_autoencoder(autoencoder)
        if reads not in ("output", "input"):
            raise ValueError(f"reads is 'output' or 'input', got {reads!r}")
        if not name or set(name) & set("./"):
            raise ValueError(f"name stands after the slash in paths such as 'layers.3/sae'; got {name!r}")
        self._add_error, self._reads, self._name, self._pick = add_error, reads, name, pick

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._selector!r}, add_error={self._add_error}, name={self._name!r})"

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        selection = module.hooking_context.select(self._selector, match=self._match)
        shown: dict[str, SpliceSite] = module.hooking_context.sites
        if isinstance(self._pairs, Mapping) and self.names is None:
            for path in self._pairs.keys() - set(selection.paths):
                resolve_site(module.model, path)  # of a module that is not selected, or misspelt
        handle = MultiHookHandle()
        with handle.installing():
            for site in distinct_sites(selection):
                path = site.path
                if path not in shown:
                    where = f"{shown_path(path)}/{self._name}"
                    shown[path] = SpliceSite(where, self._pair_for(path), add_error=self._add_error)
                plant(module.model, path, shown[path], f"/{self._name}", handle)
                self._hook(site, shown[path], handle)
        return handle

    def _pair_for(self, path: str) -> Autoencoder:
        if isinstance(self._pairs, Autoencoder):
            return self._pairs
        if path not in self._pairs:
            raise SelectionError(
                f"{self._selector!r} selects {path!r}, for which there is no autoencoder; there are some for "
                f"{listed(list(self._pairs), 10)}",
                selector=self._selector,
            )
        return self._pairs[path]

    def _hook(self, site: Site, shown: SpliceSite, handle: MultiHookHandle) -> None:
        source = None if self._reads == "output" else _SourceTap(InputPort(site.path))
        if source is not None:
            attach_ports([(site.module, source)], source.port.direction, handle, source.order)
        tap = _DictionaryTap(OutputPort(site.path, self._pick), shown, source)
        attach_ports([(site.module, tap)], tap.port.direction, handle, tap.order)


def sparse_latents(*, direction: str = "fwd", **named: Any) -> Tensor:
    r"""A ``callback`` for :class:`~tdcache.ActivationCaching` that keeps values as sparse COO tensors, without graph.

    ``ActivationCaching(r".*/sae\.latents", callback=sparse_latents)`` does not keep the dense latents alive. It can be
    used at any site whose values are mostly zero.
    """
    value = first_tensor(named[direction_row(direction).value])
    if value is None:
        raise CaptureError(f"no tensor came by in direction {direction!r}")
    return value.detach().to_sparse()
