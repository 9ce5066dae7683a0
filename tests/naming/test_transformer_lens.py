"""Beside TransformerLens' bridge: every hook name that both have holds the same numbers, or the arithmetic decides.

``DISAGREEMENTS`` lists where they differ; docs/names_peers.md says which identity each of theirs breaks.
"""

import copy
import warnings

import pytest
import torch

import families
import tdcache
from tdcache.naming.prove_values import read_places

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of its own, on import
    lens = pytest.importorskip("transformer_lens")
if not hasattr(lens, "TransformerBridge"):
    pytest.skip("the bridge came with 3.0", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # its models warn of themselves

SCORES = "blocks.1.attn.hook_attn_scores"
DISAGREEMENTS = {
    "bert": {
        SCORES,
        "hook_embed",
        "blocks.1.hook_attn_out",
        "blocks.1.attn.hook_out",
        "blocks.1.hook_resid_mid",
    },
    "bloom": {"blocks.1.attn.hook_out", "blocks.1.mlp.hook_out"},
    "gpt_neo": {SCORES},
    "gptj": {SCORES},
    "gpt_oss": {SCORES},
    "mpt": {"blocks.1.mlp.hook_out"},
    "nemotron": {"blocks.1.ln1.hook_normalized", "blocks.1.ln2.hook_normalized", "ln_final.hook_normalized"},
    "opt": {SCORES},
}
AGREEING = (
    *("codegen", "cohere", "falcon", "gemma", "gemma2", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite"),
    *("llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
    *("stablelm", "starcoder2"),
)
TOKENS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))


def tokenizer():
    from tokenizers import Tokenizer, models

    words = models.WordLevel({f"t{number}": number for number in range(60)}, unk_token="t0")
    special = {"unk_token": "t0", "pad_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


def off(ours, theirs):
    """By how much two values differ, relative to the largest; masked scores are minus infinity or nearly so."""
    if ours.numel() != theirs.numel() and ours.shape[:1] == (1,):
        ours = ours.expand_as(theirs)
    ours = ours.reshape(theirs.shape)
    seen = (ours > -1e30) & (theirs > -1e30)
    return float((ours[seen] - theirs[seen]).abs().max() / theirs[seen].abs().max())


@pytest.mark.parametrize("family", sorted((*AGREEING, *DISAGREEMENTS)))
def test_what_both_name_is_the_same(family, tmp_path):
    model = families.build(family)
    wrapped = copy.deepcopy(model)
    wrapped.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    bridge = lens.TransformerBridge.boot_transformers(str(tmp_path), hf_model=wrapped, tokenizer=None)
    _, theirs = bridge.run_with_cache(TOKENS)
    table = tdcache.names(model, style="transformer_lens")
    ours = read_places(model, table, {"input_ids": TOKENS, "use_cache": False})
    both = [name for name in table if name in theirs and "blocks.0." not in name]
    assert len(both) >= 12
    different = {name for name in both if off(ours[name], theirs[name].detach()) > 1e-4}  # float32, two kernels
    assert different == DISAGREEMENTS.get(family, set())
