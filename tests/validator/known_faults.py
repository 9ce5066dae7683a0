"""Faults of other libraries that are known, each tried again with as little code as shows it.

A function returns what was seen where the fault is still there, and None where it is not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from validator.answers import one_line
from validator.own_models import Images, Tied, WithNone


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is known of one library, where it was reported, and code that shows it."""

    peer: str
    what: str
    shown_by: Callable[[], str | None]


class Twice(nn.Module):
    """A module that runs twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.config = nn.Linear(4, 4), None

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x))


def tiny_gpt2() -> nn.Module:
    from families import build

    return build("gpt2", attn_implementation="eager")


def prompt() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7]])}


def nnsight_keeps_what_is_overwritten() -> str | None:
    import nnsight

    model, x = Images(inplace=True).eval(), torch.randn(1, 3, 8, 8)
    wanted, traced = model.conv(x), nnsight.NNsight(model)
    with torch.no_grad(), traced.trace(x=x):
        value = traced.conv.output.save()
    return None if torch.equal(value, wanted) else "the values after the ReLU were returned as those before it"


def nnsight_caches_nothing_for_a_wrong_name() -> str | None:
    import nnsight

    model = nnsight.NNsight(Tied())
    with model.trace(x=torch.randn(1, 4)) as tracer:
        kept = tracer.cache(modules=["model.nope"]).save()
    return "an empty cache, no error" if not list(kept.keys()) else None


def nnsight_marks_every_object() -> str | None:
    import nnsight  # noqa: F401 - the import is what is tried

    return "`hasattr(5, 'save')` is True after the import" if hasattr(5, "save") else None


def pyvene_model() -> tuple[nn.Module, Any]:
    import pyvene

    model = tiny_gpt2().train()
    place = pyvene.RepresentationConfig(
        component="transformer.h[0].output", intervention=pyvene.CollectIntervention(embed_dim=96)
    )
    return model, pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model)


def pyvene_freezes_the_model() -> str | None:
    model, _ = pyvene_model()
    frozen = not any(each.requires_grad for each in model.parameters())
    seen = [
        *(["in evaluation mode"] if not model.training else []),
        *(["no parameter requires grad"] if frozen else []),
    ]
    return "after the construction: " + ", ".join(seen) if seen else None


def pyvene_removes_foreign_hooks() -> str | None:
    model, wrapped = pyvene_model()
    calls: list[int] = []
    model.transformer.h[1].register_forward_hook(lambda *rest: calls.append(1))
    wrapped(prompt(), unit_locations={"base": [[[0, 1, 2]]]})
    calls.clear()
    model(**prompt())
    return None if calls else "a hook of the user's own is gone after one call"


def pyvene_needs_an_ending() -> str | None:
    import pyvene

    model = tiny_gpt2()
    place = pyvene.RepresentationConfig(
        component="transformer.h[0]", intervention=pyvene.CollectIntervention(embed_dim=32)
    )
    try:
        pyvene.IntervenableModel(pyvene.IntervenableConfig([place]), model)(prompt())
    except UnboundLocalError as error:
        return one_line(error)
    except Exception:  # noqa: BLE001 - another error is not this fault
        return None
    return None


def captum_reads_no_tuple_with_none() -> str | None:
    from captum.attr import LayerActivation

    model = WithNone()
    try:
        LayerActivation(model, model.pair).attribute(torch.randn(1, 2, 4))
    except AttributeError as error:
        return one_line(error)
    return None


def lens_root() -> Any:
    from transformer_lens import HookedRootModule
    from transformer_lens.hook_points import HookPoint

    class Root(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.hook_out = nn.Linear(4, 4), HookPoint()
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.hook_out(self.map(x))

    return Root()


def lens_caches_nothing_for_a_wrong_name() -> str | None:
    _, kept = lens_root().run_with_cache(torch.randn(1, 4), names_filter="hook_nope")
    return "an empty cache, no error" if len(kept) == 0 else None


def lens_returns_no_handle() -> str | None:
    found = lens_root().add_hook("hook_out", lambda value, hook: value)
    return "`add_hook` returns None, so one hook cannot be removed" if found is None else None


def lens_removes_hooks_that_were_left_on() -> str | None:
    model, calls = lens_root(), []
    model.add_hook("hook_out", lambda value, hook: calls.append(1))
    model.run_with_cache(torch.randn(1, 4))
    calls.clear()
    model(torch.randn(1, 4))
    return None if calls else "a hook that was added before `run_with_cache` is gone after it"


FAULTS = (
    Fault(
        peer="nnsight",
        what="a saved output is overwritten by the in-place operation after it",
        shown_by=nnsight_keeps_what_is_overwritten,
    ),
    Fault(
        peer="nnsight",
        what="`tracer.cache(modules=[...])` with a name that does not exist",
        shown_by=nnsight_caches_nothing_for_a_wrong_name,
    ),
    Fault(peer="nnsight", what="every Python object gets a `save` method", shown_by=nnsight_marks_every_object),
    Fault(peer="pyvene", what="wrapping a model changes it", shown_by=pyvene_freezes_the_model),
    Fault(peer="pyvene", what="a call removes the hooks of others", shown_by=pyvene_removes_foreign_hooks),
    Fault(peer="pyvene", what="a path without `.output`", shown_by=pyvene_needs_an_ending),
    Fault(peer="captum", what="a layer that returns `(tensor, None)`", shown_by=captum_reads_no_tuple_with_none),
    Fault(
        peer="transformer_lens",
        what="`names_filter` with a name that does not exist",
        shown_by=lens_caches_nothing_for_a_wrong_name,
    ),
    Fault(peer="transformer_lens", what="`add_hook` gives nothing to remove it by", shown_by=lens_returns_no_handle),
    Fault(
        peer="transformer_lens",
        what="`run_with_cache` removes hooks that were there before (TransformerLens#1636)",
        shown_by=lens_removes_hooks_that_were_left_on,
    ),
)


def tried(peer: str) -> list[dict[str, str]]:
    """The faults of one library: what was seen, in words; ``"no"`` where it did not show."""
    rows = []
    for fault in FAULTS:
        if fault.peer == peer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    seen = fault.shown_by()
                except Exception as error:  # noqa: BLE001 - an attempt that fails shows nothing
                    seen = f"could not be tried: {one_line(error)}"
            rows.append({"peer": peer, "what": fault.what, "seen": "no" if seen is None else seen})
    return rows
