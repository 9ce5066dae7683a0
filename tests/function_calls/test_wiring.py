"""Tests of calls inside forwards as sites of captures, interventions, runs and select, on small transformers."""

import copy
import threading

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import tdcache
from call_models import Attention, Block, Chain
from model_state import state_of
from tdcache import (
    Ablation,
    ActivationCaching,
    ActivationPatching,
    CaptureError,
    DirectionError,
    HookedModule,
    PathError,
    ResumeFrom,
    SelectionError,
    SteeringVectors,
    UnfiredSiteWarning,
    select,
)
from tdcache.function_calls import CallSite, attach_attention, calls
from tdcache.introspect import function_mode_count
from tdcache.reducers import Stack

transformers = pytest.importorskip("transformers")

GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
FAMILIES = {
    "GPT2": (GPT2, r"h\.(?P<layer>\d)\.attn"),
    "Llama": ({**SMALL, "num_key_value_heads": 2}, r"layers\.(?P<layer>\d)\.self_attn"),
    "Bert": (SMALL, r"encoder\.layer\.(?P<layer>\d)\.attention\.self"),
}
IDS = torch.arange(1, 11).reshape(2, 5)


def build(family, kernel, kind="Model"):
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family][0], attn_implementation=kernel)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}{kind}")(config).eval()


@pytest.fixture(params=["sdpa", "eager"])
def kernel(request):
    return request.param


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def paths_of(family, count=2):
    pattern = FAMILIES[family][1]
    return [pattern.replace(r"(?P<layer>\d)", str(at)).replace("\\", "") for at in range(count)]


def is_plain(model):
    return function_mode_count() == 0 and not any("forward" in module.__dict__ for module in model.modules())


def test_patterns_equal_the_attentions_that_the_eager_twin_returns(family, kernel):
    model = build(family, kernel)
    expected = build(family, "eager")(IDS, output_attentions=True).attentions
    before = model(IDS).last_hidden_state
    with ActivationCaching(FAMILIES[family][1] + "::pattern").prepare(model) as hooked:
        output = hooked(IDS).last_hidden_state
    assert torch.equal(output, before)
    for path, attention in zip(paths_of(family), expected, strict=True):
        torch.testing.assert_close(hooked.cache[f"{path}::pattern"], attention, atol=2e-6, rtol=0)
    assert is_plain(model)


def test_patterns_are_stacked_by_a_group_of_the_path_part(family, kernel):
    model = build(family, kernel)
    with ActivationCaching(FAMILIES[family][1] + "::pattern", stack_by="layer").prepare(model) as hooked:
        hooked(IDS)
        (key,) = hooked.cache.keys()
        assert key.endswith("::pattern")
        assert hooked.cache[key].shape == (2, 2, 4, 5, 5)


def test_a_head_ablated_at_its_pattern_equals_a_copy_whose_output_projection_lacks_it(family, kernel):
    model, size = build(family, kernel), 8
    edited = copy.deepcopy(model)
    path = paths_of(family)[0]
    projection = {"GPT2": "c_proj", "Llama": "o_proj"}.get(family)
    if projection is None:  # BERT projects in a module beside it
        weight = edited.encoder.layer[0].attention.output.dense.weight
    else:
        weight = edited.get_submodule(f"{path}.{projection}").weight
    with torch.no_grad():
        (weight if family == "GPT2" else weight.T)[size : 2 * size] = 0
    with Ablation(f"{path}::pattern".replace(".", r"\."), heads=(4, [1])).prepare(model) as hooked:
        output = hooked(IDS).last_hidden_state
    torch.testing.assert_close(output, edited(IDS).last_hidden_state, atol=2e-6, rtol=1e-5)


