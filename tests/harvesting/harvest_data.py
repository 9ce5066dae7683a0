"""A small encoder, padded token data, and the slow obvious way to harvest: a plain hook, a Python loop over tokens."""

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

SELECT = r"encoder\.layer\.\d"
SITES = ("encoder.layer.0", "encoder.layer.1")


def encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return BertModel(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return LlamaModel(config).eval()


class Tokens(Dataset):
    """Sequences of 2 to 12 token ids."""

    def __init__(self, count=21, longest=12):
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
        self.samples = [torch.randint(3, 50, (length,), generator=generator) for length in lengths]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, number):
        return self.samples[number]


class Padded:
    """Makes a batch of sequences, padded on one side."""

    def __init__(self, side="right"):
        self.side = side

    def __call__(self, samples):
        longest = max(map(len, samples))
        ids, mask = torch.zeros(len(samples), longest, dtype=torch.long), torch.zeros(len(samples), longest).long()
        for row, sample in enumerate(samples):
            place = slice(0, len(sample)) if self.side == "right" else slice(longest - len(sample), None)
            ids[row, place], mask[row, place] = sample, 1
        return {"input_ids": ids, "attention_mask": mask, "text": ["not a tensor"] * len(samples)}


def batches_of(data, size, collate):
    return [collate(data.samples[at : at + size]) for at in range(0, len(data), size)]


def by_hand(model, batches, paths, keep=lambda place, length: True):
    """``{"seq", "pos", "tok", path...}`` of every token that ``keep(place, length)`` wants, by plain hooks."""
    found = {name: [] for name in ("seq", "pos", "tok", *paths)}
    seen = {}
    modules = dict(model.named_modules())
    handles = [
        modules[path].register_forward_hook(
            lambda module, args, output, path=path: seen.update(
                {path: output[0] if isinstance(output, tuple) else output}
            )
        )
        for path in paths
    ]
    first = 0
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
                columns = mask.nonzero().squeeze(1).tolist()
                for place, column in enumerate(columns):
                    if keep(place, len(columns)):
                        found["seq"].append(torch.tensor(first + row))
                        found["pos"].append(torch.tensor(place, dtype=torch.int32))
                        found["tok"].append(ids[column].int())
                        for path in paths:
                            found[path].append(seen[path][row, column].clone())
            first += len(batch["input_ids"])
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in found.items()}


class Counting(nn.Module):
    """A model of two layers that counts its forwards, and can fail at one of them."""

    def __init__(self, width=4, fail_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.relu = nn.ReLU(inplace=True)
        self.fail_at = fail_at
        self.calls = self.ends = 0

    def forward(self, x):
        self.calls += 1
        if self.calls - 1 == self.fail_at:
            raise RuntimeError("the model failed")
        out = self.second(self.relu(self.first(x)))
        self.ends += 1
        return out
