"""Hugging Face BERT from a tiny configuration: masks, pooled outputs, tuples and ModelOutputs."""

import pytest
import torch
from tensordict import TensorDict

from rounding import assert_same_but_rounding
from small_models import output_gradients
from tdcache import ActivationCaching

transformers = pytest.importorskip("transformers")


@pytest.fixture
def config():
    return transformers.BertConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=20,
        max_position_embeddings=32,
    )


@pytest.fixture
def model(config):
    return transformers.BertModel(config).eval()


@pytest.fixture
def batch():
    ids = torch.randint(1, 20, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    return TensorDict({"ids": ids, "mask": mask}, batch_size=2)


KEYS = {"ids": "input_ids", "mask": "attention_mask"}


def test_field_names_choose_among_the_outputs(model, batch):
    context = ActivationCaching("pooler").prepare(model, in_keys=KEYS, out_keys=["pooler_output", "last_hidden_state"])
    with context as hooked, torch.no_grad():
        hooked(batch)
    wanted = model(input_ids=batch["ids"], attention_mask=batch["mask"])
    assert torch.equal(batch["last_hidden_state"], wanted.last_hidden_state)
    assert torch.equal(batch["pooler_output"], wanted.pooler_output)
    assert torch.equal(hooked.cache["pooler"], wanted.pooler_output)


def test_other_names_take_the_outputs_in_order(model, batch):
    with (
        ActivationCaching("pooler").prepare(model, in_keys=KEYS, out_keys=["hidden", "pooled"]) as hooked,
        torch.no_grad(),
    ):
        hooked(batch)
    assert batch["hidden"].shape == (2, 6, 8)
    assert torch.equal(batch["pooled"], hooked.cache["pooler"])


def test_a_model_that_returns_tuples_is_no_different(model, batch):
    with (
        ActivationCaching(r"encoder\.layer\.\d+").prepare(model, in_keys=KEYS, out_keys=["hidden"]) as hooked,
        torch.no_grad(),
    ):
        hooked(batch, return_dict=False)
    assert torch.equal(batch["hidden"], hooked.cache["encoder.layer.1"])


def test_attention_and_feed_forward_outputs_with_gradients(config, batch):
    model = transformers.BertForSequenceClassification(config).eval()
    pattern = r"bert\.encoder\.layer\.(?P<layer>\d+)\.(?P<kind>attention|output)"
    call = lambda: model(batch["ids"], attention_mask=batch["mask"]).logits[:, 0].sum()  # noqa: E731
    paths = [f"bert.encoder.layer.{layer}.output" for layer in range(2)]
    wanted = output_gradients(model, paths, call)
    with ActivationCaching(pattern, directions=["fwd", "bwd"], batch_dims=1).prepare(model) as hooked:
        call().backward()
    assert hooked.cache.batch_size == (2,)
    for path, grad in wanted.items():
        assert_same_but_rounding(hooked.cache["bwd", path], grad)  # those of autograd lie otherwise in memory
    assert (hooked.cache["fwd"] * hooked.cache["bwd"]).batch_size == (2,)


def test_an_embedding_of_integers_is_kept_with_its_gradient(model, batch):
    with ActivationCaching("embeddings", directions=["fwd", "bwd", "fwd_pre"]).prepare(
        model, in_keys=KEYS, out_keys=["y"]
    ) as hooked:
        hooked(batch)["y"].sum().backward()
    assert hooked.cache["fwd", "embeddings"].shape == hooked.cache["bwd", "embeddings"].shape == (2, 6, 8)
    assert torch.equal(hooked.cache["fwd_pre", "embeddings"], batch["ids"])