def test_gradients_to_patterns_equal_those_that_autograd_gives_the_eager_twin(family, kernel):
    model, twin = build(family, kernel), build(family, "eager")
    result = twin(IDS, output_attentions=True)
    expected = torch.autograd.grad(result.last_hidden_state.pow(2).sum(), result.attentions)
    with ActivationCaching(FAMILIES[family][1] + "::pattern", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(IDS).last_hidden_state.pow(2).sum().backward()
    for path, grad in zip(paths_of(family), expected, strict=True):
        torch.testing.assert_close(hooked.cache["bwd", f"{path}::pattern"], grad, atol=1e-5, rtol=1e-4)


def test_every_place_of_an_attention_call_fits_together(kernel):
    model = build("Llama", kernel)
    with ActivationCaching(r"layers\.1\.self_attn::(q|k|v|scores|pattern|z)").prepare(model) as hooked:
        hooked(IDS)
    place = {name: hooked.cache[f"layers.1.self_attn::{name}"] for name in ("q", "k", "v", "scores", "pattern", "z")}
    torch.testing.assert_close(place["scores"].softmax(-1), place["pattern"], atol=2e-6, rtol=0)
    v = place["v"] if place["v"].shape[1] == 4 else place["v"].repeat_interleave(2, 1)
    torch.testing.assert_close(place["pattern"] @ v, place["z"], atol=2e-6, rtol=0)


def test_arguments_are_picked_by_the_names_of_the_functions_parameters():
    model, x = Block(), torch.randn(2, 8)
    kept = {}
    model.up.register_forward_hook(lambda module, args, output: kept.update(up=output))
    model.down.register_forward_hook(lambda module, args, output: kept.update(down=output))
    for selector, pick, name in (("::gelu", "input", "up"), ("::add", "other", "down"), ("::add", 1, "down")):
        with ActivationCaching(selector, directions=["fwd_pre"], pick=pick).prepare(model) as hooked:
            hooked(x)
        assert torch.equal(hooked.cache[selector], kept[name])


def test_reducers_index_hold_and_repeated_calls_work_as_at_modules():
    model, x = Chain(), torch.randn(2, 8)
    with ActivationCaching(r"layers\.1::gelu", reducer=Stack(), index=(..., 0), hold="snapshot").prepare(
        model
    ) as hooked:
        hooked(x)
        hooked(-x)
    assert hooked.cache["layers.1::gelu"].shape == (2, 2)


def test_each_forward_replaces_the_entries_of_the_one_before():
    class Sometimes(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x.abs()

    model = Sometimes()
    with ActivationCaching("::(relu|abs)").prepare(model) as hooked:
        hooked(torch.ones(2))
        assert list(hooked.cache.keys()) == ["::relu"]
        hooked(-torch.ones(2))
        assert list(hooked.cache.keys()) == ["::abs"]
        hooked(torch.ones(2))
        assert list(hooked.cache.keys()) == ["::relu"]


def test_modules_and_calls_are_captured_together():
    model, x = Chain(), torch.randn(2, 8)
    with ActivationCaching([r"layers\.0", r"layers\.0::add", "::mul"]).prepare(model) as hooked:
        output = hooked(x)
    assert torch.equal(hooked.cache["layers.0"], hooked.cache["layers.0::add"])
    assert torch.equal(hooked.cache["::mul"], output)


def test_a_call_that_two_selectors_mean_is_captured_once(recwarn):
    model = Chain()
    with ActivationCaching([r"layers\.0::gelu", r"layers\.0::g.*"]).prepare(model) as hooked:
        hooked(torch.randn(2, 8))
    assert list(hooked.cache.keys()) == ["layers.0::gelu"]
    assert not recwarn.list


def test_a_callback_is_called_as_at_modules():
    seen = []

    def callback(module, args, output, key, direction):
        seen.append((type(module), key, direction))
        return output * 2

    with ActivationCaching(r"layers\.0::gelu", callback=callback).prepare(Chain()) as hooked:
        hooked(torch.randn(2, 8))
    assert seen == [(Block, "layers.0::gelu", "fwd")]


def test_the_forward_stops_after_the_last_call():
    model, ran = Chain(), []
    model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    with ActivationCaching(r"layers\.0::gelu", stop_early=True).prepare(model) as hooked:
        assert hooked(torch.randn(2, 8)) is None
    assert "layers.0::gelu" in hooked.cache.keys()  # noqa: SIM118
    assert ran == []
    assert is_plain(model)


def test_stopping_early_needs_a_name_that_is_written_out():
    with (
        pytest.raises(CaptureError, match=r"which calls .* means is not known before the forward has run"),
        ActivationCaching(r"layers\.0::g.*", stop_early=True).prepare(Chain()),
    ):
        pass


def test_a_call_that_no_module_made_is_reported_with_what_they_call():
    with (
        pytest.warns(
            UnfiredSiteWarning,
            match=r"'layers.*::gelo' means a call that none of its 3 modules made: layers.0 calls 'gelu', 'add'",
        ),
        ActivationCaching(r"layers\.\d::gelo").prepare(Chain()) as hooked,
    ):
        hooked(torch.randn(2, 8))
    with (
        pytest.warns(UnfiredSiteWarning, match=r"::gelo' means a call"),
        Ablation(r"layers\.\d::gelo").prepare(Chain()) as hooked,
    ):
        hooked(torch.randn(2, 8))


def test_a_steered_call_equals_one_edited_by_hand():
    model, x, vector = Block(), torch.randn(2, 8), torch.randn(16)
    by_hand = x + model.down(torch.nn.functional.gelu(model.up(model.norm(x))) + vector)
    with SteeringVectors("::gelu", vector).prepare(model) as hooked:
        assert torch.equal(hooked(x), by_hand)


def test_patterns_of_one_run_are_patched_into_another(kernel):
    model, other = build("GPT2", kernel), IDS.flip(1)
    selector = r"h\.\d\.attn::(pattern|v)"
    with ActivationCaching(selector).prepare(model) as hooked:
        hooked(other)
    patching, capture = ActivationPatching(selector, hooked.cache), ActivationCaching(selector)
    with patching.prepare(model) as patched, capture.prepare(model) as second:
        patched(IDS)
    for key, value in hooked.cache.items():
        assert torch.equal(second.cache[key], value)


def test_a_second_input_is_patched_with_the_values_of_the_first():
    model = Chain()
    data = TensorDict({"input": torch.randn(2, 8), "patched": {"input": torch.randn(2, 8)}}, [2])
    with ActivationPatching("::mul").prepare(model) as hooked:
        data = hooked(data)
    assert torch.equal(data["output"], data["patched", "output"])


def test_a_run_gets_and_sets_at_calls(kernel):
    model = build("GPT2", kernel)
    hooked = HookedModule.from_module(model)
    with hooked.run(IDS) as run:
        pattern = run.get("h.0.attn::pattern")
        run.set("h.1.attn::pattern", pattern)
        seen = run.get("h.1.attn::pattern")
    assert torch.equal(seen.resolve(), pattern.resolve())
    assert list(run.cache.keys()) == ["h.0.attn::pattern_output", "h.1.attn::pattern_output"]
    assert is_plain(model)


def test_what_takes_modules_only_refuses_calls():
    with pytest.raises(SelectionError, match="only modules can be selected here"):
        tdcache.MultiHookManager(r"layers\.0::gelu").select(Chain())
    with pytest.raises(PathError, match="names a call inside a forward, and a module is needed here"):
        ResumeFrom("layers.0::gelu", torch.zeros(2, 16)).prepare(Chain()).open()


def test_directions_that_a_call_does_not_have_are_refused():
    with pytest.raises(DirectionError, match="has no arguments of its own"):
        ActivationCaching("::pattern", directions=["grad_in"])
    with pytest.raises(DirectionError, match="is a value inside an attention call and has no arguments of its own"):
        ActivationCaching("::pattern", directions=["fwd_pre"])


def run_and_raise(model):
    model(IDS)
    raise RuntimeError("mine")


def test_a_softmax_that_is_edited_is_the_pattern_that_is_read():
    model = build("GPT2", "eager")
    with (
        Ablation(r"h\.0\.attn::softmax", heads=(4, [1])).prepare(model),
        ActivationCaching(r"h\.0\.attn::(softmax|pattern)").prepare(model) as hooked,
    ):
        hooked(IDS)
    assert not hooked.cache["h.0.attn::pattern"][:, 1].any()
    assert torch.equal(hooked.cache["h.0.attn::pattern"], hooked.cache["h.0.attn::softmax"])


def test_the_model_is_restored_after_an_exception(kernel):
    model = build("Llama", kernel)
    before, expected = state_of(model), model(IDS).last_hidden_state
    with (
        pytest.raises(RuntimeError, match="mine"),
        ActivationCaching(r"layers\.\d\.self_attn::(pattern|add|mul)").prepare(model) as hooked,
        Ablation(r"layers\.0\.self_attn::pattern").prepare(hooked) as inner,
    ):
        run_and_raise(inner)
    assert state_of(model) == before
    assert torch.equal(model(IDS).last_hidden_state, expected)
    assert is_plain(model)


def test_nested_contexts_see_edits_and_pauses_silence_them(kernel):
    model = build("GPT2", kernel)
    plain = model(IDS).last_hidden_state
    ablation = Ablation(r"h\.0\.attn::pattern").prepare(model)
    with ActivationCaching(r"h\.0\.attn::pattern").prepare(model) as hooked, ablation:
        hooked(IDS)
        assert not hooked.cache["h.0.attn::pattern"].any()
        with ablation.paused():
            assert torch.equal(hooked(IDS).last_hidden_state, plain)
            assert hooked.cache["h.0.attn::pattern"].any()
        hooked(IDS)
        assert not hooked.cache["h.0.attn::pattern"].any()


def test_another_threads_context_sees_no_calls_of_this_one():
    model, seen = Chain(), {}
    barrier = threading.Barrier(2)

    def work(number):
        x = torch.full((1, 8), float(number))
        with ActivationCaching(r"layers\.0::add").prepare(model) as hooked:
            barrier.wait()
            seen[number] = (hooked(x), hooked.cache["layers.0::add"].clone())
            barrier.wait()

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (1, 2):
        expected = model.layers[0](torch.full((1, 8), float(number)))
        torch.testing.assert_close(seen[number][1], expected, atol=1e-6, rtol=0)


def test_generate_stacks_the_patterns_of_every_step(kernel):
    model = build("GPT2", kernel, "LMHeadModel")
    expected = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    selector = r"transformer\.h\.0\.attn::pattern"
    with ActivationCaching(selector, index=(..., -1, 0), reducer=Stack()).prepare(model) as hooked:
        tokens = hooked.model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected)
    assert hooked.cache["transformer.h.0.attn::pattern"].shape == (tokens.shape[1] - 5, 2, 4)


def test_select_shows_the_calls_of_one_forward_for_every_form_of_inputs():
    model, x = Attention(), torch.randn(1, 3, 32)
    for inputs in (x, (x,), {"x": x}):
        table = select(model, "::.*", inputs)
        assert "::pattern" in table.sites
        assert "scaled_dot_product_attention" in str(table)
    assert select(model, "::scores|pattern", x).sites == ("::scores", "::pattern")
    assert calls(model, "", x).sites == select(model, "::.*", x).sites


def test_select_without_inputs_says_what_is_not_known():
    found = select(Chain(), r"layers\.\d::gelu")
    assert found.paths == ("layers.0", "layers.1", "layers.2")
    assert "is known once a forward has run: select(model, pattern, inputs) runs one" in repr(found)
    with pytest.raises(SelectionError, match="inputs= are for seeing the calls inside forwards"):
        select(Chain(), "layers.0", torch.zeros(1, 8))


def test_the_gradient_of_a_function_is_that_of_its_result_alone():
    model, x = Block(), torch.randn(2, 8)
    with ActivationCaching("::gelu", directions=["fwd", "bwd"], hold="live").prepare(model) as hooked:
        loss = hooked(x).pow(2).sum()
        (expected,) = torch.autograd.grad(loss, hooked.cache["fwd", "::gelu"], retain_graph=True)
        loss.backward()
    assert torch.equal(hooked.cache["bwd", "::gelu"], expected)


def test_a_locked_cache_is_filled_and_voided_at_calls():
    class Sometimes(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x.abs()

    cache = TensorDict({"::relu": torch.zeros(2), "::abs": torch.zeros(2)}).lock_()
    with ActivationCaching("::(relu|abs)", cache=cache).prepare(Sometimes()) as hooked:
        hooked(torch.ones(2))
        assert cache["::relu"].tolist() == [1, 1]
        with pytest.warns(UnfiredSiteWarning, match="of the locked cache"):
            hooked(-torch.ones(2))
        assert cache["::relu"].isnan().all()
        assert cache["::abs"].tolist() == [1, 1]


class AttendsInAMethod(nn.Module):
    """Attention whose softmax is in a method that the forward calls, as GPT-J's is."""

    def attend(self, q, k, v):
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    def forward(self, x):
        return self.attend(x, x + 1, x + 2)


def test_queries_and_keys_are_found_where_a_method_of_the_module_attends():
    model, x, kept = AttendsInAMethod(), torch.randn(2, 3, 4), {}
    for offset, place in enumerate("qkv"):
        keep = attach_attention(model, CallSite("", place), lambda m, a, k, value, at=place: kept.update({at: value}))
        with keep:
            model(x)
        assert torch.equal(kept[place], x + offset)
