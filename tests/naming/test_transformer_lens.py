"""TransformerLens' bridge and our spelling of its names: the same values under every name that both have."""

import copy
import warnings
from importlib.metadata import version

import pytest
import torch

import tdcache
from tdcache import ActivationCaching

transformers = pytest.importorskip("transformers")
lens = pytest.importorskip("transformer_lens")
if int(version("transformer-lens").partition(".")[0]) < 4:
    pytest.skip("in 3.x the bridge is in the making", allow_module_level=True)

TOKENS = torch.tensor([[5, 6, 7, 9], [3, 1, 2, 8]])
SIZES = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {
    **SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "head_dim": 8,
}  # fmt: skip
FAMILIES = {"gpt2": {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 4}, "qwen3": WIDE, "gemma2": WIDE}
# Theirs is a copy for each row; ours is as the model has it.
BROADCAST = {"hook_pos_embed"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_both_have_are_the_same_values(family, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    table = tdcache.names(model, style="transformer_lens")
    with ActivationCaching(".*", names=table).prepare(model) as hooked, torch.no_grad():
        model(TOKENS)
    wrapped = copy.deepcopy(model)
    wrapped.save_pretrained(tmp_path)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bridge = lens.TransformerBridge.boot_transformers(str(tmp_path), hf_model=wrapped, tokenizer=None)
        _, theirs = bridge.run_with_cache(TOKENS)
    both = [name for name in table if name in theirs]
    assert len(both) > 30
    for name in both:
        ours = hooked.cache[name]
        expected = theirs[name].expand_as(ours) if name not in BROADCAST else theirs[name][:1]
        torch.testing.assert_close(
            ours, expected, rtol=0, atol=2e-5, msg=name
        )  # they compute in float32, in another order
