"""The first batch and its forward, which shows what will be stored: read once, run once, and refused where unclear."""

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, LlamaConfig, LlamaModel

from harvesting.harvest_data import Counting
from tdcache import CaptureError, SelectionError, SpecError, StoreError, harvest
from tdcache.harvesting import preflight


class Embeds(nn.Module):
    """A value per token that names the token."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding.from_pretrained(torch.arange(1000.0).unsqueeze(1).repeat(1, 3))

    def forward(self, input_ids):
        return self.emb(input_ids)


def belong_together(store):
    return torch.equal(store["emb"][...][:, 0], store["tok"][...].float())


class Masked(Dataset):
    """Other tokens each time a sample is read."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return {"input_ids": torch.randint(1, 1000, (6,))}


class Stream(IterableDataset):
    """Can be read once."""

    def __init__(self):
        self.samples = iter([{"input_ids": torch.arange(6) + 10 * number} for number in range(8)])

    def __iter__(self):
        return self.samples


class OneGenerator:
    """Batches that are gone once they were handed out."""

    def __init__(self):
        self.batches = ({"input_ids": torch.arange(6).view(1, 6) + 10 * number} for number in range(8))

    def __iter__(self):
        return self.batches


@pytest.mark.parametrize("make", [Masked, lambda: DataLoader(Stream(), batch_size=2), OneGenerator], ids=range(3))
def test_every_value_stands_beside_its_own_token_and_no_batch_is_lost(tmp_path, make):
    store = harvest(Embeds(), make(), tmp_path / "a.acts", select="emb", batch_size=2)
    assert len(store) == 48
    assert belong_together(store)


class Drawn(RandomSampler):
    pass


@pytest.mark.parametrize(
    "options",
    [{"batch_sampler": BatchSampler(RandomSampler(range(8)), 2, False)}, {"sampler": Drawn(range(8)), "batch_size": 2}],
    ids=["batch sampler", "subclass"],
)
def test_loaders_that_draw_their_samples_are_refused(tmp_path, options):
    with pytest.raises(StoreError, match=r"draws its samples with (RandomSampler|Drawn), so that they have no fixed"):
        harvest(Embeds(), DataLoader(Masked(), **options), tmp_path / "a.acts", select="emb")


def test_a_loader_whose_workers_prepare_its_dataset_keeps_them(tmp_path):
    data = Prepared()
    loader = DataLoader(Subset(data, range(4)), batch_size=2, num_workers=1, worker_init_fn=prepare)
    assert len(harvest(nn.Linear(3, 2), loader, tmp_path / "a.acts", select="")) == 4


class Prepared(Dataset):
    ready = None

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return torch.full((3,), float(self.ready))


def prepare(worker):
    torch.utils.data.get_worker_info().dataset.dataset.ready = 1


def test_a_module_that_runs_several_times_in_a_forward_is_refused_where_it_is_seen_to(tmp_path):
    config = AlbertConfig(
        vocab_size=50,
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
    )
    data = [{"input_ids": torch.randint(1, 50, (2, 5))}]
    layer = r"encoder\.albert_layer_groups\.0\.albert_layers\.0"
    with pytest.raises(CaptureError, match=r"albert_layers.0' ran 3 times in one forward .*select the modules around"):
        harvest(AlbertModel(config), data, tmp_path / "a.acts", select=layer, stop_early=False)
    with pytest.raises(CaptureError, match=r"albert_layers.0' ran 3 times in one forward"):
        harvest(AlbertModel(config), data, tmp_path / "a.acts", select=f"{layer}|pooler")
    assert list(tmp_path.iterdir()) == []
    model = AlbertModel(config).eval()
    store = harvest(model, data, tmp_path / "a.acts", select=layer)  # a forward that ends at its first call
    hidden = model(**data[0], output_hidden_states=True).hidden_states
    assert torch.allclose(store[layer.replace("\\", "")][...], hidden[1].flatten(0, 1))
    with pytest.raises(CaptureError, match="ran 3 times"):
        harvest(model, [*data, *data], tmp_path / "b.acts", select=layer, stop_early=False)


