"""Splices in running models: sites, identities, edits, several at once, tuples, containers, restoring."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from model_state import state_of
from pipeline.written_out import Save, sparse_pair
from small_models import MLP, Pair, Residual, Tied
from tdcache import (
    Ablation,
    ActivationCaching,
    ActivationPatching,
    CompositeHookingContextFactory,
    Mean,
    Splice,
    Stack,
    TopK,
    UnfiredSiteWarning,
    cache_activations,
    select,
)
from tdcache.attribution import GradientXActivation
from tdcache.errors import (
    CaptureError,
    ContextError,
    EditError,
    HookSignatureError,
    InplaceModificationError,
    SelectionError,
)
from tdcache.pipeline import AtRows, AttachedPipeline, Dictionary, FwdBwdHooks, sparse_latents

EXACT = {"atol": 1e-10, "rtol": 0}  # float64 sums of some ten terms of order one
SITES = ["", ".latents", ".reconstruction", ".error"]


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.mlp(x)


class Blocks(nn.Module):
    """Blocks in a ModuleList that is iterated over."""

    def __init__(self, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def model():
    return Blocks().double()


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def pair():
    return sparse_pair(4, 9)


def paths_of(model):
    return [path for path, _ in model.named_modules() if "/" in path]


def test_the_sites_are_modules_of_the_model_while_it_is_open(model, pair):
    before = state_of(model)
    names = [name for name, _ in model.named_parameters()]
    with Splice(r"layers\.[12]\.mlp", pair[:2]).prepare(model):
        assert paths_of(model) == [f"layers.{layer}.mlp/sae{site}" for layer in (1, 2) for site in SITES]
        assert select(model, r".*/sae\.latents").paths == ("layers.1.mlp/sae.latents", "layers.2.mlp/sae.latents")
        assert model.get_submodule("layers.1.mlp/sae.latents") is not None
        assert [name for name, _ in model.named_parameters()] == list(model.state_dict()) == names
    assert state_of(model) == before


def test_the_autoencoders_parameters_stay_outside_of_the_model(model, x):
    dictionary = Dictionary(
        {"W_enc": torch.eye(4), "b_enc": torch.zeros(4), "W_dec": torch.eye(4), "b_dec": torch.zeros(4)}
    )
    names = list(model.state_dict())
    with Splice(r"layers\.0\.mlp", dictionary).prepare(model):
        assert list(model.state_dict()) == names
        assert not set(map(id, dictionary.parameters())) & set(map(id, model.parameters()))


def test_forward_and_input_gradient_are_identities_to_the_last_bit(model, x, pair):
    want = model(x)
    seed = torch.randn_like(want)
    (wanted,) = torch.autograd.grad(want, x, seed)
    with Splice(r"layers\.\d(\.mlp)?", pair[:2]).prepare(model) as hooked:
        got = hooked(x)
        assert torch.equal(got, want)
        (grad,) = torch.autograd.grad(got, x, seed)
    torch.testing.assert_close(grad, wanted, **EXACT)
    with Splice(r"layers\.2", pair[:2]).prepare(model), torch.no_grad():
        assert torch.equal(model(x), want)


def test_gradients_at_the_sites_are_the_formulas(model, x, pair):
    encode, decode, _, down = pair
    recipe = CompositeHookingContextFactory(
        Splice(r"layers\.1\.mlp", (encode, decode)), ActivationCaching(r"layers\.1\.mlp.*", directions=["fwd", "bwd"])
    )
    with recipe.prepare(model) as hooked:
        hooked(x).pow(2).sum().backward()
    fwd, bwd = hooked.cache["fwd"], hooked.cache["bwd"]
    y = model.layers[1].mlp(model.layers[0](x)).detach()
    path = "layers.1.mlp/sae"
    torch.testing.assert_close(fwd["layers.1.mlp"], y, **EXACT)
    torch.testing.assert_close(fwd[path], y, **EXACT)
    torch.testing.assert_close(fwd[f"{path}.latents"], encode(y), **EXACT)
    torch.testing.assert_close(fwd[f"{path}.reconstruction"], decode(encode(y)), **EXACT)
    torch.testing.assert_close(fwd[f"{path}.error"], y - decode(encode(y)), **EXACT)
    g = bwd["layers.1.mlp"]
    torch.testing.assert_close(bwd[f"{path}.latents"], g @ down.T, **EXACT)
    torch.testing.assert_close(bwd[f"{path}.reconstruction"], g, **EXACT)
    torch.testing.assert_close(bwd[f"{path}.error"], g, **EXACT)


def test_editing_latents_changes_the_output_by_the_decoded_change(model, x, pair):
    encode, decode, _, down = pair
    plain = model.layers[0].mlp(x).detach()
    z = encode(plain)
    for graph in (True, False):
        edit = AttachedPipeline(r".*/sae\.latents", lambda z: z * torch.arange(9.0))
        splice = Splice(r"layers\.0\.mlp", (encode, decode))
        with splice.prepare(model), edit.prepare(model), torch.set_grad_enabled(graph):
            got = model.layers[0].mlp(x)
    torch.testing.assert_close(got.detach() - plain, (z * torch.arange(9.0) - z) @ down, atol=1e-9, rtol=0)


def test_zeroing_the_error_leaves_the_reconstruction(model, x, pair):
    encode, decode, *_ = pair
    edit = AttachedPipeline(r".*/sae\.error", torch.zeros_like)
    with Splice(r"layers\.0\.mlp", (encode, decode)).prepare(model), edit.prepare(model):
        got = model.layers[0].mlp(x)
    torch.testing.assert_close(got, decode(encode(model.layers[0].mlp(x))), **EXACT)


def test_without_the_error_term_the_output_is_the_reconstruction(model, x, pair):
    encode, decode, *_ = pair
    splice = Splice(r"layers\.0\.mlp", (encode, decode), add_error=False)
    with splice.prepare(model), cache_activations(model, r".*/sae\.error") as cache:
        got = model.layers[0].mlp(x)
    y = model.layers[0].mlp(x)
    torch.testing.assert_close(got, decode(encode(y)), **EXACT)
    torch.testing.assert_close(cache["layers.0.mlp/sae.error"], (y - decode(encode(y))).detach(), **EXACT)


def test_an_edit_of_an_error_that_is_not_added_is_refused(model, x, pair):
    edit = AttachedPipeline(r".*/sae\.error", torch.zeros_like)
    complaint = pytest.raises(EditError, match="use add_error=True")
    with Splice(r"layers\.0\.mlp", pair[:2], add_error=False).prepare(model), edit.prepare(model), complaint:
        model(x)


def test_gradients_of_edits_flow_through_two_splices(model, x, pair):
    pipeline = FwdBwdHooks().append_fwd(lambda z: 1.5 * z)
    recipe = CompositeHookingContextFactory(
        Splice(r"layers\.(0|2)", pair[:2]), AttachedPipeline(r".*/sae\.latents", pipeline)
    )
    encode, decode, *_ = pair

    def twin(value):
        for number, layer in enumerate(model.layers):
            value = layer(value)
            if number != 1:
                z = encode(value)
                value = decode(1.5 * z) + value - decode(z)
        return value

    with recipe.prepare(model) as hooked:
        got = hooked(x)
        (grad,) = torch.autograd.grad(got.pow(2).sum(), x)
    want = twin(x)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(grad, torch.autograd.grad(want.pow(2).sum(), x)[0], atol=1e-8, rtol=1e-12)


def test_backward_from_a_latent_reaches_the_latents_below(model, x, pair):
    recipe = CompositeHookingContextFactory(
        Splice(r"layers\.\d", pair[:2]),
        ActivationCaching(r"layers\.2/sae\.latents", hold="live"),
        ActivationCaching(r"layers\.0/sae\.latents", directions=["bwd"]),
    )
    with recipe.prepare(model) as hooked:
        model(x)
        hooked.cache["layers.2/sae.latents"][..., 3].sum().backward()
    assert hooked.cache["layers.0/sae.latents"].any()


def test_reducers_and_sparse_captures_see_latents(model, x, pair):
    latents = r"layers\.1\.mlp/sae\.latents"
    recipe = CompositeHookingContextFactory(
        Splice(r"layers\.1\.mlp", pair[:2]),
        ActivationCaching(latents, reducer=Mean(), use_nested_keys=True),
        ActivationCaching(latents, reducer=TopK(2), cache=(top := TensorDict())),
        ActivationCaching(latents, callback=sparse_latents, directions=["fwd", "bwd"], cache=(sparse := TensorDict())),
        ActivationCaching(latents, directions=["fwd", "bwd"], cache=(dense := TensorDict())),
    )
    with recipe.prepare(model) as hooked:
        hooked(x).sum().backward()
    key = "layers.1.mlp/sae.latents"
    z = dense["fwd", key]
    torch.testing.assert_close(hooked.cache["fwd", key], z.mean(0))
    assert torch.equal(top[key, "values"], z.topk(2, dim=0).values)
    for direction in ("fwd", "bwd"):
        assert sparse[direction, key].layout == torch.sparse_coo
        assert torch.equal(sparse[direction, key].to_dense(), dense[direction, key])
    assert sparse["fwd", key]._nnz() == z.count_nonzero()


def test_sparse_latents_wants_a_tensor():
    with pytest.raises(CaptureError, match="no tensor came by in direction 'fwd'"):
        sparse_latents(output=None, direction="fwd")


def test_splices_of_several_autoencoders_by_path_and_by_composite(model, x):
    pairs = {f"layers.{layer}.mlp": sparse_pair(4, 5 + layer) for layer in range(3)}
    want = model(x)
    by_path = Splice(r"layers\.\d\.mlp", {path: pair[:2] for path, pair in pairs.items()})
    composite = CompositeHookingContextFactory(
        *(Splice(path.replace(".", r"\."), pair[:2]) for path, pair in pairs.items())
    )
    for recipe in (by_path, composite):
        with CompositeHookingContextFactory(recipe, ActivationCaching(r".*/sae\.latents")).prepare(model) as hooked:
            assert torch.equal(hooked(x), want)
        shapes = [tuple(value.shape) for value in hooked.cache.values()]
        assert shapes == [(5, 5), (5, 6), (5, 7)]
    with pytest.raises(SelectionError, match=r"selects 'layers\.1\.mlp', for which there is no autoencoder"):
        Splice(r"layers\.\d\.mlp", {"layers.0.mlp": pairs["layers.0.mlp"][:2]}).prepare(model, return_context=False)
    assert paths_of(model) == []


def test_two_splices_on_one_module_need_two_names(model, x, pair):
    first, clash = Splice(r"layers\.0", pair[:2]), Splice(r"layers\.[01]", pair[:2])
    with first.prepare(model):
        before = state_of(model)
        with pytest.raises(ContextError, match=r"there is a module 'layers\.0/sae' already; give one of the two"):
            clash.prepare(model).__enter__()
        assert state_of(model) == before
        with Splice(r"layers\.0", pair[:2], name="second").prepare(model) as hooked:
            assert {path.partition("/")[2].partition(".")[0] for path in paths_of(model)} == {"sae", "second"}
            hooked(x)


def test_a_splice_can_sit_on_the_latents_of_another(model, x, pair):
    inner = sparse_pair(9, 3)
    want = model(x)
    with (
        Splice(r"layers\.0", pair[:2]).prepare(model),
        Splice(r".*/sae\.latents", inner[:2], name="meta").prepare(model),
        cache_activations(model, r".*/meta\.latents") as cache,
    ):
        torch.testing.assert_close(model(x), want, **EXACT)
    assert list(cache.keys()) == ["layers.0/sae.latents/meta.latents"]


def test_splices_are_left_in_any_order(model, x, pair):
    before = state_of(model)
    one = Splice(r"layers\.0", pair[:2], name="one").prepare(model, return_context=False)
    two = Splice(r"layers\.[01]", pair[:2], name="two").prepare(model, return_context=False)
    one.restore()
    assert paths_of(model) == [f"layers.{layer}/two{site}" for layer in (0, 1) for site in SITES]
    two.restore()
    assert state_of(model) == before


class Wide(nn.Module):
    """Iterates over its own children."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "0"),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.ReLU()), "0.1"),
        (nn.Sequential(Block(), nn.Tanh()), "0.mlp.2"),
        (nn.Sequential(Block(), nn.Tanh()), "0"),
        (Blocks(), "layers.1"),
        (Blocks(), "layers.1.mlp.0"),
        (MLP(), ""),
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), ""),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_a_list_of_modules_that_is_run_does_not_run_the_splice(model, path):
    x, before = torch.randn(3, 4), state_of(model)
    want = model(x)
    made = dict(model.named_modules())[path](x) if path == "0" else None
    width = 8 if path.endswith("mlp.0") else 2 if isinstance(model, MLP) else 4
    encode, decode, *_ = sparse_pair(width, 6, torch.float32)
    recipe = CompositeHookingContextFactory(
        Splice(path.replace(".", r"\."), (encode, decode)), ActivationCaching(r".*/sae\.(latents|error)")
    )
    with recipe.prepare(model) as hooked:
        for _ in range(2):
            assert torch.equal(hooked(x), want)
        assert paths_of(model) == [f"{path}/sae{site}" for site in SITES]
        if not isinstance(model, nn.Sequential):
            assert all(len(each) == len(list(each)) for each in model.modules() if isinstance(each, nn.ModuleList))
        hooked.register_submodule_hook(f"{path}/sae.latents", lambda module, args, output: None).remove()
    if made is not None:
        assert torch.equal(hooked.cache["0/sae.latents"], encode(made))
    assert list(hooked.cache.keys()) == [f"{path}/sae.latents", f"{path}/sae.error"]
    assert state_of(model) == before


