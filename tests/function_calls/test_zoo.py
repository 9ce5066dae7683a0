"""Sixty families of transformers: outputs to the bit, patterns, edits and gradients beside an eager twin."""

import pytest

transformers = pytest.importorskip("transformers")

import call_zoo  # noqa: E402 - it needs transformers

FAMILIES = (
    "apertus audio-spectrogram-transformer bart beit bert biogpt blenderbot bloom clip_vision_model "
    "codegen cohere cohere2 data2vec-text dinov2 distilbert electra exaone4 flex_olmo gemma gemma2 "
    "gemma3_text glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite helium ijepa jetmoe layoutlm "
    "lfm2 llama llama4_text longt5 m2m_100 minimax mistral mixtral modernbert mpt nllb-moe olmo2 olmoe "
    "opt pegasus phi phi3 qwen2 qwen3 roberta roformer starcoder2 t5 vit wav2vec2 whisper xglm"
)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILIES.split())
def test_places_of_attention_agree_with_an_eager_twin(name):
    said = call_zoo.check(name, "sdpa") or call_zoo.check(name, "eager")
    assert "compared" in said
