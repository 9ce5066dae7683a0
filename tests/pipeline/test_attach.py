"""Pipelines on the module paths of models: what is bound, order, inputs, tuples, errors, restoring."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2Model

from model_state import state_of
from pipeline.written_out import Save, sparse_pair
from small_models import MLP, Pair, Residual, Tied, by_hand, output_gradients
from tdcache import ActivationCaching, CompositeHookingContextFactory, HookingContextFactory
from tdcache.errors import (
    CaptureError,
    EditError,
    HookSignatureError,
    InplaceModificationError,
    PathError,
    SelectionError,
)
from tdcache.pipeline import (
    AtCalls,
    AtLayers,
    AttachedPipeline,
    AutoencoderHooks,
    FwdBwdHooks,
    Hooks,
    TransformerHooks,
    attach,
    stop_gradient,
)

LAYERS = r"layers\.(?P<layer>\d+)"


def double(x):
    return 2 * x


def test_a_pipeline_reads_and_edits_outputs_and_gradients_in_order(model, x):
    forward, backward = Save(), Save()
    pipeline = FwdBwdHooks().append_fwd(double).append_fwd(forward).append_bwd(double).append_bwd(backward)
    with attach(model, LAYERS, pipeline):
        model(x).sum().backward()
    assert list(forward.seen) == [0, 1, 2]
    assert list(backward.seen) == [2, 1, 0]

    def twin(value):  # the same model with the edits written out
        kept = []
        for layer in model.layers:
            value = 2 * layer(value)
            value.retain_grad()
            value.register_hook(double)
            kept.append(value)
            value = nn.functional.gelu(value)
        return kept, model.head(model.act(value))

    kept, y = twin(x)
    y.sum().backward()
    for layer, value in enumerate(kept):
        torch.testing.assert_close(forward.seen[layer], value.detach())
        torch.testing.assert_close(backward.seen[layer], value.grad)


def test_what_is_read_equals_hooks_and_autograd_by_hand(model, x):
    paths = [f"layers.{layer}" for layer in range(3)]
    forward, backward = Save(), Save()
    with attach(model, LAYERS, FwdBwdHooks().append_fwd(forward).append_bwd(backward)) as hooked:
        hooked(x).sum().backward()
    outputs, gradients = by_hand(model, paths, lambda: model(x)), output_gradients(model, paths, lambda: model(x).sum())
    for layer, path in enumerate(paths):
        assert torch.equal(forward.seen[layer], outputs[path][0])
        torch.testing.assert_close(backward.seen[layer], gradients[path])


def test_named_groups_path_call_and_forward_are_in_scope(model, x):
    seen = []
    pattern = r"(?P<kind>layers|head)(\.(?P<layer>\d+))?"
    with attach(model, pattern, lambda x, **scope: seen.append(scope)) as hooked:
        hooked(x)
        hooked(x)
    one = [{"path": f"layers.{layer}", "kind": "layers", "layer": layer} for layer in range(3)]
    one += [{"path": "head", "kind": "head"}]
    assert seen == [{**scope, "call": 0, "forward": forward} for forward in (0, 1) for scope in one]


def test_conditions_by_layer_select_modules(model, x):
    seen = Save()
    with attach(model, LAYERS, AtLayers([0, 2], seen)):
        model(x)
    assert list(seen.seen) == [0, 2]


def test_calls_of_one_module_are_counted_within_each_forward(x):
    model, seen = Residual(), []
    with attach(
        model, "relu", Hooks(AtCalls(1, double), lambda x, call, forward: seen.append((forward, call)))
    ) as hooked:
        got = hooked(x)
        hooked(x)
    want = 2 * torch.relu(model.second(torch.relu(model.first(x))) + x)
    torch.testing.assert_close(got, want)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_module_of_two_names_is_edited_once_a_call(x):
    model = Tied()
    with attach(model, ".*", double) as hooked:
        got = hooked(x)
    torch.testing.assert_close(got, 2 * model.encode(torch.tanh(2 * model.encode(x))))


def test_captures_at_the_same_site_see_the_edited_value_and_the_edited_gradient(model, x):
    pipeline = FwdBwdHooks().append_fwd(double).append_bwd(lambda grad: 10 * grad)
    caching = ActivationCaching(r"layers\.1", directions=["fwd", "bwd"])
    edits = AttachedPipeline(r"layers\.1", pipeline)
    for first, second in ((caching, edits), (edits, caching)):
        with CompositeHookingContextFactory(first, second).prepare(model) as hooked:
            hooked(x).sum().backward()
        cache = hooked.cache
        before = nn.functional.gelu(model.layers[0](x))
        torch.testing.assert_close(cache["fwd", "layers.1"], 2 * model.layers[1](before).detach())
        plain = 2 * model.layers[1](before)
        (grad,) = torch.autograd.grad(
            model.head(model.act(nn.functional.gelu(model.layers[2](nn.functional.gelu(plain))))).sum(), plain
        )
        torch.testing.assert_close(cache["bwd", "layers.1"], 10 * grad)


def test_inputs_positional_and_by_keyword(x):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x, scale=torch.full((4,), 3.0))

    class Inner(nn.Module):
        def forward(self, x, *, scale):
            return x * scale

    model = Named()
    for pick, want in ((None, 6 * x), (0, 6 * x), ("scale", 6 * x)):
        with attach(model, "inner", double, direction="fwd_pre", pick=pick) as hooked:
            torch.testing.assert_close(hooked(x), want)
    with attach(model, "inner", lambda scale: scale + 1, direction="fwd_pre", pick="scale"):
        torch.testing.assert_close(model(x), 4 * x)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_one_tensor_of_a_structure_is_edited_and_the_rest_kept(x, kind):
    model = Pair(kind)
    left, right = model.inner.left(x), model.inner.right(x)
    with attach(model, "inner", double):
        torch.testing.assert_close(model(x), 2 * left + right)
    with attach(model, "inner", double, pick="right" if kind is dict else 1):
        torch.testing.assert_close(model(x), left + 2 * right)


def test_tensordict_modules_are_edited_at_what_they_write(x):
    linear = nn.Linear(4, 4)
    model = TensorDictSequential(
        TensorDictModule(linear, in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.Tanh(), in_keys=["h"], out_keys=["y"]),
    )
    with attach(model, r"module\.0", double) as hooked:
        data = hooked(TensorDict(x=x))
    torch.testing.assert_close(data["y"], torch.tanh(2 * linear(x)))


def test_an_autoencoder_at_module_paths():
    model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, bos_token_id=0, eos_token_id=0)).eval()
    ids, latents = torch.randint(11, (2, 5)), Save()
    encode, decode, *_ = sparse_pair(8, 20, torch.float32)
    pipeline = AutoencoderHooks(encode, decode, add_error=True)
    pipeline.latents.append_fwd(latents)
    want = model(ids).last_hidden_state
    with attach(model, r"h\.(?P<layer>\d+)\.mlp", pipeline) as hooked:
        assert torch.equal(hooked(ids).last_hidden_state, want)
    outputs = by_hand(model, ["h.0.mlp", "h.1.mlp"], lambda: model(ids))
    for layer in (0, 1):
        assert torch.equal(latents.seen[layer], encode(outputs[f"h.{layer}.mlp"][0]))


def test_the_places_of_a_tree_go_where_a_mapping_says(model, x):
    forward, logits = Save(), Save()
    tree = TransformerHooks().append_to_path("mlp.pre_act.fwd", forward).append_to_path("logits.fwd", logits)
    with attach(model, {"mlp.pre_act": LAYERS, "logits": "head"}, tree) as hooked:
        y = hooked(x)
    assert list(forward.seen) == [0, 1, 2]
    assert torch.equal(logits.seen[None], y)


def test_a_tree_without_a_mapping_is_refused_and_so_are_its_branches(model):
    with pytest.raises(
        HookSignatureError, match=r"the pipeline is TransformerHooks, which cannot be called.*'mlp\.pre_act'"
    ):
        attach(model, LAYERS, TransformerHooks())
    with pytest.raises(HookSignatureError, match="'mlp' is MLPHooks, which cannot be called"):
        attach(model, {"mlp": LAYERS}, TransformerHooks())
    with pytest.raises(HookSignatureError, match="a mapping of names to selectors is for a HookCollection"):
        attach(model, {"mlp": LAYERS}, Hooks())
    with pytest.raises(PathError, match=r"did you mean 'mlp\.pre_act"):
        attach(model, {"mlp.pre_acts.fwd": LAYERS}, TransformerHooks())


def test_a_wrong_argument_is_refused_before_anything_is_entered(model):
    with pytest.raises(HookSignatureError, match="attached to 'fwd' or 'fwd_pre', got 'bwd'"):
        attach(model, LAYERS, double, direction="bwd")
    with pytest.raises(HookSignatureError, match="pick= must say where"):
        attach(model, LAYERS, double, pick=lambda output: output)
    with pytest.raises(HookSignatureError, match="cannot be called as x -> x"):
        attach(model, LAYERS, 3)
    with pytest.raises(SelectionError, match=r"did you mean 'layers\.0'"), attach(model, "layer.0", double):
        pass


def test_a_group_that_the_pipeline_has_bound_itself_is_an_error_that_leaves_the_model(model):
    before = state_of(model)
    with (
        pytest.raises(ValueError, match="Hooks has layer=7 bound already"),
        attach(model, LAYERS, Hooks().bind(layer=7)),
    ):
        pass
    assert state_of(model) == before


def test_a_gradient_hook_under_no_grad_is_an_error_that_names_the_path(model, x):
    complaint = pytest.raises(
        CaptureError, match=r"at 'layers\.0' would never be called: the forward runs without grad"
    )
    with attach(model, LAYERS, FwdBwdHooks().append_bwd(double)), torch.no_grad(), complaint:
        model(x)


def test_what_a_hook_makes_must_fit(model, x):
    complaint = pytest.raises(EditError, match=r"the replacement at 'layers\.0' does not fit")
    with attach(model, r"layers\.0", lambda x: x[:, :2]), complaint:
        model(x)


def test_writing_into_an_output_that_is_the_modules_input_is_an_error(x):
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    complaint = pytest.raises(InplaceModificationError, match="a hook at '1' wrote into the output in place")
    with attach(model, "1", lambda x: x.zero_()), torch.no_grad(), complaint:
        model(x)
    with attach(model, "0", lambda x: x.zero_()), torch.no_grad():
        assert not model(x).any()


def test_a_stop_cuts_the_gradient_at_the_path(model, x):
    with attach(model, r"layers\.1", stop_gradient):
        model(x).sum().backward()
    assert model.layers[0].weight.grad is None
    assert model.layers[2].weight.grad is not None


def failing(x):
    raise KeyError("in the hook")


@pytest.mark.parametrize("hook", [double, failing])
def test_leaving_restores_the_model_also_after_an_exception(model, x, hook):
    before = state_of(model)
    with attach(model, LAYERS, double):
        model(x)
    assert state_of(model) == before

    def body():
        with attach(model, LAYERS, hook):
            model(x)
            raise KeyError("in the body")

    with pytest.raises(KeyError, match="in the hook" if hook is failing else "in the body"):
        body()
    assert state_of(model) == before


def test_a_failed_entry_leaves_nothing(model):
    before = state_of(model)
    tree = TransformerHooks()
    with pytest.raises(SelectionError), attach(model, {"mlp.pre_act": LAYERS, "logits": "nowhere"}, tree):
        pass
    assert state_of(model) == before


def test_a_paused_pipeline_does_nothing(model, x):
    want = model(x)
    with attach(model, LAYERS, double) as hooked:
        with hooked.hooking_context.paused():
            assert torch.equal(model(x), want)
        assert not torch.equal(model(x), want)


def test_the_recipe_is_a_factory_for_many_models_and_can_be_pickled(x):
    recipe = pickle.loads(pickle.dumps(AttachedPipeline(LAYERS, Hooks(double))))
    assert isinstance(recipe, HookingContextFactory)
    for _ in range(2):
        model = MLP()
        plain = model(x)
        with recipe.prepare(model) as hooked:
            assert hooked.model is model
            assert not torch.equal(hooked(x), plain)
    assert repr(recipe) == "AttachedPipeline('layers\\\\.(?P<layer>\\\\d+)', Hooks()\n    double)"


def test_edits_take_part_in_the_recomputation_of_a_checkpoint(x):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = Checkpointed()
    x.requires_grad_()
    with attach(model, r"inner\.0", AtCalls(0, double)):
        (got,) = torch.autograd.grad(model(x).sum(), x)
    (want,) = torch.autograd.grad(torch.tanh(2 * model.inner[0](x)).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pick", [(0, 1), ("values", 1), -1, (-1, 1)])
def test_an_argument_inside_a_tuple_is_edited(pick, x):
    class Sum(nn.Module):
        def forward(self, values):
            return values if isinstance(values, torch.Tensor) else values[0] + values[1]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Sum()

        def forward(self, x):
            given = (x, 3 * x) if isinstance(pick, tuple) else x
            return self.inner(values=given) if isinstance(pick, tuple) and pick[0] == "values" else self.inner(given)

    with attach(Outer(), "inner", double, direction="fwd_pre", pick=pick) as hooked:
        torch.testing.assert_close(hooked(x), 7 * x if isinstance(pick, tuple) else 2 * x)


def test_the_gradient_at_an_output_is_the_one_that_a_cache_keeps_other_uses_included(model, x):
    kept, grads = [], []
    pipeline = FwdBwdHooks().append_fwd(kept.append).append_bwd(grads.append)
    with CompositeHookingContextFactory(
        AttachedPipeline(r"layers\.1", pipeline), ActivationCaching(r"layers\.1", directions=["bwd"])
    ).prepare(model) as hooked:
        (hooked(x).sum() + 3 * kept[0].sum()).backward()
    assert torch.equal(grads[0], hooked.cache["layers.1"])


def test_of_two_pipelines_at_one_site_the_later_sees_the_gradient_first(model, x):
    seen = []
    first = FwdBwdHooks().append_bwd(lambda grad: seen.append(("first", grad.clone())))
    second = (
        FwdBwdHooks().append_bwd(lambda grad: seen.append(("second", grad.clone()))).append_bwd(lambda grad: 2 * grad)
    )
    with attach(model, r"layers\.1", first), attach(model, r"layers\.1", second):
        model(x).sum().backward()
    assert [name for name, _ in seen] == ["second", "first"]
    assert torch.equal(seen[1][1], 2 * seen[0][1])


def test_the_gradient_at_a_module_of_two_arguments_is_watched():
    class Product(nn.Module):
        def forward(self, left, right):
            return left * right

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = Product()

        def forward(self, x):
            return self.product(x, torch.full_like(x, 3.0))

    grads, x = [], torch.ones(2, 3, requires_grad=True)
    model = Root()
    with attach(model, "product", FwdBwdHooks().append_bwd(grads.append)):
        (2 * model(x)).sum().backward()
    assert len(grads) == 1
    assert torch.equal(grads[0], torch.full((2, 3), 2.0))


def test_a_handed_on_input_keeps_its_other_gradients_out_of_the_pipeline():
    grads, x = [], torch.ones(2, 3, requires_grad=True)
    model = nn.Sequential(nn.Identity(), nn.Identity())
    with attach(model, "1", FwdBwdHooks().append_bwd(grads.append)):
        (model(x).sum() + 5 * x.sum()).backward()
    assert torch.equal(grads[0], torch.ones(2, 3))
    assert torch.equal(x.grad, torch.full((2, 3), 6.0))


@pytest.mark.parametrize("asks", [False, True])
def test_hooks_on_gradients_know_which_call_it_was(asks):
    linear = nn.Linear(3, 3)
    model, seen = nn.Sequential(linear, nn.ReLU(), linear), []
    note = (lambda grad, call, forward: seen.append((forward, call))) if asks else (lambda grad: seen.append(None))
    with attach(model, "0", FwdBwdHooks().append_bwd(note)):
        for _ in range(2):
            model(torch.ones(2, 3)).sum().backward()
    assert seen == ([(0, 1), (0, 0), (1, 1), (1, 0)] if asks else [None] * 4)