def test_a_list_keeps_its_length_and_its_last_member(model, pair):
    with Splice(r"layers\.\d", pair[:2]).prepare(model) as hooked:
        assert len(model.layers) == 3
        assert model.layers[-1] is model.layers[2]
        assert hooked.model.get_submodule("layers.2") is model.layers[-1]


def test_a_module_that_runs_all_its_children_is_told(x):
    model = Wide()
    complaint = pytest.raises(ContextError, match="'one/sae' was called by other code than its splice")
    with Splice("one", sparse_pair(4, 6, torch.float32)[:2]).prepare(model), complaint:
        model(x.float())


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_a_tuple_output_keeps_its_other_tensors(kind):
    model, x = Pair(kind), torch.randn(3, 4)
    encode, decode, *_ = sparse_pair(4, 6, torch.float32)
    left, right = model.inner.left(x), model.inner.right(x)
    with Splice("inner", (encode, decode), add_error=False).prepare(model) as hooked:
        torch.testing.assert_close(hooked(x), decode(encode(left)) + right)
    with Splice("inner", (encode, decode), add_error=False, pick="right" if kind is dict else 1).prepare(
        model
    ) as hooked:
        torch.testing.assert_close(hooked(x), left + decode(encode(right)))


def test_a_transcoder_reads_the_input_and_replaces_the_output(model, x):
    up, down = torch.randn(4, 9, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    transcoder = (lambda x: torch.relu(x @ up), lambda z: z @ down)
    want = model(x)
    for add_error in (True, False):
        recipe = CompositeHookingContextFactory(
            Splice(r"layers\.0\.mlp", transcoder, reads="input", add_error=add_error),
            ActivationCaching(r"layers\.0\.mlp/sae.*", directions=["fwd", "bwd"]),
        )
        with nullcontext() if add_error else pytest.warns(UnfiredSiteWarning, match="error'; no gradient"):
            hooked = recipe.prepare(model, return_context=False)
            got = hooked(x)
            got.sum().backward()
            hooked.restore()
        fwd = hooked.cache["fwd"]
        z = torch.relu(x @ up)
        torch.testing.assert_close(fwd["layers.0.mlp/sae.latents"], z.detach(), **EXACT)
        torch.testing.assert_close(fwd["layers.0.mlp/sae.error"], (model.layers[0].mlp(x) - z @ down).detach(), **EXACT)
        if add_error:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, model.layers[2](model.layers[1](x + z @ down)), **EXACT)


