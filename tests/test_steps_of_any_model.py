"""The clock of generation on models with caches of other names and kinds, and where nothing tells what is fed."""

import pytest
import torch
from torch import nn

from families import build
from tdcache import Ablation, cache_activations
from tdcache.errors import ContextError

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


class Averages(nn.Module):
    """Each token sees the mean of those before; ``past`` are their embeddings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.head = nn.Embedding(12, 4), nn.Linear(4, 4), nn.Linear(4, 12)

    def step(self, ids, past):
        seen = self.embed(ids) if past is None else torch.cat([past, self.embed(ids)], 1)
        means = seen.cumsum(1) / torch.arange(1, seen.shape[1] + 1)[:, None]
        return self.head(self.block(means[:, -ids.shape[1] :])), seen

    def generate(self, feed, count=4):
        past, begin = None, 0
        for _ in range(count):
            logits, past = self.call(feed, begin, past)
            begin, feed = begin + feed.shape[1], logits[:, -1:].argmax(-1)


class Given(Averages):
    """Is handed its cache, and returns the next."""

    def call(self, feed, begin, past):
        return self(feed, past)


class Hidden(Given):
    def forward(self, x, hidden=None):
        return self.step(x, hidden)


class Caches(Given):
    def forward(self, x, kv_caches=None):
        return self.step(x, kv_caches)


class Previous(Given):
    def forward(self, x, prev_hidden_state=None):
        return self.step(x, prev_hidden_state)


class LayerPast(Given):
    def forward(self, x, layer_past=None):
        return self.step(x, layer_past)


class Keeps(Averages):
    """Keeps its cache in itself."""

    def keep(self, ids, begin):
        logits, self.seen = self.step(ids, self.seen[:, :begin] if begin else None)
        return logits

    def call(self, feed, begin, past):
        return self(feed, begin), None


class StartPos(Keeps):
    def forward(self, tokens, start_pos):
        return self.keep(tokens, start_pos)


class InputPos(Keeps):
    def forward(self, idx, input_pos=None):
        return self.keep(idx, int(input_pos[0]))

    def call(self, feed, begin, past):
        return self(feed, torch.arange(begin, begin + feed.shape[1])), None


class Parameters:
    seqlen_offset = 0


class InferenceParams(Keeps):
    def forward(self, input_ids, position_ids=None, inference_params=None):
        return self.keep(input_ids, inference_params.seqlen_offset)

    def call(self, feed, begin, past):
        past = past or Parameters()
        past.seqlen_offset = begin
        return self(feed, inference_params=past), past


class Silent(Keeps):
    def forward(self, ids):
        return self.keep(ids, self.begin)

    def call(self, feed, begin, past):
        self.begin = begin
        return self(feed), None


def edited(model, steps, site="block", run=None):
    """In which of its calls the site was edited."""
    seen = []
    with torch.no_grad(), Ablation(site.replace(".", r"\."), steps=steps).prepare(model):
        see = lambda _, __, out: seen.append(not (out if torch.is_tensor(out) else out[0]).any())  # noqa: E731
        handle = model.get_submodule(site).register_forward_hook(see)
        try:
            (run or (lambda: model.generate(IDS)))()
        finally:
            handle.remove()
    return seen


@pytest.mark.parametrize("kind", [Hidden, Caches, Previous, LayerPast, StartPos, InputPos, InferenceParams])
def test_a_cache_of_any_usual_name_or_the_number_of_the_first_token_tells_the_step(kind):
    assert edited(kind(), "prefill") == [True, False, False, False]
    assert edited(kind(), "decode") == [False, True, True, True]
    assert edited(kind(), lambda step: step.decoded == 2 and step.past == 6) == [False, False, True, False]


@pytest.mark.parametrize("steps", ["prefill", "decode", lambda step: step.decoded > 1])
def test_a_cache_that_no_argument_shows_is_an_error_and_not_a_guess(steps):
    with pytest.raises(ContextError, match=r"single token of a model that takes no cache .* step\.fed > 1"):
        edited(Silent(), steps)


def test_a_predicate_of_what_is_fed_needs_no_cache():
    assert edited(Silent(), lambda step: step.fed > 1) == [True, False, False, False]


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, state):
        return self.block(state)


def test_what_is_fed_is_no_cache_whatever_its_name():
    model, x = Policy(), torch.randn(2, 3, 4)
    with cache_activations(model, "block", positions=0, steps="prefill") as cache:
        model(x)
        model(x)
    assert torch.equal(cache["block"], model(x)[:, 0])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, cache=None):
        return self.linear(x)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.layers = nn.Linear(4, 4), nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        x = self.block(x)
        for each in self.layers:
            x = each(x)
        return x


@pytest.mark.parametrize("site", ["block", "layers.0", "layers.1.linear"])
def test_of_layers_with_a_cache_each_the_model_tells_the_step(site):
    model, x = Layers(), torch.randn(2, 3, 4)
    assert edited(model, "prefill", site, lambda: model(x)) == [True]


class Window(nn.Module):
    """Generates without a cache within a window of four ids."""

    def __init__(self):
        super().__init__()
        self.block = nn.Embedding(12, 4)

    def forward(self, idx):
        return self.block(idx)


def test_a_prompt_that_fills_the_window_is_the_only_one():
    model, ids = Window(), torch.arange(1, 9)[None]
    run = lambda: [model(ids[:, end - 4 : end]) for end in (4, 5, 6)]  # noqa: E731
    assert edited(model, "prefill", run=run) == [True, False, False]
    assert edited(model, "prefill", run=lambda: [model(ids), model(ids)]) == [True, True]


def generate(family, site, steps):
    model = build(family)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return edited(model, steps, site, lambda: model.generate(IDS, attention_mask=torch.ones_like(IDS), **options))


# The first layer of MiniMax counts no tokens; GPT is given a cache and cannot use it; CPMAnt cuts off what is cached.
@pytest.mark.parametrize(
    ("family", "site"),
    [("minimax", "model.layers.0"), ("openai-gpt", "transformer.h.0"), ("cpmant", "cpmant.encoder.layers.0")],
)
def test_caches_that_miscount_are_understood(family, site):
    assert generate(family, site, "prefill") == [True, False, False, False]
    assert generate(family, site, "decode") == [False, True, True, True]


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("xlnet", "transformer.layer.0.ff", r"beside a perm_mask, tokens are fed again .* step\.past < 12"),
        ("xlm", "transformer.ffns.0", r"ids of the forward before with one between them .* step\.fed > 1"),
    ],
)
def test_families_that_feed_placeholders_are_refused(family, site, reason):
    with pytest.raises(ContextError, match=reason):
        generate(family, site, "decode")
