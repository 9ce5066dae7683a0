"""The clock of generation, fed by plain hooks on real models."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from small_models import Wrapper
from tdcache.errors import ContextError, SelectionError
from tdcache.steps import Clock, Step, check_steps

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def config(kind, **sizes):
    torch.manual_seed(0)
    return kind(vocab_size=20, **sizes)


def gpt2():
    made = config(transformers.GPT2Config, n_layer=1, n_head=2, n_embd=8, n_positions=40)
    return transformers.GPT2LMHeadModel(made).eval(), "transformer.h.0"


def llama():
    made = config(
        transformers.LlamaConfig, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(made).eval(), "model.layers.0"


def mamba():
    made = config(transformers.MambaConfig, hidden_size=8, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(made).eval(), "backbone.layers.0"


def t5(site="decoder.block.0"):
    made = config(transformers.T5Config, d_model=8, d_kv=4, num_heads=2, num_layers=1, d_ff=8, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(made).eval(), site


class NamedWrapper(Wrapper):
    """The same with a cache among its parameters."""

    def forward(self, input_ids=None, past_key_values=None, **kwargs):
        return self.inner(input_ids=input_ids, past_key_values=past_key_values, **kwargs)


def steps_seen(model, site, run):
    """The steps at the input of one module while ``run()`` runs."""
    clock, seen = Clock(model), []
    handles = [model.get_submodule(site).register_forward_pre_hook(lambda *_: seen.append(clock.step_at(site)))]
    for path, module in clock.receivers.items():
        begin = lambda _, args, kwargs, path=path: clock.begin(path, args, kwargs)  # noqa: E731
        end = lambda *_, path=path: clock.end(path)  # noqa: E731
        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end, always_call=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def generate(model, **options):
    given = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(**given | {"eos_token_id": None} | options)


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("make", [gpt2, llama, mamba])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_prompt_is_one_prefill_and_each_token_one_step(make, options):
    model, site = make()
    seen = steps_seen(model, site, lambda: generate(model, **options))
    assert seen == [Step(0, 0, 0, 6), Step(1, 1, 6, 1), Step(2, 2, 7, 1), Step(3, 3, 8, 1)]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_static_cache_counts_what_is_filled(make):
    model, site = make()
    seen = steps_seen(model, site, lambda: generate(model, **STATIC))
    assert seen == [Step(0, 0, 0, 6), Step(1, 1, 6, 1), Step(2, 2, 7, 1), Step(3, 3, 8, 1)]


@pytest.mark.parametrize("beams", [1, 3])
def test_without_a_cache_the_ids_grow(beams):
    model, site = gpt2()
    seen = steps_seen(model, site, lambda: generate(model, use_cache=False, num_beams=beams))
    assert seen == [Step(0, 0, 0, 6), Step(1, 1, 0, 7), Step(2, 2, 0, 8), Step(3, 3, 0, 9)]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 9])
def test_chunks_of_a_prompt_are_one_prefill(make, cache, size):
    model, site = make()
    seen = steps_seen(model, site, lambda: generate(model, prefill_chunk_size=size, **cache))
    chunks = -(-6 // size)
    assert [step.decoded for step in seen] == [0] * chunks + [1, 2, 3]
    assert [step.past for step in seen] == [*range(0, 6, size), 6, 7, 8]


def test_chunks_of_one_token_are_told_by_a_predicate_alone():
    model, site = llama()
    seen = steps_seen(model, site, lambda: generate(model, prefill_chunk_size=1))
    assert seen[0].decoded == 0
    with pytest.raises(ContextError, match=r"a single token whose mask is a view of .*steps= a predicate of"):
        print(seen[1].decoded)
    assert [step.past < 6 for step in seen] == [True] * 6 + [False] * 3
    assert "not told" in seen[1]._repr_html_()


@pytest.mark.parametrize("size", [2, 4])
def test_the_rest_of_a_prompt_of_a_model_without_positions_is_not_guessed(size):
    model = transformers.BloomForCausalLM(config(transformers.BloomConfig, hidden_size=8, n_layer=1, n_head=2)).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    run = lambda mask: generate(model, input_ids=ids, attention_mask=mask, prefill_chunk_size=size)  # noqa: E731
    masked = steps_seen(model, "transformer.h.0", lambda: run(torch.tensor([[0, 1, 1, 1, 1]])))
    assert [step.decoded for step in masked] == [0] * -(-5 // size) + [1, 2, 3]
    if size == 2:  # one forward before the single token is any prompt
        plain = steps_seen(model, "transformer.h.0", lambda: run(None))
        with pytest.raises(ContextError, match=r"a single token after several chunks of a prompt .*step\.past < 12"):
            print(plain[2].is_prefill)


@pytest.mark.parametrize("wrap", [Wrapper, NamedWrapper, lambda model: Wrapper(NamedWrapper(model))])
def test_the_clock_belongs_to_the_model_that_receives_the_cache(wrap):
    inner, site = gpt2()
    model = wrap(inner)
    site = next(path for path, module in model.named_modules() if module is inner.get_submodule(site))
    seen = steps_seen(model, site, lambda: generate(model))
    assert [step.decoded for step in seen] == [0, 1, 2, 3]
    assert steps_seen(model, site, lambda: model(input_ids=IDS)) == [Step(0, 0, 0, 6)]


def test_the_prompt_of_a_second_turn_is_prefill():
    model, site = gpt2()

    def two_turns():
        cache = transformers.DynamicCache(config=model.config)
        first = generate(model, past_key_values=cache)
        both = torch.cat([first, IDS[:, 2:4]], 1)
        mask = torch.cat([MASK, MASK.new_ones(2, both.shape[1] - 6)], 1)
        generate(model, input_ids=both, attention_mask=mask, past_key_values=cache, max_new_tokens=2)

    seen = steps_seen(model, site, two_turns)
    assert [(step.decoded, step.fed) for step in seen] == [(0, 6), (1, 1), (2, 1), (3, 1), (0, 3), (1, 1)]


def test_a_cache_from_before_the_clock_holds_the_prompt():
    model, site = gpt2()
    with torch.no_grad():
        cache = model(IDS).past_key_values
    assert steps_seen(model, site, lambda: model(IDS[:, :1], past_key_values=cache)) == [Step(0, 1, 6, 1)]
    assert steps_seen(model, site, lambda: model(IDS[:, :3], past_key_values=cache)) == [Step(0, 0, 7, 3)]


def test_assisted_decoding_counts_the_accepted_tokens():
    model, site = gpt2()
    ids = torch.tensor([[3, 4, 3, 4, 3, 4]])
    lookup = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_lookup_num_tokens": 2}
    seen = steps_seen(model, site, lambda: generate(model, **lookup, max_new_tokens=8))
    assert [step.is_prefill for step in seen] == [True] + [False] * (len(seen) - 1)
    assert all(step.decoded == step.past + step.fed - 6 for step in seen[1:])


def test_an_assistant_with_a_cache_of_its_own_does_not_disturb():
    model, site = gpt2()
    assistant = transformers.GPT2LMHeadModel(model.config).eval()
    options = {"input_ids": IDS[1:], "attention_mask": MASK[1:], "assistant_model": assistant}
    seen = steps_seen(model, site, lambda: generate(model, **options))
    assert [step.is_prefill for step in seen] == [True] + [False] * (len(seen) - 1)
    assert all(step.decoded == step.past + step.fed - 6 for step in seen[1:])


def test_assisted_decoding_without_logits_to_keep_is_refused():
    model, site = t5()
    options = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 10, "input_ids": IDS[1:], "attention_mask": MASK[1:]}
    seen = steps_seen(model, site, lambda: generate(model, **options))
    with pytest.raises(ContextError, match=r"tokens beside \d+ cached ones can be candidates of .*step\.past < 12"):
        print(seen[-1].decoded)
    assert [step.past < 1 for step in seen] == [True] + [False] * (len(seen) - 1)


def test_encoder_and_decoder_have_steps_of_their_own():
    model, _ = t5()
    seen = steps_seen(model, "decoder.block.0", lambda: generate(model))
    assert seen == [Step(0, 0, 0, 1), Step(1, 1, 1, 1), Step(2, 2, 2, 1), Step(3, 3, 3, 1)]
    assert steps_seen(model, "encoder.block.0", lambda: generate(model)) == [Step(0, 0, 0, 6)]


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(2, 10), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_any_prompt_in_any_chunks(length, size, beams, new, cached):
    model, site = gpt2()
    ids = torch.arange(1, length + 1).expand(2, -1)
    chunks = {"prefill_chunk_size": size} if cached else {"use_cache": False}
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_beams": beams, "max_new_tokens": new}
    seen = steps_seen(model, site, lambda: generate(model, **options, **chunks))
    prompts = -(-length // size) if cached else 1
    assert [step.decoded for step in seen] == [0] * prompts + list(range(1, new))


def short(seen):
    """Tokens added, cached and fed."""
    return [tuple(step[1:]) for step in seen]


def test_prompts_that_share_a_prefix_are_each_a_prefill():
    model, site = gpt2()

    def shared_prefix():
        cache = transformers.DynamicCache(config=model.config)
        model(IDS, past_key_values=cache)
        for _ in range(2):
            model(IDS[:, :3], past_key_values=cache)
            model(IDS[:, :1], past_key_values=cache)
            cache.crop(-4)

    seen = short(steps_seen(model, site, shared_prefix))
    assert seen == [(0, 0, 6), (0, 6, 3), (1, 9, 1), (0, 6, 3), (1, 9, 1)]


def test_masks_cut_from_one_long_tensor_make_no_prompt_of_what_is_added():
    model, site = gpt2()

    def loop():
        mask, cache = torch.ones(2, 20, dtype=torch.long), transformers.DynamicCache(config=model.config)
        model(IDS, attention_mask=mask[:, :6], past_key_values=cache)
        for end in (7, 8):
            model(IDS[:, :1], attention_mask=mask[:, :end], past_key_values=cache)

    assert short(steps_seen(model, site, loop)) == [(0, 0, 6), (1, 6, 1), (2, 7, 1)]


def test_a_cache_that_the_first_forward_made_goes_on_with_it():
    model, site = gpt2()

    def loop():
        cache = model(IDS).past_key_values
        for _ in range(2):
            cache = model(IDS[:, :1], past_key_values=cache).past_key_values

    assert short(steps_seen(model, site, loop)) == [(0, 0, 6), (1, 6, 1), (2, 7, 1)]


@pytest.mark.parametrize("cached", [True, False])
def test_a_second_generate_begins_with_its_prompt(cached):
    model, site = gpt2()
    twice = lambda: [generate(model, max_new_tokens=2, use_cache=cached) for _ in range(2)]  # noqa: E731
    assert [step.decoded for step in steps_seen(model, site, twice)] == [0, 1, 0, 1]


def test_windows_of_attention_and_lists_of_states_count_all_tokens():
    torch.manual_seed(0)
    gemma = config(
        transformers.Gemma2Config, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, intermediate_size=8, sliding_window=4,
    )  # fmt: skip
    rwkv = config(
        transformers.RwkvConfig, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8, intermediate_size=8
    )
    for kind, made, site in (
        (transformers.Gemma2ForCausalLM, gemma, "model.layers.0"),
        (transformers.RwkvForCausalLM, rwkv, "rwkv.blocks.0"),
    ):
        model = kind(made).eval()
        seen = steps_seen(model, site, lambda model=model: generate(model, max_new_tokens=3))
        assert short(seen) == [(0, 0, 6), (1, 6, 1), (2, 7, 1)]


class Recurrent(nn.Module):
    """Hands a list of states on, as RWKV does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.cell = nn.GRU(4, 4, batch_first=True)

    def forward(self, input_ids, state=None):
        out, last = self.cell(self.embed(input_ids), None if state is None else state[0])
        return out, [last]