def test_the_gradient_of_a_transcoders_input_is_that_of_the_model(model, x):
    transcoder = sparse_pair(4, 9)
    (want,) = torch.autograd.grad(model(x).sum(), x)
    with Splice(r"layers\.\d\.mlp", transcoder[:2], reads="input").prepare(model):
        (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, want, **EXACT)


def test_a_transcoder_of_a_module_that_overwrites_its_input_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    complaint = pytest.raises(InplaceModificationError, match="'1' writes into its input, which is to be encoded")
    with Splice("1", sparse_pair(4, 6, torch.float32)[:2], reads="input").prepare(model), complaint:
        model(torch.randn(3, 4))


def test_a_module_of_two_names_is_spliced_once(x):
    model, pair = Tied().double(), sparse_pair(4, 6)
    with Splice("encode|decode", pair[:2], add_error=False).prepare(model) as hooked:
        assert paths_of(model) == [f"encode/sae{site}" for site in SITES]
        got = hooked(x)
    through = lambda x: pair[1](pair[0](model.encode(x)))  # noqa: E731
    torch.testing.assert_close(got, through(torch.tanh(through(x))))


def test_a_module_that_runs_twice_passes_its_splice_twice():
    model, x = Residual(), torch.randn(3, 4)
    want = model(x)
    recipe = CompositeHookingContextFactory(
        Splice("relu", sparse_pair(4, 6, torch.float32)[:2]), ActivationCaching(r"relu/sae\.latents", reducer=Stack())
    )
    with recipe.prepare(model) as hooked:
        assert torch.equal(hooked(x), want)
    assert hooked.cache["relu/sae.latents"].shape == (2, 3, 6)


