"""Values whose rows do not lie along the batch's own tokens, and columns that stand beside the rows."""

import pytest
import torch
from torch import nn

from harvesting.harvest_data import Padded, Tokens, batches_of, encoder
from tdcache import harvest
from tdcache.errors import CaptureError, SelectionError, SpecError, StoreError


class Mixture(nn.Module):
    """Routes flattened tokens, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.gate, self.out = nn.Embedding(50, 6), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.table(input_ids)
        self.gate(hidden.flatten(0, 1))
        return self.out(hidden)


def test_fault_rows_of_a_router_that_sees_flattened_tokens_are_those_of_the_tokens(tmp_path):
    model = Mixture()
    data = batches_of(Tokens(), 4, Padded("left"))
    dataset = harvest(model, data, tmp_path / "a.acts", select="gate|out", drop="pad|bos")
    assert dataset["gate"].shape == (len(dataset), 3)
    wanted = model.table(dataset["tok"][...].long())
    torch.testing.assert_close(dataset["gate"][...], model.gate(wanted), rtol=1e-5, atol=1e-6)  # other batch sizes
    torch.testing.assert_close(dataset["out"][...], model.out(wanted), rtol=1e-5, atol=1e-6)
    alone = harvest(model, data, tmp_path / "b.acts", select="gate", drop="pad|bos")
    assert torch.equal(alone["gate"][...], dataset["gate"][...])


class Patches(nn.Module):
    """A vision transformer's beginning: [CLS] and one token per patch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.first, self.block = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

    def forward(self, pixel_values):
        patches = self.cut(pixel_values).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.first.expand(len(patches), -1, -1), patches], 1))


@pytest.mark.parametrize("as_mapping", [True, False])
def test_fault_patches_of_images_are_rows_and_cls_is_position_0(tmp_path, as_mapping):
    model, images = Patches(), torch.randn(10, 3, 8, 12)
    data = [{"pixel_values": part} if as_mapping else part for part in images.split(4)]
    whole = torch.cat([model(part).detach() for part in images.split(4)])
    every = harvest(model, data, tmp_path / "a.acts", select="block", rows="tokens")
    assert torch.equal(every["block"][...], whole.flatten(0, 1))
    assert every["seq"][...].tolist() == [image for image in range(10) for _ in range(7)]
    assert every["pos"][...].tolist() == list(range(7)) * 10
    cls = harvest(model, data, tmp_path / "b.acts", select="block", rows="tokens", positions=0)
    assert torch.equal(cls["block"][...], whole[:, 0])
    patches = harvest(model, data, tmp_path / "c.acts", select="block", rows="tokens", drop="bos")
    assert torch.equal(patches["block"][...], whole[:, 1:].flatten(0, 1))
    again = harvest(model, data, tmp_path / "b.acts", select="block", rows="tokens", positions=0)
    assert len(again) == 10
    samples = harvest(model, data, tmp_path / "d.acts", select="block")
    assert samples["block"].shape == (10, 7, 8)


def test_columns_of_samples_and_of_tokens_stand_beside_the_rows(tmp_path):
    batches = batches_of(Tokens(), 4, Padded("left"))
    first = 0
    for batch in batches:
        size = batch["input_ids"].shape
        batch["label"] = (torch.arange(size[0]) + first) * 10
        batch["offsets"] = torch.stack([batch["input_ids"], batch["input_ids"] + 1], -1)
        first += size[0]
    columns = {"label": "label", "offsets": "offsets", "twice": lambda batch: 2 * batch["label"]}
    options = {"select": r"encoder\.layer\.1", "drop": "pad|bos"}
    dataset = harvest(encoder(), batches, tmp_path / "a.acts", columns=columns, **options)
    assert dataset.row_keys == ("seq", "pos", "tok", "label", "offsets", "twice")
    assert torch.equal(dataset["label"][...], dataset["seq"][...] * 10)
    assert torch.equal(dataset["twice"][...], dataset["seq"][...] * 20)
    assert torch.equal(dataset["offsets"][...], torch.stack([dataset["tok"][...], dataset["tok"][...] + 1], 1).long())
    assert len(dataset.where(lambda rows: rows["label"] == 30)) == len(dataset.sequence(3))
    assert len(harvest(encoder(), batches, tmp_path / "a.acts", columns=columns, **options)) == len(dataset)
    with pytest.raises(SpecError, match="columns_from"):
        harvest(encoder(), batches, tmp_path / "a.acts", columns={**columns, "twice": "label"}, **options)
    plain = harvest(encoder(), batches, tmp_path / "b.acts", **options)
    assert torch.equal(plain["encoder.layer.1"][...], dataset["encoder.layer.1"][...])


