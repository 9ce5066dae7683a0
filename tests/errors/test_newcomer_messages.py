"""What those are told who come from another library, or who write their first lines: each says what to type next."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import named_model
import tdcache
from tdcache import (
    ActivationCaching,
    CompositeHookingContextFactory,
    HookedModule,
    SelectionError,
    SteeringVectors,
    cache_activations,
    harvest,
    plot,
    select,
)
from tdcache.attribution import LRP, Epsilon, IntegratedGradients
from tdcache.points import HookedRootModule, HookPoint

X = torch.ones(2, 3)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.mlp(x), None


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})

    def forward(self, x):
        for block in self.decoder["layers"]:
            x = block(x)[0]
        return x


class Pointed(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.hook_in = HookPoint()
        self.setup()

    def forward(self, x):
        return self.hook_in(x)


MODEL = Stack()


def captured(pattern, **options):
    with cache_activations(MODEL, pattern, **options) as cache:
        MODEL(X)
    return cache


def without_prepare():
    with ActivationCaching("decoder"):
        pass


def explained(**options):
    with IntegratedGradients(**options).prepare(MODEL) as hooked:
        hooked(TensorDict({"input": X}, batch_size=[2]))


def run_with(**options):
    with HookedModule(MODEL).run(X) as run:
        run.get("decoder.layers.0.mlp", **options)


MISTAKES = {
    "reading a cache without `with`": (
        lambda: cache_activations(MODEL, "decoder")["decoder"],
        "nothing was cached: write `with cache_activations(model, pattern) as cache:` and call the model inside",
    ),
    "asking for the keys of a cache without `with`": (
        lambda: cache_activations(MODEL, "decoder").keys(),
        "nothing was cached: write `with cache_activations(model, pattern) as cache:` and call the model inside",
    ),
    "a recipe in place of a context": (
        without_prepare,
        "a recipe is bound to a model first: `with ActivationCaching(...).prepare(model) as hooked:`",
    ),
    "the front of a path left out": (
        lambda: select(MODEL, r"layers\.\d\.mlp"),
        "did you mean 'decoder.layers.0.mlp'",
    ),
    "the path in a wrapper": (lambda: select(MODEL, r"model\.decoder\.layers\.1"), "did you mean 'decoder.layers.1'? "),
    "the front of another model": (
        lambda: select(MODEL, "gpt2.layers.0.attn"),
        "mean 'decoder.layers.0.attn'?",
    ),
    "a glob": (
        lambda: select(MODEL, "*.mlp"),
        "pattern '*.mlp' is not a valid regex: nothing to repeat at position 0; in a regex, '.*' is what '*' is in a "
        "glob",
    ),
    "a canonical name among paths": (
        lambda: select(MODEL, "blocks.0.hook_resid_post"),
        "canonical names need names=tdcache.names(model), those with 'hook_' style='transformer_lens' in it (patterns",
    ),
    "a vector in place of the pattern": (lambda: SteeringVectors(torch.ones(999)), "; got a Tensor of shape (999,)"),
    "the factory's model first": (
        lambda: ActivationCaching(MODEL, "decoder"),
        "got the module Stack itself: write its path or its class; factories get the model from "
        "prepare(), functions before the pattern",
    ),
    "a module in place of a path": (
        lambda: HookedModule(MODEL).get(TensorDict(), MODEL.decoder),
        "a path is a string such as 'layers.0', got the module itself (ModuleDict)",
    ),
    "a model in a composite": (
        lambda: CompositeHookingContextFactory(MODEL),
        "a composite is made of factories such as ActivationCaching(...), got the module Stack",
    ),
    "a pick of what was not computed": (
        lambda: captured(r"decoder\.layers\.0", pick=1),
        "pick=1 gives None at 'decoder.layers.0', which was not computed; leave pick= out for the first tensor; "
        "attention weights are 'decoder.layers.0::pattern', whatever kernel runs",
    ),
    "an index in words": (
        lambda: ActivationCaching("decoder", index="last"),
        "index= is what a tensor is indexed with, such as (slice(None), -1), got 'last'; an entry of a structured "
        "value is pick=",
    ),
    "a misspelt option of a verb": (lambda: run_with(pik=0), "this verb() has no argument 'pik'; did you mean 'pick'?"),
    "a list in place of a vector": (
        lambda: SteeringVectors("decoder", [0.0, 1.0]),
        "vectors is a tensor, or a mapping of one per path, got a list",
    ),
    "no target": (
        explained,
        "target None gives values of shape (100, 3), not one scalar per row (100,); choose an",
    ),
    "a target that the output lacks": (
        lambda: explained(target=7),
        "target=7 does not fit the output 'output' of shape (100, 3): index 7 is out of bounds for dimension 1 with "
        "size 3",
    ),
    "a rule by name": (
        lambda: LRP(rules="epsilon"),
        "rules= is a rule such as Epsilon(), a map such as epsilon_plus(), or pairs of a selector and a rule, got "
        "'epsilon'",
    ),
    "a rule's class": (lambda: LRP(rules=Epsilon), "pairs of a selector and a rule, got <class 'tdcache.attribution."),
    "rules by kind": (lambda: LRP(rules={"linear": Epsilon()}), "pairs of a selector and a rule, got {'linear': Eps"),
    "one pair of a hook for a list of them": (
        lambda: Pointed().run_with_hooks(X, fwd_hooks=("hook_in", print)),
        "hooks are pairs of a name and a hook, [('hook_embed', hook)], got 'hook_in'",
    ),
    "a hook before its name": (
        lambda: Pointed().hooks(fwd_hooks=[(print, "hook_in")]),
        "got (<built-in function print>, 'hook_in')",
    ),
    "a method in the package above": (
        lambda: tdcache.IntegratedGradient,
        "module 'tdcache' has no attribute 'IntegratedGradient'; did you mean 'IntegratedGradients', in "
        "tdcache.attribution?",
    ),
}


@pytest.mark.parametrize(("wrong", "text"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_newcomer_is_told_what_to_type(wrong, text):
    with pytest.raises(Exception) as caught:  # noqa: PT011  the text below is stricter than any class
        wrong()
    assert text in str(caught.value.args[0])
    assert len(caught.value.args[0]) < 600


def test_the_spelling_of_transformer_lens_says_where_it_is_had():
    model = named_model.Transformer()
    caching = ActivationCaching("blocks.0.hook_resid_post", names=named_model.table(model))
    with pytest.raises(tdcache.CanonicalNameError) as caught, caching.prepare(model):
        pass
    assert "; print(table) shows the names that there are, and tdcache.names(model, style='tr" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            lambda model, x: (x, model, "a.acts"),
            "the model comes first, then data and path: got a Tensor as the model",
        ),
        (lambda model, x: (model, "a.acts", x), "path is the store's folder, after model and data: got a Tensor"),
    ],
    ids=["data first", "path before data"],
)
def test_arguments_of_a_harvest_in_another_order_are_named(arguments, message):
    with pytest.raises(SelectionError, match=f"^{message}"):
        harvest(*arguments(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3)), select="0")


def test_a_device_that_is_none_is_named_by_a_harvest_as_by_a_capture(tmp_path):
    with pytest.raises(ValueError, match=r"^device= is a torch\.device or the name of one, such as 'cuda:0'"):
        harvest(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3), tmp_path / "a.acts", select="0", device="gpu")


def test_a_layer_map_of_one_tensor_is_told_what_it_needs():
    with pytest.raises(ValueError, match=r"^a layer map needs scores by layer, such as td\['attr'\]"):
        plot.layer_map(torch.ones(2, 3))