def test_captures_go_on_after_a_pause_of_the_splice(model, x, pair):
    spliced = Splice(r"layers\.0", pair[:2]).prepare(model, return_context=False)
    with ActivationCaching(r".*/sae\.latents").prepare(model) as hooked:
        with spliced.hooking_context.paused():
            assert paths_of(model) == []
        model(2 * x)
        assert torch.equal(hooked.cache["layers.0/sae.latents"], pair[0](model.layers[0](2 * x)))
    spliced.restore()


@pytest.mark.parametrize("leave", ["normally", "by the body", "by the encoder", "by a stop"])
def test_leaving_restores_the_model_whatever_happened(leave, pair):
    model = nn.Sequential(Block().double(), nn.Tanh())
    x, before = torch.randn(5, 4, dtype=torch.float64), state_of(model)
    encode = (lambda x: 1 / 0) if leave == "by the encoder" else pair[0]
    recipe = [Splice(r"0|0\.mlp", (encode, pair[1]))]
    if leave == "by a stop":
        recipe.append(ActivationCaching(r"0/sae\.latents", stop_early=True))
    try:
        with CompositeHookingContextFactory(*recipe).prepare(model) as hooked:
            hooked(x)
            if leave == "by the body":
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert leave in ("by the body", "by the encoder")
    assert state_of(model) == before


