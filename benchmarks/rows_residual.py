"""The residual stream taken apart, beside TransformerLens' ``ActivationCache`` and the bare arithmetic."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from harness import Call, Maker, Plan, Table, measure_makers, rounds_note, settle_process
from tensordict import TensorDict
from torch import Tensor, nn

import tdcache
from tdcache import ActivationCaching, residual

LAYERS, HEADS, WIDTH = 12, 8, 256
OURS, LENS, BARE = "tdcache", "TransformerLens", "einsum per layer, nothing checked"


@functools.cache
def _model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "n_positions": 64, "vocab_size": 1000}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **sizes)).eval()


def _tokens() -> Tensor:
    return torch.arange(128).reshape(4, 32)


@functools.cache
def _cache() -> Any:
    table = tdcache.names(_model())
    pattern = residual.needed(table, heads=True)
    with ActivationCaching(pattern, names=table).prepare(_model()) as hooked, torch.no_grad():
        hooked(_tokens())
    return hooked.cache


@functools.cache
def _bridge() -> tuple[Any, dict[str, Tensor]]:
    import transformer_lens

    wrapped = copy.deepcopy(_model())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
        bridge = transformer_lens.TransformerBridge.boot_transformers(folder, hf_model=wrapped, tokenizer=None)
        with torch.no_grad():
            _, cache = bridge.run_with_cache(_tokens())
    return bridge, dict(cache.cache_dict)


def _ours(stack: ExitStack, call: str) -> Call:
    cache = _cache()
    return {
        "heads": partial(residual.head_results, cache),
        "parts": partial(residual.decompose, cache),
        "scores": lambda: residual.logit_attribution(residual.decompose(cache), _tokens()),
        "lens": partial(residual.logit_lens, cache),
    }[call]


def _lens(stack: ExitStack, call: str) -> Call:
    from transformer_lens import ActivationCache

    bridge, kept = _bridge()
    rows = bridge.W_U.T[_tokens()].detach()

    def fresh() -> Any:
        return ActivationCache(dict(kept), bridge)  # it writes what it computes into itself

    def scores() -> Tensor:
        cache = fresh()
        return (cache.apply_ln_to_stack(cache.decompose_resid()) * rows).sum(-1)

    return {
        "heads": lambda: fresh().stack_head_results(),
        "parts": lambda: fresh().decompose_resid(),
        "scores": scores,
        "lens": lambda: bridge.unembed(bridge.ln_final(fresh().accumulated_resid())),
    }[call]


def _bare(stack: ExitStack, call: str) -> Call:
    cache, blocks = _cache(), _model().transformer.h
    weights = [block.attn.c_proj.weight.detach().view(HEADS, WIDTH // HEADS, WIDTH) for block in blocks]

    def heads() -> TensorDict:
        found = {}
        for at, weight in enumerate(weights):
            results = torch.einsum("bhpi,hio->bpho", cache.get(f"blocks.{at}.attn.z"), weight)
            found |= {f"blocks.{at}.attn.head.{head}": each for head, each in enumerate(results.unbind(-2))}
        return TensorDict(found)

    return heads


def _without_grad(maker: Maker) -> Maker:
    def make(stack: ExitStack) -> Call:
        return torch.no_grad()(maker(stack))

    return make


TITLES = {
    "heads": "what every head writes",
    "parts": "embeddings and contributions (ours are compared with the stream of every block)",
    "scores": "what each contribution adds to a logit",
    "lens": "the logit lens",
}


def stream(plan: Plan) -> list[Table]:
    """GPT-2's depth at a width of 256, 128 tokens."""
    settle_process()
    tables = []
    for call, title in TITLES.items():
        makers = {OURS: _without_grad(partial(_ours, call=call)), LENS: _without_grad(partial(_lens, call=call))}
        if call == "heads":
            makers[BARE] = _without_grad(partial(_bare, call=call))
        skipped: dict[str, str] = {}
        samples = measure_makers(makers, plan, skipped, copies=1, rounds=8 if plan.quick else 40)
        table = Table(f"The residual stream: {title}", ["variant", "ms", "x tdcache"])
        for name in samples.seconds:
            spread = samples.time(name)
            row = [name, f"{spread.median * 1e3:.2f}", f"{spread.median / samples.time(OURS).median:.2f}"]
            table.rows.append(row)
        table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
        table.notes.append(rounds_note([samples]))
        tables.append(table)
    return tables
