"""Errors of interventions that a run meets only in a model or a file that is made for it."""

import json

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    HookedModule,
    load_intervention,
    names,
    resume_from,
    save_intervention,
)
from tdcache.errors import CaptureError, DamagedError, EditError
from tiny_transformers import gpt2


class Often(nn.Module):
    """Runs its layer as often as the first number of its input says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(int(x.flatten()[0])):
            x = self.layer(x)
        return x


def pair(first, second):
    return TensorDict({"input": torch.full((2, 4), first), "patched": {"input": torch.full((2, 4), second)}})


def test_a_module_that_runs_more_often_in_the_second_run_is_no_site_of_a_patch():
    message = r"'layer' runs 3 times in this run, and ran 2 times in the \w+ run; select modules that run as"
    with pytest.raises(EditError, match=message), ActivationPatching("layer").prepare(Often()) as hooked:
        hooked(pair(2.0, 3.0))


def test_a_module_that_runs_more_often_in_a_trial_is_no_site_of_a_sweep():
    recipe = ActivationPatching("layer", sweep=True, metric=lambda data: data["output"].sum(), chunk=1, replay=False)
    message = r"'layer' ran 2 times in the source run and now more often; patch it without sweep="
    with pytest.raises(EditError, match=message), recipe.prepare(Often()) as hooked:
        hooked(pair(2.0, 3.0))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, input, attention_mask):  # noqa: A002
        return self.layer(input)


@pytest.mark.parametrize("sweep", [{}, {"sweep": True, "metric": lambda data: data["output"].sum(), "chunk": 1}])
def test_positions_that_no_row_has_in_the_first_run_are_refused(sweep):
    x, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    data = TensorDict({"input": x, "attention_mask": mask, "patched": {"input": x, "attention_mask": mask}})
    recipe = ActivationPatching("layer", positions=slice(3, None), **sweep)
    keys = {"input": "input", "attention_mask": "attention_mask"}
    context = recipe.prepare(Masked(), in_keys=keys, out_keys=["output"])
    with pytest.raises(EditError, match=r"positions=.*3.* are none of the columns at 'layer'"), context as hooked:
        hooked(data)


def test_a_sweep_over_positions_needs_their_axis():
    recipe = ActivationPatching(
        "layer", sweep="position", metric=lambda data: data["output"].sum(), position_dim=2, chunk=1
    )
    with (
        pytest.raises(EditError, match=r"a sweep over positions needs an axis 2 at 'layer', whose value has shape"),
        recipe.prepare(Often()) as hooked,
    ):
        hooked(pair(1.0, 1.0))


def test_a_source_with_rows_first_does_not_fit_a_sequence_first_value():
    source = {"layer": torch.randn(6, 3, 4)}
    message = r"source= has rows along axis 0, and the value at 'layer' along axis 1"
    with (
        pytest.raises(EditError, match=message),
        Ablation("layer", "resample", source, position_dim=0).prepare(Often()) as hooked,
    ):
        hooked(torch.ones(5, 3, 4))


def test_an_addition_needs_the_axis_of_its_features():
    data = TensorDict({"positive": {"input": torch.ones(2, 3, 4)}, "negative": {"input": torch.ones(2, 3, 4)}})
    recipe = ActivationAddition("layer", pool="last", unit_dim=-4)
    with (
        pytest.raises(EditError, match=r"unit_dim=-4 is no axis of a value of shape \(2, 3, 4\)"),
        recipe.prepare(Often()) as hooked,
    ):
        hooked(data)


@pytest.mark.parametrize("value", [None, [1.0], {"0": "x"}])
def test_a_model_is_resumed_from_a_tensor_and_nothing_else(value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    message = r"the value for '0' is a tensor, got (NoneType|list|str)"
    with pytest.raises(EditError, match=message), resume_from(model, "0", value):
        model(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "none"}, r"intervention\.json describes no Ablation: "),
        ({"depth": 3}, r"intervention\.json: Ablation has no argument 'depth'"),
    ],
)
def test_a_description_that_an_intervention_refuses_is_damaged(tmp_path, change, message):
    save_intervention(Ablation("layer"), tmp_path / "saved")
    (config,) = (tmp_path / "saved").glob("*.json")
    saved = json.loads(config.read_text())
    saved["arguments"].update(change)
    config.write_text(json.dumps(saved))
    with pytest.raises(DamagedError, match=message.replace("intervention", config.stem)):
        load_intervention(tmp_path / "saved")


def test_a_place_that_is_no_output_of_a_module_is_not_skipped():
    model, ids = gpt2()
    context = ActivationCaching(r"blocks\.0\.attn\.pattern", names=names(model)).prepare(model)
    message = r"'blocks.0.attn.pattern' is the .*, and what can be skipped is a module; set its value, or give the path"
    with context as hooked, pytest.raises(EditError, match=message), hooked.run(ids) as run:
        run.skip("blocks.0.attn.pattern", torch.zeros(2))


def test_a_callback_of_get_gives_a_tensor():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    message = r"callback= returned int at '0'; a cache holds tensors or TensorDicts"
    with pytest.raises(CaptureError, match=message), HookedModule.from_module(model).run(x) as run:
        run.get("0", callback=lambda **_: 3)


class Wrapped(dict):
    """A mapping that cannot be made from its entries."""

    def __init__(self):
        super().__init__()

    def __copy__(self):
        raise TypeError("no copies")


class Wrap(nn.Module):
    def forward(self, x):
        made = Wrapped()
        made["x"] = x * 2
        return made


class Unwrap(nn.Module):
    def forward(self, made):
        return made["x"]


def test_a_value_that_cannot_be_rebuilt_is_named_by_its_type():
    model = nn.Sequential(Wrap(), Unwrap(), nn.Linear(4, 4))
    recipe = ActivationPatching("2", sweep=True, metric=lambda data: data["output"].sum(), chunk=2)
    message = r"a value of type Wrapped cannot be rebuilt for a replay: no copies"
    with pytest.raises(EditError, match=message), recipe.prepare(model) as hooked:
        hooked(pair(1.0, 2.0))