def test_wrong_arguments_are_refused_when_the_recipe_is_made(pair):
    with pytest.raises(HookSignatureError, match=r"an object with encode\(\) and decode\(\)"):
        Splice("0", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="reads is 'output' or 'input', got 'in'"):
        Splice("0", pair[:2], reads="in")
    for name in ("", "a.b", "a/b"):
        with pytest.raises(ValueError, match="name stands after the slash"):
            Splice("0", pair[:2], name=name)
    with pytest.raises(SelectionError, match="not a valid regex"):
        Splice("(", pair[:2])


def test_a_selector_that_matches_nothing_names_the_nearest(model, pair):
    with pytest.raises(SelectionError, match=r"did you mean 'layers\.0'"):
        Splice(r"layer\.0", pair[:2]).prepare(model).__enter__()


def test_a_decoder_of_another_width_is_an_error(model, x, pair):
    with (
        Splice(r"layers\.0", (pair[0], lambda z: z)).prepare(model),
        pytest.raises(EditError, match=r"of shape \(5, 4\)"),
    ):
        model(x)


def test_the_recipe_serves_many_models_and_can_be_pickled_and_printed(x):
    eye = torch.eye(4)
    dictionary = Dictionary({"W_enc": eye, "b_enc": torch.zeros(4), "W_dec": eye, "b_dec": torch.zeros(4)})
    recipe = pickle.loads(pickle.dumps(Splice(r"layers\.0", dictionary, add_error=False)))
    assert repr(recipe) == "Splice('layers\\\\.0', add_error=False, name='sae')"
    for _ in range(2):
        model = MLP()
        with recipe.prepare(model) as hooked:
            hooked(x.float())
            assert "SpliceSite('layers.0/sae', add_error=False" in repr(model).replace("\n", "").replace("  ", "")
            assert repr(hooked.hooking_context).startswith("<open SpliceContext of Splice(")


