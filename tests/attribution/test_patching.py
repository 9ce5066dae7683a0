"""Patching scores: their identities, exactly, and their distance to patching itself."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import READERS, WRITERS, Counter, Transformer
from tdcache import AttributionError
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    ActivationMaximisation,
    AttentionRollout,
    AttributionPatching,
    DirectLogitAttribution,
    EdgeAttributionPatching,
    GradientXActivation,
    IntegratedGradients,
    LogitLens,
    QKAttributionPatching,
    attention_rollout,
    difference_x_gradient,
    grad_cam,
    gradient_x_activation,
)

SITES = r"embed|blocks\.\d+\.(attn|mlp)"


def difference(td):
    return td["output"][:, -1, 2] - td["output"][:, -1, 5]


def setting(layers=2):
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [3, 1, 4, 1]])
    other = torch.tensor([[1, 9, 3, 4], [5, 6, 10, 8], [3, 1, 4, 2]])
    model = Transformer(layers=layers).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, {"input": ids, "corrupt": {"input": other}}


def run(factory, model, data, rows=(3,)):
    with factory.prepare(model) as hooked:
        return hooked(TensorDict(data, batch_size=list(rows)))


def outputs(model, path, ids):
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    model(ids)
    handle.remove()
    return seen[0].detach()


def patched_metric(model, path, ids, value):
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output, value=value: value)
    found = difference({"output": model(ids)}).detach()
    handle.remove()
    return found


@pytest.mark.parametrize("path", ["embed", "blocks.0.attn", "blocks.1.mlp"])
def test_attribution_patching_is_the_derivative_of_patching(path):
    model, data = setting()
    td = run(AttributionPatching(SITES, target=difference, reduce=(-1, -2)), model, data)
    a, b = (outputs(model, path, ids) for ids in (data["input"], data["corrupt"]["input"]))
    step = 1e-5  # the central difference errs by its square
    up, down = (patched_metric(model, path, data["input"], a + sign * step * (b - a)) for sign in (1, -1))
    torch.testing.assert_close(td["attr", path], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_clean_and_corrupt_share_one_forward_and_one_backward(monkeypatch):
    model, data = setting()
    counter = Counter(model, monkeypatch)
    stack = Together(
        AttributionPatching(SITES, target=difference),
        EdgeAttributionPatching(SITES, READERS, target=difference, name="edges"),
        DirectLogitAttribution(SITES, norm="ln_f", target=difference, name="direct"),
    )
    run(stack, model, data)
    assert counter.counts == (3, 1)  # a few rows to see where rows are, both inputs, and a stream of zeros
    run(stack, model, data)
    assert counter.counts == (5, 2)


def test_without_a_counterfactual_the_patch_is_zero():
    model, data = setting()
    td = run(
        Together(
            AttributionPatching("embed", target=difference), GradientXActivation("embed", target=difference, name="gxa")
        ),
        model,
        {"input": data["input"]},
    )
    assert torch.equal(td["attr", "embed"], -td["attr", "gxa", "embed"])


def test_the_edges_of_every_writer_sum_to_its_node_score():
    model, data = setting()
    stack = Together(
        EdgeAttributionPatching(SITES, READERS, target=difference, name="edges"),
        AttributionPatching(SITES, target=difference, reduce=(-1, -2), name="nodes"),
    )
    td = run(stack, model, data)
    for writer, node in td["attr", "nodes"].items():
        edges = td["attr", "edges", writer]
        torch.testing.assert_close(sum(edges.values()), node, rtol=1e-9, atol=1e-10)
    assert "blocks.0.ln1" not in td["attr", "edges", "blocks.1.mlp"]  # it was read before that was written


def edges_by_hand(model, data, writer, reader, nodes):
    """EAP-IG from its paper: the reader's gradient at each point of the embeddings' path, by ``autograd.grad``."""
    a, b = (outputs(model, writer, ids) for ids in (data["input"], data["corrupt"]["input"]))
    low, high = (outputs(model, "embed", ids) for ids in (data["corrupt"]["input"], data["input"]))
    total = 0
    for node in nodes:
        read = []
        value = (low + node * (high - low)).requires_grad_()

        def branch(module, args, read=read):
            read.append(args[0] * 1)
            return (read[-1],)

        handles = [
            model.embed.register_forward_hook(lambda module, args, output, value=value: value),
            model.get_submodule(reader).register_forward_pre_hook(branch),
        ]
        metric = difference({"output": model(data["input"])}).sum()
        for handle in handles:
            handle.remove()
        total = total + torch.autograd.grad(metric, read[0])[0] / len(nodes)
    return ((b - a) * total).sum((1, 2)).detach()


def test_edges_along_a_path_equal_the_loop_of_the_paper():
    model, data = setting()
    method = EdgeAttributionPatching(SITES, READERS, target=difference, n_steps=4, embeddings="embed", chunk=3)
    td = run(method, model, data)
    for writer, reader in (("embed", "blocks.1.ln1"), ("blocks.0.attn", "ln_f"), ("blocks.0.mlp", "blocks.1.ln2")):
        wanted = edges_by_hand(model, data, writer, reader, [0, 0.25, 0.5, 0.75])
        torch.testing.assert_close(td["attr", writer, reader], wanted, rtol=1e-9, atol=1e-12)


def test_edges_along_a_path_from_the_embeddings_sum_to_the_gap():
    model, data = setting()
    options = {"target": difference, "n_steps": 60, "method": "gausslegendre", "embeddings": "embed"}
    td = run(EdgeAttributionPatching("embed", READERS, **options), model, data)
    base, patched = (difference({"output": model(ids)}).detach() for ids in (data["input"], data["corrupt"]["input"]))
    torch.testing.assert_close(sum(td["attr", "embed"].values()), patched - base, rtol=0, atol=1e-8)


def test_integer_inputs_need_the_embeddings_for_a_path_of_edges():
    model, data = setting()
    with pytest.raises(AttributionError, match="say with embeddings= which"):
        run(EdgeAttributionPatching(SITES, READERS, target=difference, n_steps=4), model, data)
    with pytest.raises(AttributionError, match=r"set data\['corrupt', 'input'\]"):
        run(EdgeAttributionPatching(SITES, READERS, target=difference), model, {"input": data["input"]})


def test_edges_are_left_out_by_a_predicate():
    model, data = setting()
    method = EdgeAttributionPatching(SITES, READERS, target=difference, edges=lambda writer, reader: reader == "ln_f")
    td = run(method, model, data)
    assert {reader for edges in td["attr"].values() for reader in dict(edges.items())} == {"ln_f"}


def test_direct_logit_attribution_and_its_bias_sum_to_the_logit_difference():
    model, data = setting()
    with DirectLogitAttribution(WRITERS, norm="ln_f", target=difference, reduce=None).prepare(model) as hooked:
        td = hooked(TensorDict({"input": data["input"]}, batch_size=[]))
    parts = [value.sum((-1, -2)) for key, value in td["attr"].items() if key != "bias"]
    torch.testing.assert_close(sum(parts) + td["attr", "bias"], difference(td), rtol=1e-9, atol=1e-10)
    # The formula of one writer: centred, scaled by the final norm, against the unembedding's direction.
    stream = outputs(model, "blocks.1", data["input"])
    scale = (stream.var(-1, keepdim=True, unbiased=False) + model.ln_f.eps).sqrt()
    u = outputs(model, "blocks.0.mlp", data["input"])
    direction = model.unembed.weight[2] - model.unembed.weight[5]
    wanted = ((u - u.mean(-1, keepdim=True)) / scale * model.ln_f.weight) @ direction
    torch.testing.assert_close(td["attr", "blocks.0.mlp"].sum(-1)[:, -1], wanted[:, -1].detach())


def test_the_logit_lens_after_the_last_block_gives_the_models_logits():
    model, data = setting()
    td = run(LogitLens(r"blocks\.\d", norm="ln_f", unembed="unembed"), model, {"input": data["input"]})
    torch.testing.assert_close(td["attr", "blocks.1"], td["output"])
    wanted = model.unembed(model.ln_f(outputs(model, "blocks.0", data["input"])))
    torch.testing.assert_close(td["attr", "blocks.0"], wanted.detach())


def rollout_by_hand(patterns):
    joint = torch.eye(patterns[0].shape[-1], dtype=patterns[0].dtype)
    for pattern in patterns:
        joint = (0.5 * pattern.mean(0) + 0.5 * torch.eye(len(joint), dtype=joint.dtype)) @ joint
    return joint


def test_rollout_multiplies_the_mixed_patterns_of_the_layers():
    model, data = setting(layers=3)
    td = run(AttentionRollout(r"blocks\.\d\.attn\.pattern", pick=None), model, {"input": data["input"]})
    patterns = [outputs(model, f"blocks.{at}.attn.pattern", data["input"]) for at in range(3)]
    for row in range(3):
        torch.testing.assert_close(td["attr", "rollout"][row], rollout_by_hand([each[row] for each in patterns]))
    torch.testing.assert_close(td["attr", "rollout"].sum(-1), torch.ones(3, 4, dtype=torch.float64))
    weighted = run(
        AttentionRollout(r"blocks\.\d\.attn\.pattern", pick=None, gradient=True, target=difference),
        model,
        {"input": data["input"]},
    )
    assert weighted["attr", "rollout"].shape == (3, 4, 4)


def query_effect(model, data, layer, row, head, position, grad):
    """One query replaced, the softmax recomputed by hand."""
    attn = model.blocks[layer].attn
    name = f"blocks.{layer}.attn"
    d = 4
    part = slice(head * d, (head + 1) * d)
    q = outputs(model, f"{name}.q", data["corrupt"]["input"])[row, position, part]
    k = outputs(model, f"{name}.k", data["input"])[row, : position + 1, part]
    pattern = outputs(model, f"{name}.pattern", data["input"])[row, head, position, : position + 1]
    return ((k @ q / math.sqrt(d)).softmax(-1) - pattern) @ grad[row, head, position, : position + 1] if attn else None


def test_the_qk_fix_recomputes_the_softmax():
    model, data = setting()
    method = QKAttributionPatching(
        r"blocks\.\d\.attn\.q", r"blocks\.\d\.attn\.k", r"blocks\.\d\.attn\.pattern", heads=2, target=difference
    )
    td = run(method, model, data)
    seen = []
    handle = model.blocks[0].attn.pattern.register_forward_hook(lambda module, args, output: seen.append(output))
    (grad,) = torch.autograd.grad(difference({"output": model(data["input"])}).sum(), seen)
    handle.remove()
    scores = td["attr", "blocks.0.attn.q"]
    assert scores.shape == (3, 4, 2)
    for row, position, head in ((0, 1, 0), (1, 2, 1), (2, 3, 0)):
        wanted = query_effect(model, data, 0, row, head, position, grad)
        torch.testing.assert_close(scores[row, position, head], wanted.detach())
    # Where the pattern is uniform over one key, and its logits change by the same amount, nothing changes.
    torch.testing.assert_close(scores[:, 0], torch.zeros(3, 2, dtype=torch.float64))


def test_the_qk_fix_at_a_small_change_is_plain_attribution_patching():
    model, data = setting()
    same = {"input": data["input"], "corrupt": {"input": data["input"]}}
    names = (r"blocks\.0\.attn\.q", r"blocks\.0\.attn\.k", r"blocks\.0\.attn\.pattern")
    td = run(QKAttributionPatching(*names, heads=2, target=difference), model, same)
    assert td["attr", "blocks.0.attn.q"].abs().max() < 1e-12
    assert td["attr", "blocks.0.attn.k"].abs().max() < 1e-12


def test_graddrop_averages_the_sizes_with_each_layer_left_out():
    model, data = setting()
    drop = r"blocks\.(?P<layer>\d+)\.(attn|mlp)"
    td = run(AttributionPatching(SITES, target=difference, drop=drop, reduce=(-1, -2)), model, data)
    for path in ("embed", "blocks.0.attn", "blocks.1.mlp"):
        a, b = (outputs(model, path, ids) for ids in (data["input"], data["corrupt"]["input"]))
        sizes = 0
        for layer in range(2):
            dropped = [model.get_submodule(f"blocks.{layer}.{part}") for part in ("attn", "mlp")]
            handles = [module.register_forward_hook(lambda m, args, out: out.detach()) for module in dropped]
            value, own = a.clone().requires_grad_(), path.startswith(f"blocks.{layer}")
            handles.append(
                model.get_submodule(path).register_forward_hook(
                    lambda m, args, out, value=value, own=own: value.detach() if own else value
                )
            )
            metric = difference({"output": model(data["input"])}).sum()
            (grad,) = torch.autograd.grad(metric, value, allow_unused=True) if metric.requires_grad else (None,)
            for handle in handles:
                handle.remove()
            sizes = sizes + (((b - a) * grad).sum((1, 2)).abs() if grad is not None else 0)
        torch.testing.assert_close(td["attr", path], sizes / 1, rtol=1e-9, atol=1e-12)


def test_graddrop_needs_a_group_and_several_layers():
    model, data = setting()
    for drop, text in (
        (r"blocks\.\d\.mlp", "no group 'layer'"),
        (r"blocks\.(?P<layer>0)\.mlp", "averages over several"),
    ):
        with pytest.raises(AttributionError, match=text):
            run(AttributionPatching("embed", target=difference, drop=drop), model, data)


class Spliced(nn.Module):
    """A dictionary in place of an activation: what it cannot say is carried by an error node."""

    def __init__(self, width, latents):
        super().__init__()
        self.encode, self.decode = nn.Linear(width, latents), nn.Linear(latents, width, bias=False)
        self.latents, self.error = nn.Identity(), nn.Identity()

    def forward(self, x):
        f = self.encode(x).relu()
        error = x - self.decode(f)
        return self.decode(self.latents(f)) + self.error(error.detach())


def test_latents_and_error_sum_to_the_effect_of_the_node_they_replace():
    model, data = setting()
    splice = Spliced(8, 20).double()
    model.blocks[0].mlp.append(splice)
    paths = r"blocks\.0\.mlp\.3(\.latents|\.error)?"
    td = run(AttributionPatching(paths, target=difference), model, data)["attr"]
    latents, error, whole = (td[f"blocks.0.mlp.3{part}"] for part in (".latents", ".error", ""))
    assert latents.shape == (3, 4, 20)
    torch.testing.assert_close(latents.sum((1, 2)) + error.sum((1, 2)), whole.sum((1, 2)), rtol=1e-9, atol=1e-10)


def test_reductions_give_the_same_from_a_stored_cache():
    from tdcache import ActivationCaching

    model, data = setting()
    td = run(
        Together(
            AttributionPatching(SITES, target=difference), GradientXActivation(SITES, target=difference, name="g")
        ),
        model,
        data,
    )
    caches = []
    for ids in (data["input"], data["corrupt"]["input"]):
        with ActivationCaching(SITES, directions=["fwd", "bwd"]).prepare(model) as hooked:
            difference({"output": hooked(ids)}).sum().backward()
        caches.append(hooked.cache)
    base, other = caches
    for path in ("embed", "blocks.1.mlp"):
        stored = gradient_x_activation(base["fwd"], base["bwd"])
        torch.testing.assert_close(stored[path], td["attr", "g", path])
        torch.testing.assert_close(
            difference_x_gradient(base["fwd"], other["fwd"], base["bwd"])[path], td["attr", path]
        )
    assert (
        grad_cam(torch.ones(2, 3, 4, 4), -torch.ones(2, 3, 4, 4), relu=True).tolist()
        == torch.zeros(2, 1, 4, 4).tolist()
    )
    with pytest.raises(ValueError, match="needs at least one layer"):
        attention_rollout([])


def test_activation_maximisation_climbs_and_stays_where_it_may_be():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.zeros(5, 3)
    method = ActivationMaximisation(target=1, n_steps=20, rate=0.2, project=lambda x: x.clamp(-1, 1))
    td = run(method, model, {"input": x}, (5,))
    found = td["attr", "input"]
    assert (model(found)[:, 1] > td["output"][:, 1] + 0.05).all()
    assert found.abs().max() <= 1
    torch.testing.assert_close(td["output"], model(x).detach())
    with pytest.raises(AttributionError, match="cannot maximise 2 targets"):
        run(ActivationMaximisation(target=[0, 1]), model, {"input": x}, (5,))


def test_integrated_gradients_of_a_node_sum_to_the_exact_effect_of_patching_it():
    model, data = setting()
    td = run(
        IntegratedGradients("blocks.0.mlp", target=difference, n_steps=60),
        model,
        {"input": data["input"], "baseline": data["corrupt"]},
    )
    base = difference({"output": model(data["input"])}).detach()
    value = outputs(model, "blocks.0.mlp", data["corrupt"]["input"])
    exact = base - patched_metric(model, "blocks.0.mlp", data["input"], value)
    torch.testing.assert_close(td["attr", "blocks.0.mlp"].sum((1, 2)), exact, rtol=0, atol=1e-8)


def test_a_counterfactual_of_no_input_is_refused_with_near_misses():
    model, data = setting()
    ids = data["input"]
    with pytest.raises(AttributionError, match=r"the corrupt has an entry 'inputs', .* did you mean 'input'?"):
        run(AttributionPatching("embed", target=difference), model, {"input": ids, "corrupt": {"inputs": ids}})
    beside = {"input": ids, "labels": ids, "corrupt": {"input": ids, "labels": ids}}  # for somebody else
    assert run(AttributionPatching("embed", target=difference), model, beside)["attr", "embed"].abs().max() == 0


@pytest.mark.parametrize("n_steps", [None, 3])
def test_gpt2s_position_embeddings_are_writers_like_any_other(n_steps):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    lm = transformers.GPT2LMHeadModel(config).double().eval()
    writers = r"transformer\.(wte|wpe)|transformer\.h\.\d+\.mlp"
    readers = r"transformer\.h\.\d+\.ln_\d|transformer\.ln_f"
    method = EdgeAttributionPatching(
        writers, readers, n_steps=n_steps, embeddings=r"transformer\.wte", target=lambda td: td["logits"][:, -1, 3]
    )
    ids = {"input_ids": torch.randint(13, (3, 5)), "corrupt": {"input_ids": torch.randint(13, (3, 5))}}
    with method.prepare(lm, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
        edges = hooked(TensorDict(ids, batch_size=[3]))["attr"]
    assert len(edges["transformer.wpe"].keys()) == 5
    for score in edges["transformer.wpe"].values():
        assert torch.equal(score, torch.zeros(3, dtype=torch.float64))  # positions are the same in both inputs
    assert edges["transformer.wte", "transformer.ln_f"].abs().min() > 0
