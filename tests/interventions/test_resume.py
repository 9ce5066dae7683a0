"""Resuming behind a cached layer: the same result, fewer layers."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import tiny_transformers as tiny
from model_state import state_of
from small_models import MLP
from tdcache import EditError, PathError, ResumeFrom, cache_activations, resume_from

transformers = pytest.importorskip("transformers")


def gpt2():
    return tiny.gpt2(n_layer=4)[0], "transformer.h"


def llama():
    return tiny.llama(num_hidden_layers=4)[0], "model.layers"


def bert():
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, vocab_size=20
    )
    return transformers.BertForMaskedLM(config).eval(), "bert.encoder.layer"


def counting(model, layers):
    calls = []
    handles = [
        layer.register_forward_hook(lambda *args, name=name: calls.append(name))
        for name, layer in model.get_submodule(layers).named_modules()
        if name.endswith(("mlp", "intermediate"))
    ]
    return calls, handles


@pytest.fixture
def ids():
    return torch.randint(2, 20, (2, 5))


@pytest.mark.parametrize("make", [gpt2, llama, bert])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_result_is_that_of_the_whole_model(make, layer, ids):
    model, layers = make()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    path = f"{layers}.{layer}"
    with cache_activations(model, path.replace(".", r"\.")) as cache:
        whole = model(ids, attention_mask=mask).logits
    calls, handles = counting(model, layers)
    with ResumeFrom(path, cache).prepare(model) as hooked:
        resumed = hooked(ids, attention_mask=mask).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(resumed, whole)
    assert [int(name[0]) for name in calls] == list(range(layer + 1, 4))


def test_an_edited_value_is_carried_on(ids):
    model, layers = gpt2()
    with cache_activations(model, rf"{layers}\.1") as cache:
        model(ids)
    value = cache[f"{layers}.1"] + 1
    handle = model.transformer.h[1].register_forward_hook(lambda module, args, output: value)
    expected = model(ids).logits
    handle.remove()
    with resume_from(model, f"{layers}.1", value):
        assert torch.equal(model(ids).logits, expected)


def test_gradients_flow_to_the_value(ids):
    model, layers = gpt2()
    value = torch.randn(2, 5, 8, requires_grad=True)
    with resume_from(model, f"{layers}[-2]", value) as hooked:
        hooked(ids).logits.sum().backward()
    assert value.grad.shape == value.shape
    assert model.transformer.h[0].mlp.c_fc.weight.grad is None


@pytest.mark.parametrize("index", range(5))
def test_a_sequential_is_resumed_behind_any_of_its_members(index):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, value = torch.randn(6, 2), None
    value = model[: index + 1](x)
    kept = value.clone()
    with ResumeFrom(str(index), value).prepare(model) as hooked:
        assert torch.equal(hooked(TensorDict({"input": x}))["output"], model(x))
        found = hooked(x)
    assert torch.equal(found, model(x))
    assert torch.equal(value, kept)


def test_a_model_that_computes_between_its_layers_is_refused():
    model, x = MLP(), torch.randn(5, 4)  # it applies GELU between them
    before = state_of(model)
    message = "not sequential at 'layers.0': gelu uses its output.*elsewhere than in the next layer"
    with pytest.raises(EditError, match=message), resume_from(model, "layers.1", torch.randn(5, 4)):
        model(x)
    assert state_of(model) == before


class Dense(nn.Module):
    """Hands every layer's output to the end."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        kept = []
        for layer in self.layers:
            x = layer(x)
            kept.append(x)
        return torch.stack(kept).sum(0)


class Shuffled(nn.Module):
    """Calls its layers in another order than they are listed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.layers[1](self.layers[2](self.layers[0](x)))


class Skipping(nn.Module):
    """Gives a later layer what an earlier one returned."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        first = self.layers[0](x)
        self.layers[1](first)
        return self.layers[2](first)


@pytest.mark.parametrize("make", [Dense, Shuffled, Skipping])
def test_a_model_that_is_not_sequential_is_an_error_and_no_wrong_number(make):
    model, x = make(), torch.randn(5, 4)
    before = state_of(model)
    with pytest.raises(EditError, match=r"not sequential at 'layers.[01]'"), resume_from(model, "layers.1", x):
        model(x)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("layers.9", PathError, "names none"),
        ("head", EditError, "'head' is no member of a ModuleList or Sequential but of MLP"),
        ("layers.2", EditError, "is the last of 'layers'.*resume from 'layers.1'"),
        ("", EditError, "is no member"),
    ],
)
def test_where_it_is_not_known_what_runs_before_is_refused_on_entering(path, error, message):
    model = MLP()
    before = state_of(model)
    with pytest.raises(error, match=message), ResumeFrom(path, torch.zeros(1)).prepare(model):
        pass
    assert state_of(model) == before


def test_a_value_for_other_rows_or_positions_is_an_error(ids):
    model, layers = gpt2()
    for shape in ((3, 5, 8), (2, 4, 8)):
        with (
            resume_from(model, f"{layers}.0", torch.zeros(shape)),
            pytest.raises(EditError, match=r"value of shape .* as many rows and positions as the value has"),
        ):
            model(ids)


def test_forwards_that_were_on_the_instance_are_put_back():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(5, 4)
    own = model[0].forward
    model[0].forward = own  # as accelerate leaves it
    before = state_of(model)
    with resume_from(model, "0", x), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert state_of(model) == before
    assert model[0].__dict__["forward"] is own
