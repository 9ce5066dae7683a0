"""What is taken for samples and what for batches, and what is known of a model without reading all of it."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from harvesting.harvest_data import Counting
from tdcache import harvest
from tdcache.harvesting.plan import model_fingerprint
from tdcache.harvesting.source import Source

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


class Numbered:
    """A map-style dataset that knows nothing of torch, as those of Hugging Face."""

    def __len__(self):
        return len(X)

    def __getitem__(self, number):
        if not 0 <= number < len(X):
            raise IndexError(number)
        return {"x": X[number]}


@pytest.mark.parametrize("numel", [1, 2, 15, 16, 17, 1000, 2**25])
def test_the_fingerprint_looks_at_values_of_any_buffer_the_last_one_included(numel):
    model = nn.Module()
    model.register_buffer("values", torch.zeros(numel, dtype=torch.int8))
    before = model_fingerprint(model)
    model.values[-1] = 1
    assert model_fingerprint(model) != before


def test_a_tensor_is_a_dataset_of_its_rows(tmp_path):
    model = Counting()
    dataset = harvest(model, X, tmp_path / "a.acts", select="first", batch_size=8)
    assert dataset["first"].shape == (20, 4)
    assert torch.equal(dataset["seq"][...], torch.arange(20))
    assert torch.allclose(dataset["first"][...], model.first(X).detach(), atol=1e-6)
    assert model.calls == 3


def test_a_tensordict_is_a_dataset_of_its_rows(tmp_path):
    module = TensorDictModule(nn.Linear(4, 3), in_keys=["x"], out_keys=["y"])
    rows = TensorDict({"x": X}, batch_size=[20])
    dataset = harvest(module, rows, tmp_path / "a.acts", select="module", batch_size=8)
    assert torch.equal(dataset["seq"][...], torch.arange(20))
    assert torch.allclose(dataset["module"][...], module.module(X).detach(), atol=1e-6)
    assert [step.batch.batch_size for step in Source(rows, batch_size=8).walk(1, lambda unit: "run")] == [
        (8,),
        (8,),
        (4,),
    ]


def test_whatever_has_numbered_samples_is_a_dataset(tmp_path):
    model = Counting()
    dataset = harvest(model, Numbered(), tmp_path / "a.acts", select="first", batch_size=8)
    assert torch.equal(dataset["seq"][...], torch.arange(20))
    assert torch.allclose(dataset["first"][...], model.first(X).detach(), atol=1e-6)
    stacked = Source(Numbered(), batch_size=8, collate=lambda samples: torch.stack([each["x"] for each in samples]))
    assert torch.equal(stacked.first(), X[:8])


def test_lists_tuples_and_iterators_hold_batches():
    for data in (list(X.split(8)), X.split(8), iter(X.split(8))):
        assert torch.equal(Source(data, batch_size=3).first(), X[:8])


def test_a_dataset_of_hugging_face_is_one_of_samples(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": X.tolist()}).with_format("torch")
    dataset = harvest(Counting(), rows, tmp_path / "a.acts", select="first", batch_size=8)
    assert torch.equal(dataset["seq"][...], torch.arange(20))
