"""What is taken for samples and what for batches, and what is known of a model without reading all of it."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from harvesting.harvest_data import Counting
from tdcache import harvest
from tdcache.errors import SelectionError, SpecError
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


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_of_hugging_face_without_a_format_is_one_of_rows(tmp_path, streamed):
    rows = pytest.importorskip("datasets").Dataset.from_dict({"x": X.tolist()})
    rows = rows.to_iterable_dataset() if streamed else rows
    dataset = harvest(Counting(), rows, tmp_path / "a.acts", select="first", batch_size=8)
    assert torch.equal(dataset["seq"][...], torch.arange(20))


class Stream(IterableDataset):
    """Samples one by one."""

    def __iter__(self):
        return iter(X)


def test_fault_an_iterable_dataset_yields_samples(tmp_path):
    model = Counting()
    dataset = harvest(model, Stream(), tmp_path / "a.acts", select="first", batch_size=8)
    assert torch.equal(dataset["seq"][...], torch.arange(20))
    assert torch.allclose(dataset["first"][...], model.first(X).detach(), atol=1e-6)


class Batched(IterableDataset):
    def __iter__(self):
        return iter(X.split(8))


def test_a_loader_without_a_batch_size_says_that_items_are_batches(tmp_path):
    loader = DataLoader(Batched(), batch_size=None)
    dataset = harvest(Counting(), loader, tmp_path / "a.acts", select="first")
    assert torch.equal(dataset["seq"][...], torch.arange(20))


@pytest.mark.parametrize(
    "data",
    [list(X[:3]), tuple(X[:3]), [{"x": row} for row in X[:3]], [(row, torch.tensor(1)) for row in X[:3]]],
    ids=["list", "tuple", "mappings", "with labels"],
)
def test_fault_items_that_may_be_samples_as_well_as_batches_are_refused_with_both_readings(tmp_path, data):
    text = (
        r"a tensor of shape \(4,\), which is one sample of 4 features or a batch of 4 samples of one number each; for"
    )
    for each in (data, iter(data)):
        with pytest.raises(
            SelectionError, match=text + r" samples give .* for batches DataLoader\(data, batch_size=None"
        ):
            harvest(Counting(), each, tmp_path / "a.acts", select="first")
    assert not (tmp_path / "a.acts").exists()
    told = harvest(Counting(), DataLoader(list(X[:3]), batch_size=2), tmp_path / "b.acts", select="first")
    assert told["first"].shape == (3, 4)


def test_arrays_are_tensors_as_data_as_batches_and_inside_them(tmp_path):
    x = X.numpy()
    for number, data in enumerate(
        (x, [x[:8], x[8:]], [{"x": x[:8]}, {"x": x[8:]}], [(x[:8], "label"), (x[8:], "label")])
    ):
        dataset = harvest(Counting(), data, tmp_path / f"{number}.acts", select="first", batch_size=8)
        assert torch.allclose(dataset["first"][...], Counting().first(X).detach(), atol=1e-6)
        assert dataset.sequences == 20


class Words(nn.Module):
    """Takes strings."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(97, 4), nn.Linear(4, 4)

    def forward(self, texts):
        return self.head(self.table(torch.nn.utils.rnn.pad_sequence([codes(text) for text in texts], batch_first=True)))


def codes(text):
    return torch.tensor([ord(letter) % 97 for letter in text])


def test_batches_may_be_lists_of_strings_and_other_strings_are_other_data(tmp_path):
    torch.manual_seed(0)
    model, texts = Words(), ["one", "two", "three", "four", "five"]
    wanted = torch.cat([model(texts[:2]), model(texts[2:])]).detach()
    batches = [texts[:2], texts[2:]]
    dataset = harvest(model, batches, tmp_path / "a.acts", select="head")
    assert torch.equal(dataset["head"][...], wanted)
    by_hand = harvest(
        model, batches, tmp_path / "b.acts", select="head", forward=lambda model, batch: model([*batch]), tag="words"
    )
    assert torch.equal(by_hand["head"][...], wanted)
    with pytest.raises(SpecError, match="first_batch"):
        harvest(model, [["six", "two"], texts[2:]], tmp_path / "a.acts", select="head")


def test_lists_of_samples_that_forward_collates_itself_are_counted_as_samples(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 4), nn.Linear(4, 3))
    samples = [torch.arange(length) + 1 for length in (3, 5, 2, 4)]

    def forward(model, batch):
        return model(torch.nn.utils.rnn.pad_sequence(batch, batch_first=True))

    data = DataLoader([samples[:2], samples[2:]], batch_size=None, collate_fn=list)
    dataset = harvest(model, data, tmp_path / "a.acts", select="1", forward=forward)
    assert dataset["1"].shape == (4, 3)
    assert dataset["seq"][...].tolist() == [0, 1, 2, 3]


def test_entries_of_a_tensordict_become_arguments_by_name_or_by_in_keys(tmp_path):
    model = Counting()
    wanted = model.first(X).detach()
    named = [TensorDict({"x": part, "y": part[:, 0]}, batch_size=[len(part)]) for part in X.split(8)]
    dataset = harvest(model, named, tmp_path / "a.acts", select="first")
    assert torch.allclose(dataset["first"][...], wanted, atol=1e-6)
    nested = [TensorDict({"in": {"obs": part}}, batch_size=[len(part)]) for part in X.split(8)]
    dataset = harvest(model, nested, tmp_path / "b.acts", select="first", in_keys=[("in", "obs")])
    assert torch.allclose(dataset["first"][...], wanted, atol=1e-6)
    mappings = [{"other": part[:, 0], "obs": part} for part in X.split(8)]
    dataset = harvest(model, mappings, tmp_path / "c.acts", select="first", in_keys=["obs"])
    assert torch.allclose(dataset["first"][...], wanted, atol=1e-6)
    with pytest.raises(SelectionError, match=r"in_keys= asks for 'obs', and the batch, a dict, has 'x'"):
        harvest(model, [{"x": X}], tmp_path / "d.acts", select="first", in_keys=["obs"])
    with pytest.raises(SelectionError, match=r"in_keys= asks for 'obs', and the batch, a Tensor, has no keys"):
        harvest(model, [X], tmp_path / "d.acts", select="first", in_keys=["obs"])


class Unformatted:
    """What a dataset of Hugging Face looks like before it has a format."""

    def __init__(self, kind=None):
        self.format = {"type": kind}

    def with_format(self, kind):
        return Unformatted(kind)

    def __len__(self):
        return len(X)

    def __getitem__(self, number):
        row = X[number]
        return {"x": row if self.format["type"] == "torch" else row.tolist()}


def test_a_dataset_of_hugging_face_without_a_format_gives_tensors(tmp_path):
    dataset = harvest(Counting(), Unformatted(), tmp_path / "a.acts", select="first", batch_size=8)
    assert torch.allclose(dataset["first"][...], Counting().first(X).detach(), atol=1e-6)
