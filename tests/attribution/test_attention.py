"""The QK fix where attention saturates, heads are grouped, or queries and keys are not what is multiplied; rollout."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache import AttributionError
from tdcache.attribution import AttentionRollout, QKAttributionPatching

F64 = torch.float64


class Grouped(nn.Module):
    """Attention with four query heads and two key heads, of inputs that are queries and keys already."""

    def __init__(self, mask="causal", dtype=F64, bias=0.0, scale=0.5):
        super().__init__()
        self.q, self.k, self.pattern, self.mask = nn.Identity(), nn.Identity(), nn.Identity(), mask
        self.scale = scale
        self.value, self.bias = torch.randn(4, 5, 3, dtype=F64).to(dtype), bias

    def visible(self, rows):
        ones = torch.ones(5, 5, dtype=torch.bool)
        return ones.tril() if isinstance(self.mask, str) else self.mask.repeat(rows // 2, 1, 1, 1)

    def attend(self, q, k):
        logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * self.scale + self.bias
        return logits.masked_fill(~self.visible(len(q)), -torch.inf).softmax(-1)

    def forward(self, q, k):
        q, k = self.q(q).unflatten(-1, (4, 4)).transpose(1, 2), self.k(k).unflatten(-1, (2, 4)).transpose(1, 2)
        return (self.pattern(self.attend(q, k)) * self.value.sum(-1).unsqueeze(1)).sum((1, 2, 3))[:, None]


def data(q, k, other_q, other_k):
    return TensorDict({"q": q, "k": k, "corrupt": {"q": other_q, "k": other_k}}, batch_size=[2])


def inputs(dtype=F64, size=1.0):
    return [size * torch.randn(2, 5, width, dtype=F64).to(dtype) for width in (16, 8, 16, 8)]


def run(model, tensors, **options):
    options = {"heads": 4, "target": 0} | options
    with QKAttributionPatching("q", "k", "pattern", **options).prepare(model, in_keys=["q", "k"]) as hooked:
        return hooked(data(*tensors))["attr"]


def by_hand(model, tensors, scale=0.5):
    """One query, and one key with all its queries, replaced at a time; the output is linear in the pattern."""
    q, k, other_q, other_k = (each.double() for each in tensors)
    base = model.double()(q, k)[:, 0]
    model.value = model.value.double()
    queries, keys = torch.zeros(2, 5, 4, dtype=F64), torch.zeros(2, 5, 2, dtype=F64)
    for at in range(5):
        for head in range(4):
            new = q.clone()
            new[:, at, 4 * head : 4 * head + 4] = other_q[:, at, 4 * head : 4 * head + 4]
            queries[:, at, head] = model(new, k)[:, 0] - base
        for head in range(2):
            new = k.clone()
            new[:, at, 4 * head : 4 * head + 4] = other_k[:, at, 4 * head : 4 * head + 4]
            keys[:, at, head] = model(q, new)[:, 0] - base
    return queries, keys


@pytest.mark.parametrize("mask", [None, "causal"])
def test_queries_and_grouped_keys_have_the_effect_of_replacing_them(mask):
    model, tensors = Grouped(), inputs()
    attr = run(model, tensors, mask=mask)
    queries, keys = by_hand(model, tensors)
    torch.testing.assert_close(attr["q"], queries, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(attr["k"], keys, rtol=1e-9, atol=1e-10)
    assert keys.abs().max() > 0.01 < queries.abs().max()


def saturated():
    """Logits 17 apart, of which half precision shows only the larger."""
    q, k = torch.zeros(2, 5, 16), torch.zeros(2, 5, 8)
    q[..., ::4], k[:, 0, ::4] = 1.0, 34.0
    other_q, other_k = torch.zeros_like(q), k.clone()
    return [each.half() for each in (q, k, other_q, other_k)]


def test_zeros_of_saturated_attention_are_no_mask():
    model = Grouped(dtype=torch.float16).half()
    tensors = saturated()
    with pytest.raises(AttributionError, match=r"'pattern' has \d+ zeros that may be masked or may have come from und"):
        run(model, tensors)
    attr = run(model, tensors, mask="causal")
    queries, _ = by_hand(model, tensors)
    assert queries.abs().max() > 0.1
    # The gradients are sums of three numbers of size 1, in half precision.
    torch.testing.assert_close(attr["q"].double(), queries, rtol=1e-2, atol=1e-2)


def test_a_mask_that_one_head_tells_holds_for_the_others():
    model, tensors = Grouped(dtype=torch.float16).half(), saturated()
    tensors[0][..., 4:] = 0  # three heads are not saturated
    attr = run(model, tensors)
    torch.testing.assert_close(attr["q"], run(model, tensors, mask="causal")["q"])


def test_a_mask_per_row_is_given_as_a_tensor():
    visible = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    visible[0, ..., :2] = False
    model, tensors = Grouped(visible), inputs()
    queries, keys = by_hand(model, tensors)
    for mask in (None, visible):
        attr = run(model, tensors, mask=mask)
        torch.testing.assert_close(attr["q"], queries, rtol=1e-9, atol=1e-10)
        assert queries.abs().max() > 0.01
        torch.testing.assert_close(attr["k"], keys, rtol=1e-9, atol=1e-10)


def test_rows_that_see_no_key_have_no_effect():
    class Blind(Grouped):
        def attend(self, q, k):
            logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * self.scale
            logits[::2, :, 2] = torch.finfo(F64).min  # as masks of large numbers leave it
            return logits.softmax(-1)

    attr = run(Blind(), inputs())
    assert (attr["q"][0, 2] == 0).all()
    assert attr["q"][0, 1].abs().min() > 0


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Grouped(bias=torch.randn(5, 5, dtype=F64)), {}, "'pattern' is not softmax"),
        (Grouped(), {"scale": 0.7}, "or scale= is another"),
        (Grouped(), {"heads": 8}, r"are \(2, 8, 5, 5\), \(batch, heads"),
        (Grouped(), {"heads": 5}, "'q' gives 16 features, not those of 5 heads"),
        (Grouped(), {"mask": "diagonal"}, "mask= is 'causal' or a boolean tensor.*'diagonal'"),
        (Grouped(), {"mask": torch.ones(5, 5)}, "got torch.float32"),
        (Grouped(), {"mask": torch.ones(4, 4, dtype=torch.bool)}, r"mask= has shape \(4, 4\)"),
        (Grouped(), {"mask": torch.eye(5, dtype=torch.bool)}, "positive where mask= hides"),
    ],
    ids=["bias", "scale", "heads", "odd heads", "word", "floats", "shape", "lie"],
)
def test_what_does_not_give_the_pattern_is_refused(model, options, message):
    with pytest.raises(AttributionError, match=message):
        run(model, inputs(), **options)


def test_key_heads_that_do_not_divide_the_query_heads_are_refused():
    class Three(Grouped):
        def forward(self, q, k):
            self.k(k.repeat(1, 1, 2)[..., :12])
            q = self.q(q).unflatten(-1, (4, 4)).transpose(1, 2)
            return self.pattern((q @ q.transpose(-1, -2)).softmax(-1)).sum((1, 2, 3))[:, None]

    with pytest.raises(AttributionError, match="'k' gives 3 heads of 4 features, which do not fit 4 query heads of 4"):
        run(Three(), inputs())


def test_llama_before_its_rotary_embeddings_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", initializer_range=0.5,
    )  # fmt: skip
    lm = transformers.LlamaForCausalLM(config).eval()
    block = r"model\.layers\.0\.self_attn"
    method = QKAttributionPatching(
        rf"{block}\.q_proj", rf"{block}\.k_proj", block, heads=4, pick=1, target=lambda td: td["logits"][:, -1, 3]
    )
    ids = {"input_ids": torch.randint(17, (2, 6)), "corrupt": {"input_ids": torch.randint(17, (2, 6))}}
    prepared = method.prepare(lm, in_keys=["input_ids"], out_keys=["logits"])
    with pytest.raises(AttributionError, match="rotary embeddings"), prepared as hooked:
        hooked(TensorDict(ids, batch_size=[2]))


def test_rollout_by_gradients_mixes_in_the_residual():
    model, tensors = Grouped(), inputs()

    def rollout(residual):
        method = AttentionRollout("pattern", pick=None, gradient=True, residual=residual, target=0)
        with method.prepare(model, in_keys=["q", "k"]) as hooked:
            return hooked(TensorDict({"q": tensors[0], "k": tensors[1]}, batch_size=[2]))["attr", "rollout"]

    q, k = tensors[0].unflatten(-1, (4, 4)).transpose(1, 2), tensors[1].unflatten(-1, (2, 4)).transpose(1, 2)
    heads = (model.attend(q, k) * model.value.sum(-1).unsqueeze(1)).relu().mean(1)
    torch.testing.assert_close(rollout(0.5), torch.eye(5, dtype=F64) + heads)
    for residual in (0.0, 0.2, 1.0):
        torch.testing.assert_close(rollout(residual), 2 * (residual * torch.eye(5, dtype=F64) + (1 - residual) * heads))