def test_a_state_of_unknown_length_is_counted():
    model = Recurrent()

    def loop():
        state = model(torch.tensor([[1, 2, 3]]))[1]
        for _ in range(2):
            state = model(torch.tensor([[4]]), state)[1]

    assert steps_seen(model, "embed", loop) == [Step(0, 0, 0, 3), Step(1, 1, 3, 1), Step(2, 2, 4, 1)]


class Window(nn.Module):
    """Generates without a cache within a window of four ids."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, idx):
        return self.embed(idx)


def test_a_window_that_slides_goes_on_decoding():
    model, ids = Window(), torch.arange(1, 7)[None]
    seen = steps_seen(model, "embed", lambda: [model(ids[:, max(0, end - 4) : end]) for end in (3, 4, 5, 6)])
    assert [step.is_prefill for step in seen] == [True, False, False, False]


def test_a_model_without_a_cache_only_reads_prompts():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    seen = steps_seen(model, "0", lambda: [model(torch.zeros(3, 2)), model(torch.zeros(3, 2))])
    assert [step.decoded for step in seen] == [0, 0]


def test_a_site_that_fires_while_nothing_ticks_is_an_error():
    model, site = gpt2()
    with pytest.raises(ContextError) as error:
        steps_seen(model, site, lambda: model.transformer.h[0](torch.zeros(1, 2, 8)))
    assert str(error.value) == (
        "the site at 'transformer.h.0' fired outside of every forward that tells the step ('the model itself', "
        "'transformer.*'): choose a site below one of these, call the model and not a part of it, or leave steps= out"
    )


def test_a_forward_that_was_left_by_an_exception_is_over():
    clock = Clock(Wrapper(gpt2()[0]))
    clock.begin("inner", (IDS,), {})
    clock.begin("inner.transformer", (IDS,), {})
    clock.begin("inner", (IDS,), {})  # nobody called end()
    assert clock.step_at("inner").forward == 1
    clock.end("inner")
    clock.end("inner")
    with pytest.raises(ContextError, match=r"fired outside"):
        clock.step_at("inner")


def test_a_recomputation_in_the_backward_has_the_step_of_its_forward():
    model, site = gpt2()
    block, seen = model.get_submodule(site), []
    plain = block.mlp.forward
    block.mlp.forward = lambda x: checkpoint(
        lambda y: seen.append(clock.step_at(site)) or plain(y), x, use_reentrant=False
    )
    clock = Clock(model)
    model.register_forward_pre_hook(lambda _, args, kwargs: clock.begin("", args, kwargs), with_kwargs=True)
    model.register_forward_hook(lambda *_: clock.end(""))
    model(IDS).logits.sum().backward()
    assert seen == [Step(0, 0, 0, 6)] * 2


def test_steps_say_where_something_acts():
    clock = Clock(gpt2()[0])
    clock.begin("", (IDS,), {})
    assert clock.acts(None, "x")
    assert clock.acts("prefill", "x")
    assert not clock.acts("decode", "x")
    assert clock.acts(lambda step: step.fed == 6, "x")
    clock.reset()
    assert clock.acts(None, "x")
    assert repr(clock) == "Clock('', 'transformer', None)"


def test_what_are_no_steps_is_refused():
    assert check_steps("decode") == "decode"
    with pytest.raises(SelectionError, match=r"steps is 'prefill', 'decode', a predicate of a Step, or None .* got 3"):
        check_steps(3)