def test_labels_of_a_tuple_are_a_column_by_their_place(tmp_path):
    x, labels = torch.randn(10, 4), torch.arange(10)
    data = torch.utils.data.TensorDataset(x, labels)
    dataset = harvest(nn.Linear(4, 2), data, tmp_path / "a.acts", select="", columns={"label": 1}, batch_size=3)
    assert torch.equal(dataset["label"][...], labels)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (["label"], r"column 'label' comes from 'label', which the batch has not \('x', 'name', 'odd'\)"),
        (["name"], r"column 'name' holds list, no numbers .*; store a number for each text"),
        (["odd"], r"column 'odd' has values of shape \(3,\), and the batch has rows along \(2,\)"),
    ],
)
def test_what_is_no_column_is_refused(tmp_path, columns, text):
    data = [{"x": torch.ones(2, 4), "name": ["a", "b"], "odd": torch.ones(3)}]
    with pytest.raises(CaptureError, match=text):
        harvest(nn.Sequential(nn.Linear(4, 2)), data, tmp_path / "a.acts", select="0", columns=columns)


def test_columns_cannot_have_names_that_are_taken_and_stay_of_one_kind(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    for name in ("seq", "0"):
        with pytest.raises(SelectionError, match=f"no column can be called '{name}': a site or a row's own column"):
            harvest(model, [torch.ones(2, 4)], tmp_path / "a.acts", select="0", columns={name: 1})
    data = [{"x": torch.ones(2, 4), "a": torch.ones(2)}, {"x": torch.ones(2, 4), "a": torch.ones(2).long()}]
    with pytest.raises(CaptureError, match=r"column 'a' is .*int64.* in this batch, and .*float32.* in the first"):
        harvest(model, data, tmp_path / "a.acts", select="0", columns=["a"], in_keys=["x"])


def test_fault_underflow_is_counted_and_never_refused(tmp_path):
    x = torch.tensor([[1e-9, 1.0], [0.0, -1e-9]])
    dataset = harvest(nn.Sequential(nn.Identity()), [x, x], tmp_path / "a.acts", select="0", dtype="float16")
    assert dataset.statistics["0"].underflow == 4
    assert [shard.info.underflow for shard in dataset.shards] == [{"0": 2}, {"0": 2}]


class Letters:
    """A tokenizer of one letter per token."""

    name_or_path = "letters"

    def decode(self, ids):
        return "".join(chr(97 + each % 26) for each in ids)


def test_the_text_of_tokens_is_that_of_the_tokenizer_that_the_store_names(tmp_path, monkeypatch):
    data = [{"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}]
    dataset = harvest(Mixture(), data, tmp_path / "a.acts", select="out", tokenizer=Letters())
    assert dataset.spec["tokenizer"] == "letters"
    assert dataset.text([0, 2, -1], tokenizer=Letters()) == ["b", "d", "g"]
    monkeypatch.setattr("tdcache.store.tokenizers._loaded", {"letters": Letters()}.get)
    assert dataset.text() == list("bcdefg")
    assert dataset.where(lambda rows: rows["pos"] == 0).text() == ["b", "e"]
    with pytest.raises(SpecError, match="tokenizer"):
        harvest(Mixture(), data, tmp_path / "a.acts", select="out", tokenizer="other")


def test_text_of_rows_whose_tokenizer_nobody_knows_is_refused(tmp_path):
    data = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    with pytest.raises(SelectionError, match=r"tokenizer= is a name, or a tokenizer that knows its own .*; got object"):
        harvest(Mixture(), data, tmp_path / "a.acts", select="out", tokenizer=object())
    with pytest.raises(
        StoreError, match=r"a\.acts does not say whose token ids these are; give tokenizer= here, or to"
    ):
        harvest(Mixture(), data, tmp_path / "a.acts", select="out").text()
    with pytest.raises(StoreError, match="has no token ids: its data had none"):
        harvest(nn.Linear(2, 2), [torch.ones(3, 2)], tmp_path / "b.acts", select="").text()
    missing = harvest(Mixture(), data, tmp_path / "c.acts", select="out", tokenizer=str(tmp_path / "nowhere"))
    pytest.importorskip("transformers")
    with pytest.raises(StoreError, match=r"the tokenizer '.*nowhere' of .*c\.acts cannot be loaded: "):
        missing.text()


def test_text_without_transformers_names_the_extra(tmp_path, monkeypatch):
    data = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    dataset = harvest(Mixture(), data, tmp_path / "a.acts", select="out", tokenizer="unheard of")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(StoreError, match=r"text of tokens needs transformers: pip install 'tdcache\[hf\]'"):
        dataset.text()
