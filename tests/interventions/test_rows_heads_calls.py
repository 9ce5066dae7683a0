"""Regions beside positions and units: rows of the batch, heads, calls; and what of a source goes where."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny_transformers as tiny
from interventions.hand import edited, pasted, values
from small_models import MLP
from tdcache import Ablation, ActivationPatching, EditError, SteeringVectors, cache_activations
from tdcache.interventions import Region


def gpt2():
    return tiny.gpt2(n_layer=3)[0]


def llama():
    return tiny.llama(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)[0]


def bert():
    return tiny.bert(num_hidden_layers=3)[0]


MODELS = {
    "gpt2": (gpt2, "transformer.h.1.attn.c_proj"),
    "llama": (llama, "model.layers.1.self_attn.o_proj"),
    "bert": (bert, "encoder.layer.1.attention.output.dense"),
}


def zeroed(index):
    def edit(value):
        new = value.clone()
        new[index] = 0
        return new

    return edit


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({"heads": (2, 1)}, (..., slice(4, 8))),
        ({"heads": (4, [0, 2])}, (..., [0, 1, 4, 5])),
        ({"heads": (4, slice(1, 3)), "positions": [0, 3]}, (slice(None), [0, 3], slice(2, 6))),
        ({"rows": 1}, (1,)),
        ({"rows": [0, -1]}, ([0, 2],)),
        ({"rows": torch.tensor([True, False, True])}, ([0, 2],)),
        ({"rows": slice(1, None), "units": [5]}, (slice(1, None), slice(None), 5)),
        ({"rows": [0, 2], "positions": torch.tensor([[0], [1], [4]])}, ([0, 2], [0, 4])),
    ],
)
def test_heads_and_rows_are_what_a_plain_hook_changes(name, options, index):
    make, path = MODELS[name]
    model, ids = make(), torch.randint(2, 20, (3, 5))
    with torch.no_grad(), edited(model, path, zeroed(index), inputs=True):
        expected = model(ids)[0]
    with torch.no_grad(), Ablation(path, direction="fwd_pre", **options).prepare(model):
        found = model(ids)[0]
        assert not torch.equal(found, expected.roll(1, 0))
    assert torch.equal(found, expected)


def test_several_prompts_have_edits_of_their_own_in_one_forward():
    model, x = MLP(), torch.randn(3, 4)
    vectors = torch.randn(3, 4)
    with (
        SteeringVectors(r"layers\.1", vectors[0], rows=0).prepare(model),
        SteeringVectors(r"layers\.1", vectors[2], rows=2).prepare(model),
    ):
        together = model(x)
    vectors[1] = 0
    with edited(model, "layers.1", lambda value: value + vectors):
        assert torch.equal(together, model(x))


def test_where_axis_0_is_the_sequence_rows_are_axis_1():
    model, x = nn.Sequential(nn.Identity()), torch.randn(5, 3, 4)
    with Ablation("0", rows=2, positions=[1], position_dim=0).prepare(model):
        found = model(x)
    assert torch.equal(found, zeroed((1, 2))(x))


def test_a_choice_of_positions_per_row_is_understood_in_either_layout():
    model, x, chosen = nn.Sequential(nn.Identity()), torch.randn(5, 3, 4), torch.tensor([[0, 1], [2, 3], [4, 0]])
    with Ablation("0", positions=chosen, position_dim=0).prepare(model):
        found = model(x)
    expected = x.clone()
    for row, positions in enumerate(chosen.tolist()):
        expected[positions, row] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("region", "shape", "message"),
    [
        ({"rows": 3}, (3, 5, 8), r"rows=3 means nothing at 'x', whose value has 3 along axis 0"),
        ({"rows": torch.tensor([True])}, (3, 5, 8), r"rows=\[True\] means nothing"),
        ({"heads": (3, 0)}, (3, 5, 8), r"heads=\(3, \.\.\.\) does not divide the 8 units at 'x'"),
        ({"heads": (2, 2)}, (3, 5, 8), "heads=2 means nothing at 'x', whose value has 2 along axis 0"),
    ],
)
def test_a_region_that_a_value_does_not_have_is_an_error(region, shape, message):
    with pytest.raises(EditError, match=message):
        Region(**region).take(torch.zeros(shape), "x")


class Recurrent(nn.Module):
    """One cell, run once for each step of its input."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for step in range(x.shape[1]):
            state = self.cell(state + x[:, step]).tanh()
        return state