def test_a_value_that_may_be_tokens_or_samples_is_asked_about(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model, data = BertModel(config), [{"input_ids": torch.randint(1, 50, (2, 8))}]
    for sites in ("pooler", r"pooler|encoder\.layer\.0"):
        with pytest.raises(CaptureError, match=r"'pooler' gives values of shape \(2, 8\): one number per token, or"):
            harvest(model, data, tmp_path / "a.acts", select=sites)
    store = harvest(model, data, tmp_path / "a.acts", select="pooler", rows="samples")
    assert store["pooler"].shape == (2, 8)
    assert harvest(model, data, tmp_path / "b.acts", select="pooler", rows="tokens")["pooler"].shape == (16,)


def test_options_with_slips_are_refused(tmp_path):
    data = [torch.ones(2, 4)]
    for options, text in (
        ({"rows": "sample"}, "rows is 'tokens', 'samples' or None, got 'sample'"),
        ({"overflow": "error"}, "overflow is 'raise' or 'count', got 'error'"),
        ({"max_rows": 2.0}, r"max_rows is at least 1, got 2\.0"),
    ):
        with pytest.raises(SelectionError, match=text):
            harvest(Counting(), data, tmp_path / "a.acts", select="first", **options)
    with pytest.raises(
        TypeError, match="preflight has no option 'dytpe'; there are 'match', 'direction', 'pick', 'dtype'"
    ):
        preflight(Counting(), data, tmp_path / "a.acts", select="first", dytpe=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


def half(model, batch):
    model(batch / 2)


def one_third(model, batch):
    model(batch / 3)


def test_another_way_of_calling_picking_or_another_setting_is_another_harvest(tmp_path):
    data = [torch.ones(2, 4)]

    def ask(model=None, **options):
        return harvest(model or Counting(), data, tmp_path / "a.acts", select="first", **options)

    ask(forward=half, pick=lambda value: value)
    ask(forward=half, pick=lambda value: value)  # the same code
    for model, options, fields in (
        (None, {"forward": one_third, "pick": lambda value: value}, ("forward",)),
        (None, {"forward": half, "pick": lambda value: value + 1}, ("pick",)),
        (Swapped(), {"forward": half, "pick": lambda value: value}, ("model.fingerprint",)),
    ):
        with pytest.raises(SpecError) as failure:
            ask(model, **options)
        assert failure.value.fields == fields


class Swapped(Counting):
    """The same parameters, another activation."""

    def __init__(self):
        super().__init__()
        self.relu = nn.GELU()


Swapped.__qualname__ = "Counting"


def test_a_budget_within_the_first_batch_needs_no_second_forward(tmp_path):
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x):
            return self.same(x.mul_(2))

    store = harvest(Doubles(), [torch.ones(4, 3)], tmp_path / "a.acts", select="same", max_rows=2)
    assert torch.equal(store["same"][...], torch.full((2, 3), 2.0))


def test_units_stay_small_where_the_first_batch_is_all_padding(tmp_path):
    ones = torch.ones(4, 8, dtype=torch.long)
    batches = [{"input_ids": ones, "attention_mask": ones} for _ in range(200)]
    batches[0]["attention_mask"] = torch.zeros(4, 8, dtype=torch.long)
    store = harvest(Embeds(), iter(batches), tmp_path / "a.acts", select="emb", shard_bytes=1 << 14)
    assert len(store) == 199 * 32
    assert max(shard.size for shard in store.shards) < 3 * (1 << 14)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    for module, data, text in (
        (nn.Identity(), torch.ones(2, 3, dtype=torch.complex128), "of torch.complex128 cannot be stored"),
        (Sparse(), torch.ones(2, 3), "layout torch.sparse_coo, which has no rows"),
    ):
        with pytest.raises((StoreError, CaptureError), match=text):
            harvest(nn.Sequential(module), [data], tmp_path / "a.acts", select="0")
        assert list(tmp_path.iterdir()) == []


class Sparse(nn.Module):
    def forward(self, x):
        return x.to_sparse()


def test_a_harvest_that_goes_on_says_from_where(tmp_path, capsys):
    data = [torch.randn(3, 4) for _ in range(20)]
    with pytest.raises(RuntimeError, match="the model failed"):
        harvest(Counting(fail_at=9), data, tmp_path / "a.acts", select="first")
    harvest(Counting(), data, tmp_path / "a.acts", select="first", progress=True)
    assert "a.acts: 4 units, 24 rows" in capsys.readouterr().err


def test_inputs_that_are_given_by_keyword_are_inputs(tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = LlamaModel(LlamaConfig(vocab_size=50, hidden_size=8, **sizes)).eval()
    data = [{"input_ids": torch.randint(1, 50, (2, 5))}]
    inputs = harvest(model, data, tmp_path / "a.acts", select=r"layers\.0\.self_attn", direction="fwd_pre")
    named = harvest(
        model, data, tmp_path / "b.acts", select=r"layers\.0\.self_attn", direction="fwd_pre", pick="hidden_states"
    )
    outputs = harvest(model, data, tmp_path / "c.acts", select=r"layers\.0\.input_layernorm")
    wanted = outputs["layers.0.input_layernorm"][...]
    assert torch.equal(inputs["layers.0.self_attn"][...], wanted)
    assert torch.equal(named["layers.0.self_attn"][...], wanted)