def test_a_copy_of_the_model_that_is_made_inside_goes_on_alone(model, x, pair):
    want = model(x)
    with Splice(r"layers\.0", pair[:2]).prepare(model):
        copied = copy.deepcopy(model)
    assert torch.equal(copied(x), want)


def gpt2():
    return GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, bos_token_id=0, eos_token_id=0))


def llama():
    return LlamaModel(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=11,
        )
    )


def bert():
    return BertModel(
        BertConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=11)
    )


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (gpt2, r"h\.(?P<layer>\d+)(\.(mlp|attn))?"),
        (llama, r"layers\.(?P<layer>\d+)(\.(mlp|self_attn))?"),
        (bert, r"encoder\.layer\.(?P<layer>\d+)(\.(output|attention\.self))?"),
    ],
)
def test_real_transformers_are_spliced_at_blocks_attention_and_mlp(make, pattern):
    model, ids = make().eval().double(), torch.randint(11, (2, 5))
    before = state_of(model)
    encode, decode, _, down = sparse_pair(8, 20)
    want = model(ids).last_hidden_state
    paths = select(model, pattern).paths
    assert len(paths) == 6
    latents = Save()
    recipe = CompositeHookingContextFactory(
        Splice(pattern, (encode, decode)),
        ActivationCaching(r"[^/]*/sae(\.latents)?", directions=["fwd", "bwd"]),
        AttachedPipeline(rf"{pattern}/sae\.latents", latents),
    )
    with recipe.prepare(model) as hooked:
        got = hooked(ids).last_hidden_state
        assert torch.equal(got, want)
        got.pow(2).sum().backward()
    model.zero_grad()
    fwd, bwd = hooked.cache["fwd"], hooked.cache["bwd"]
    assert sorted(latents.seen) == [0, 1]
    for path in paths:
        torch.testing.assert_close(fwd[f"{path}/sae.latents"], encode(fwd[f"{path}/sae"]), **EXACT)
        torch.testing.assert_close(bwd[f"{path}/sae.latents"], bwd[f"{path}/sae"] @ down.T, **EXACT)
    after = state_of(model)
    assert after["modules"].keys() == before["modules"].keys()
    assert after["tensors"] == before["tensors"]


