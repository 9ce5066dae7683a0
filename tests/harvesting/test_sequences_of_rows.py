"""Rows belong to the sequence of their own site, and positions count its real tokens."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tdcache import harvest
from tdcache.errors import CaptureError, SelectionError
from tdcache.harvesting.row_rule import RowRule

IDS = torch.tensor([[0, 0, 1, 5, 6], [1, 7, 8, 9, 3]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_bos_is_the_first_real_token_with_padding_on_the_left():
    rows = RowRule(kind="tokens", drop=("bos",))({"input_ids": IDS, "attention_mask": LEFT}, first=0)
    assert rows.tok.tolist() == [0, 0, 5, 6, 7, 8, 9, 3]
    assert rows.pos.tolist() == [-1, -1, 1, 2, 1, 2, 3, 4]
    rows = RowRule(kind="tokens", drop=("bos", "pad"))({"input_ids": IDS, "attention_mask": LEFT}, first=0)
    assert rows.tok.tolist() == [5, 6, 7, 8, 9, 3]


def test_positions_count_real_tokens_whether_padding_is_dropped_or_not():
    for drop in ((), ("pad",)):
        rows = RowRule(kind="tokens", drop=drop, positions=(0, -1))({"input_ids": IDS, "attention_mask": LEFT}, first=0)
        assert rows.tok.tolist() == [1, 6, 1, 3]


def test_a_mask_over_queries_and_keys_is_read_and_not_ignored():
    mask = torch.zeros(2, 1, 5, 5)
    mask.masked_fill_((LEFT == 0)[:, None, None, :], torch.finfo(torch.float32).min)
    rows = RowRule(kind="tokens")({"input_ids": IDS, "attention_mask": mask}, first=0)
    assert rows.tok.tolist() == [1, 5, 6, 1, 7, 8, 9, 3]


@pytest.fixture
def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_decoder_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def batch_of(lengths, decoder_lengths, width=5, decoder_width=5):
    def padded(sizes, wide, base):
        ids = torch.zeros(len(sizes), wide, dtype=torch.long)
        for row, size in enumerate(sizes):
            ids[row, :size] = torch.arange(base + 10 * row, base + 10 * row + size)
        return ids, (torch.arange(wide) < torch.tensor(sizes)[:, None]).long()

    ids, mask = padded(lengths, width, 1)
    decoder_ids, decoder_mask = padded(decoder_lengths, decoder_width, 21)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


@pytest.mark.parametrize("decoder_width", [5, 3], ids=["of one length", "of two lengths"])
def test_decoder_rows_have_the_decoders_mask_and_ids(t5, tmp_path, decoder_width):
    batch = batch_of([5, 2], [2, 3], decoder_width=decoder_width)
    select = r"decoder\.block\.0\.layer\.2"
    stored = harvest(t5, [batch], tmp_path / "a", select=select)
    assert stored["tok"][:].tolist() == [21, 22, 31, 32, 33]
    assert stored["pos"][:].tolist() == [0, 1, 0, 1, 2]
    seen = []
    module = t5.get_submodule("decoder.block.0.layer.2")
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        t5(**batch)
    handle.remove()
    assert torch.equal(stored["decoder.block.0.layer.2"][:], seen[0][batch["decoder_attention_mask"].bool()])


class Listener(nn.Module):
    """An encoder of sound that makes four tokens of it, and a decoder that is fed ids."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv1d(3, 5, 2, stride=2)
        self.decoder = nn.Embedding(50, 5)

    def forward(self, input_features, decoder_input_ids):
        return self.decoder(decoder_input_ids) + self.encoder(input_features).mean(2)[:, None]


def test_rows_of_a_decoder_beside_an_encoder_without_ids_are_its_tokens(tmp_path):
    torch.manual_seed(0)
    batch = {"input_features": torch.randn(2, 3, 8), "decoder_input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    stored = harvest(Listener(), [batch], tmp_path / "a", select="decoder")
    assert stored["tok"][:].tolist() == [1, 2, 3, 4, 5, 6]
    heard = harvest(Listener(), [batch], tmp_path / "b", select="encoder", rows="tokens")
    assert (len(heard), heard["encoder"].shape) == (10, (10, 4))


def test_encoder_rows_have_the_encoders(t5, tmp_path):
    stored = harvest(t5, [batch_of([5, 2], [2, 3])], tmp_path / "a", select=r"encoder\.block\.0")
    assert stored["tok"][:].tolist() == [1, 2, 3, 4, 5, 11, 12]


def test_sites_of_both_sequences_do_not_stand_in_one_store(t5, tmp_path):
    with pytest.raises(CaptureError) as refused:
        harvest(t5, [batch_of([5, 2], [2, 3])], tmp_path / "a", select=r"(encoder|decoder)\.block\.0")
    assert str(refused.value) == (
        "'decoder.block.0' has the tokens of the decoder, 'encoder.block.0' those of the encoder, and rows of one "
        "store lie along one sequence; harvest each into a store of its own"
    )


def test_decoder_rows_without_decoder_ids_are_refused():
    batch = {"input_ids": IDS, "attention_mask": LEFT, "labels": IDS}
    with pytest.raises(SelectionError, match="these rows are the decoder's tokens, and the batch holds none; give"):
        RowRule(kind="tokens", side="decoder")(batch, first=0)