@pytest.mark.parametrize(
    ("calls", "expected"), [(1, {1}), ([0, 2], {0, 2}), (slice(2, None), {2, 3}), (None, set(range(4)))]
)
def test_calls_choose_among_those_of_one_forward(calls, expected):
    model, x = Recurrent(), torch.randn(2, 4, 4)
    seen = []

    def by_hand(value):
        seen.append(None)
        return value * 0 if (len(seen) - 1) % 4 in expected else value

    with edited(model, "cell", by_hand):
        wanted = [model(x), model(x + 1)]
    with Ablation("cell", calls=calls).prepare(model) as hooked:
        assert torch.equal(hooked(x), wanted[0])
        assert torch.equal(hooked(x + 1), wanted[1])  # each forward counts from 0


def test_a_forward_that_raised_does_not_shift_the_calls_of_the_next():
    model, x = Recurrent(), torch.randn(2, 4, 4)
    with Ablation("cell", calls=3).prepare(model) as hooked:
        expected = hooked(x)
        with pytest.raises(RuntimeError):
            hooked(torch.randn(2, 4, 5))
        assert torch.equal(hooked(x), expected)


def test_calls_under_checkpointing_are_refused():
    class Checkpointed(Recurrent):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model = Checkpointed()
    with Ablation("cell", calls=1).prepare(model):
        result = model(torch.randn(2, 4, 4))
        with pytest.raises(EditError, match="checkpointing runs 'cell' again in the backward, where calls= cannot be"):
            result.sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_a_source_of_one_row_and_another_length_goes_to_other_positions(name):
    """Patchscopes: the representation of one token is put into another prompt."""
    make, path = MODELS[name]
    path = path.rpartition(".self_attn" if name == "llama" else ".att")[0] or path
    model, source, target = make(), torch.randint(2, 20, (1, 7)), torch.randint(2, 20, (3, 5))
    given = values(model, [path], lambda: model(source))[path]

    def paste(value):
        new = value.clone()
        new[:, [1, 3]] = given[:, [6, 0]]
        return new

    with torch.no_grad(), edited(model, path, paste):
        expected = model(target)[0]
    recipe = ActivationPatching(path, {path: given}, positions=[1, 3], source_positions=[-1, 0])
    with torch.no_grad(), recipe.prepare(model):
        assert torch.equal(model(target)[0], expected)


@pytest.mark.parametrize("positions", [None, [2, 4]])
def test_a_source_of_one_row_serves_every_row(positions):
    model, x, source = MLP(), torch.randn(3, 5, 4), torch.randn(1, 5, 4)
    with cache_activations(model, r"layers\.1") as cache, torch.no_grad():
        model(source)
    whole = cache["layers.1"].expand(3, 5, 4)
    index = (slice(None), slice(None) if positions is None else positions)
    with edited(model, "layers.1", lambda value: pasted(value, whole, index)):
        expected = model(x)
    with ActivationPatching(r"layers\.1", cache, positions=positions).prepare(model):
        assert torch.equal(model(x), expected)


def test_a_second_input_of_another_length_is_a_source_with_positions_of_its_own():
    model, first, second = MLP(), torch.randn(3, 7, 4), torch.randn(3, 5, 4)
    data = TensorDict({"input": first, "patched": {"input": second}})
    with ActivationPatching(r"layers\.1", positions=-1, source_positions=6).prepare(model) as hooked:
        found = hooked(data)["patched", "output"]
    given = values(model, ["layers.1"], lambda: model(first))["layers.1"]

    def paste(value):
        return torch.cat([value[:, :-1], given[:, 6:]], 1)

    with edited(model, "layers.1", paste):
        assert torch.equal(found, model(second))