def test_ablating_by_rows_in_a_batch_equals_the_rows_one_by_one():
    model, ids = gpt2().eval().double(), torch.randint(11, (3, 5))
    pair = sparse_pair(8, 20)

    def run(ids, pipeline):
        recipe = CompositeHookingContextFactory(
            Splice(r"h\.0", pair[:2]), AttachedPipeline(r"h\.0/sae\.latents", pipeline)
        )
        with recipe.prepare(model) as hooked, torch.no_grad():
            return hooked(ids).last_hidden_state

    def zero(latent):
        def hook(z):
            z = z.clone()
            z[..., latent] = 0
            return z

        return hook

    def every(z):
        for row in range(3):
            z = AtRows(row, zero(row))(z)
        return z

    together = run(ids, every)
    for row in range(3):
        torch.testing.assert_close(together[row], run(ids[row : row + 1], zero(row))[0], **EXACT)


def test_ablation_patching_and_attribution_reach_the_latents_of_a_splice(model, x, pair):
    encode, decode, _, down = pair
    latents = r"layers\.2/sae\.latents"
    splice, plain = Splice(r"layers\.2", (encode, decode)), model(x).detach()
    z = encode(plain)

    with CompositeHookingContextFactory(splice, Ablation(latents, units=[3])).prepare(model) as hooked:
        ablated = hooked(x)
    torch.testing.assert_close(plain - ablated.detach(), z[:, 3, None] * down[3], **EXACT)

    other = 2 * x.detach()
    with CompositeHookingContextFactory(splice, ActivationCaching(latents)).prepare(model) as hooked:
        target = hooked(other)
    source = hooked.cache
    with CompositeHookingContextFactory(splice, ActivationPatching(latents, source=source)).prepare(model) as hooked:
        patched = hooked(x)
    torch.testing.assert_close((patched - plain).detach(), (encode(target) - z).detach() @ down, **EXACT)

    recipe = CompositeHookingContextFactory(splice, GradientXActivation(latents, target=1))
    with recipe.prepare(model) as hooked:
        scores = hooked(TensorDict(input=x.detach(), batch_size=[5]))["attr", "layers.2/sae.latents"]
    torch.testing.assert_close(scores, z * down[:, 1], **EXACT)


@pytest.mark.filterwarnings("ignore:Blocks is compiled, and runs eagerly:tdcache.TdcacheWarning")
@pytest.mark.parametrize("traced_before", [True, False])
def test_a_compiled_model_is_spliced_and_edited_whether_it_was_traced_before_or_not(traced_before):
    torch._dynamo.reset()
    model, x = Blocks(2), torch.randn(3, 4)
    encode, decode, *_ = sparse_pair(4, 9, torch.float32)
    want, compiled = model(x), torch.compile(model, backend="eager")
    if traced_before:
        compiled(x)
    recipe = CompositeHookingContextFactory(
        Splice(r"layers\.\d", (encode, decode)),
        AttachedPipeline(r"layers\.1/sae\.reconstruction", lambda r: r + 1),
        ActivationCaching(r".*/sae\.latents"),
    )
    with recipe.prepare(compiled) as hooked:
        torch.testing.assert_close(compiled(x), want + 1)
    assert len(hooked.cache.keys()) == 2
    assert paths_of(compiled) == []
    torch._dynamo.reset()


@pytest.mark.parametrize("reads", ["output", "input"])
def test_of_a_tensordict_module_what_it_writes_is_spliced(reads):
    linear, x = nn.Linear(4, 4), torch.randn(3, 4)
    model = TensorDictSequential(
        TensorDictModule(linear, in_keys=["x"], out_keys=["h"]),
        TensorDictModule(nn.Tanh(), in_keys=["h"], out_keys=["y"]),
    )
    pair = (lambda value: 2 * value, lambda latents: 3 * latents)
    with Splice(r"module\.0", pair, add_error=False, reads=reads).prepare(model) as hooked:
        data = TensorDict(a=torch.zeros(3, 4), x=x)
        assert hooked(data) is data
    expected = 6 * linear(x) if reads == "output" else 6 * x
    assert torch.equal(data["x"], x)
    torch.testing.assert_close(data["h"], expected)
    torch.testing.assert_close(data["y"], torch.tanh(expected))
