"""Path patching: a formula written out by hand, and GPT-2 with plain hooks."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from interventions.hand import edited, values
from model_state import state_of
from tdcache import ContextError, PathPatching, SelectionError, cache_activations

transformers = pytest.importorskip("transformers")


class Stream(nn.Module):
    """Three components that read from, and add to, one residual stream."""

    def __init__(self, width=4):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        x = x + torch.tanh(self.a(x))
        x = x + self.b(x).tanh()
        x = x + self.c(x).tanh()
        return self.out(x)


@pytest.fixture
def model():
    return Stream().double()


@pytest.fixture
def x():
    return torch.randn(3, 4).double()


@pytest.fixture
def y():
    return torch.randn(3, 4).double()


def both(x, y):
    return TensorDict({"input": x, "patched": {"input": y}})


def edge_by_formula(model, x, y, receiver):
    """The run on ``y`` in which only ``receiver`` hears what ``a`` says on ``x``; b is frozen."""
    delta = torch.tanh(model.a(x)) - torch.tanh(model.a(y))
    after_a = y + torch.tanh(model.a(y))
    b = torch.tanh(model.b(after_a + (delta if receiver == "b" else 0)))
    after_b = after_a + b
    c = torch.tanh(model.c(after_b + (delta if receiver == "c" else 0)))
    return model.out(after_b + c + (delta if receiver == "out" else 0))


@pytest.mark.parametrize("receiver", ["b", "c", "out"])
def test_only_the_receiver_hears_the_sender(model, x, y, receiver):
    with PathPatching("a", receiver, freeze="[abc]").prepare(model) as hooked:
        data = hooked(both(x, y))
    torch.testing.assert_close(data["patched", "output"], edge_by_formula(model, x, y, receiver))
    assert torch.equal(data["output"], model(x))


def test_what_is_not_frozen_lets_indirect_paths_through(model, x, y):
    with PathPatching("a", "c", freeze="c").prepare(model) as hooked:
        found = hooked(both(x, y))["patched", "output"]
    delta = torch.tanh(model.a(x)) - torch.tanh(model.a(y))
    after_a = y + torch.tanh(model.a(y))
    into_c = after_a + delta + torch.tanh(model.b(after_a + delta))
    after_b = after_a + torch.tanh(model.b(after_a))
    torch.testing.assert_close(found, model.out(after_b + torch.tanh(model.c(into_c))))


def test_a_run_that_receives_from_itself_does_not_change(model, x):
    with PathPatching("a", "c", freeze="[abc]").prepare(model) as hooked:
        data = hooked(both(x, x))
    assert torch.equal(data["patched", "output"], model(x))


def test_the_edges_of_the_last_receiver_add_up(model, x, y):
    """The output is linear in its input, so its direct edges from a, b and c make the whole difference they send."""
    edges = {}
    for sender in "abc":
        with PathPatching(sender, "out", freeze="[abc]").prepare(model) as hooked:
            edges[sender] = hooked(both(x, y))["patched", "output"] - model(y)
    sent = sum(values(model, [path], lambda: model(x))[path].tanh() for path in "abc")
    sent -= sum(values(model, [path], lambda: model(y))[path].tanh() for path in "abc")
    torch.testing.assert_close(sum(edges.values()), sent @ model.out.weight.T)


def test_the_senders_value_may_come_from_a_cache(model, x, y):
    with cache_activations(model, "a") as cache:
        model(x)
    with PathPatching("a", "c", freeze="[abc]", source=cache).prepare(model) as hooked:
        data = hooked(TensorDict({"input": y}))
    torch.testing.assert_close(data["output"], edge_by_formula(model, x, y, "c"))


def test_edges_between_heads_and_layers_of_gpt2():
    config = transformers.GPT2Config(
        n_layer=3, n_head=2, n_embd=8, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval().double()
    clean, other = torch.randint(2, 20, (2, 2, 5))
    parts = [f"transformer.h.{layer}.{part}" for layer in range(3) for part in ("attn", "mlp")]
    head = slice(4, 8)

    recipe = PathPatching(
        r"transformer\.h\.0\.attn\.c_proj",
        r"transformer\.h\.2\.attn",
        freeze=r"transformer\.h\.\d\.(attn|mlp)",
        direction="fwd_pre",
        units=head,
    )
    with recipe.prepare(model, {"ids": "input_ids"}, ["logits"]) as hooked, torch.no_grad():
        found = hooked(TensorDict({"ids": clean, "patched": {"ids": other}}))["patched", "logits"]

    projection = "transformer.h.0.attn.c_proj"
    sent = values(model, [projection], lambda: model(clean), inputs=True)[projection]
    kept = values(model, parts, lambda: model(other))
    arrived = {}
    with (
        torch.no_grad(),
        edited(model, projection, lambda old: torch.cat([old[..., :4], sent[..., 4:]], -1), inputs=True),
    ):
        # The frozen attention of layer 0 would hide its own head, which is the sender: it is let through.
        frozen = [
            edited(model, path, lambda old, path=path: kept[path]) for path in parts if path != "transformer.h.0.attn"
        ]
        for each in frozen:
            each.__enter__()
        arrived = values(model, ["transformer.h.2.attn.c_attn"], lambda: model(other), inputs=True)
        for each in frozen:
            each.__exit__(None, None, None)
    with (
        torch.no_grad(),
        edited(model, "transformer.h.2.attn.c_attn", lambda old: arrived["transformer.h.2.attn.c_attn"], inputs=True),
    ):
        expected = model(other).logits
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, model(other).logits)


def test_the_model_is_left_as_it_was(model, x, y):
    before = state_of(model)
    with PathPatching("a", "out", freeze="[abc]").prepare(model) as hooked:
        hooked(both(x, y))
        with pytest.raises(ContextError, match="needs a second input"):
            hooked(TensorDict({"input": x}))
    assert state_of(model) == before


@pytest.mark.parametrize("wrong", ["sender", "receiver", "freeze"])
def test_a_selector_that_matches_nothing_is_refused_on_entering(model, wrong):
    before = state_of(model)
    arguments = {"sender": "a", "receiver": "out", "freeze": "b", wrong: "nowhere"}
    with pytest.raises(SelectionError, match="'nowhere' matches none"), PathPatching(**arguments).prepare(model):
        pass
    assert state_of(model) == before


@pytest.mark.parametrize("freeze", ["[abc]", "[ab]"])
def test_a_receiver_whose_output_is_changed_is_not_frozen(model, x, y, freeze):
    with PathPatching("a", "c", freeze=freeze, receiver_direction="fwd").prepare(model) as hooked:
        found = hooked(both(x, y))["patched", "output"]
    torch.testing.assert_close(found, edge_by_formula(model, x, y, "c"))
    assert not torch.allclose(found, model(y))
