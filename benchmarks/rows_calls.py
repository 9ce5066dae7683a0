"""Places inside a forward: attention patterns, q/k/v, Python functions and residual sums, as ratios to the forward."""

from __future__ import annotations

import copy
import functools
import statistics
import timeit
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, measure_makers, rounds_note, settle_process
from torch import Tensor, nn
from torch.nn import functional as F

from tdcache import Ablation, ActivationCaching
from tdcache.function_calls import CallSite, attach_attention, attach_call

LAYERS = 12
SHAPES = {64: (4, 1, 32), 768: (12, 1, 64)}  # by width: heads, rows, positions
IDLE, CLOSED = "no site", "opened and closed before"
EAGER = "eager twin, output_attentions=True"
ONE, ALL, QKV = "one pattern", "all patterns", "q, k, v of all"
NAMED, SUMS = "a Python function in all", "both sums of all blocks"
BARE = "bare hooks on all attentions"
CONTEXT = "all patterns, ActivationCaching"
HAND = "all patterns, in a copy edited by hand"
NNSIGHT = "all attention calls, nnsight .source"
TORCHLENS = "all operations, torchlens.trace"


@functools.cache
def _llama(width: int, kind: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    heads = SHAPES[width][0]
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        use_cache=False,
        attn_implementation=kind,
    )
    return LlamaModel(config).eval()


def _called(model: nn.Module, width: int, **options: Any) -> Call:
    _, rows, positions = SHAPES[width]
    return partial(model, torch.arange(rows * positions).reshape(rows, positions), **options)


def _checked(call: Call, kept: dict[Any, Any], count: int) -> Call:
    def again() -> Any:
        kept.clear()
        result = call()
        if len(kept) != count:
            raise RuntimeError(f"{len(kept)} values were seen, {count} expected")
        return result

    return again


def _keeper(kept: dict[Any, Any], key: Any) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        kept[key] = value

    return keep


def _plain(stack: ExitStack, width: int) -> Call:
    return _called(copy.deepcopy(_llama(width, "sdpa")), width)


def _closed(stack: ExitStack, width: int) -> Call:
    model = copy.deepcopy(_llama(width, "sdpa"))
    handle = attach_attention(model, CallSite("layers.0.self_attn", "pattern"), _keeper({}, 0), use="read")
    _called(model, width)()
    handle.remove()
    return _called(model, width)


def _eager(stack: ExitStack, width: int) -> Call:
    return _called(copy.deepcopy(_llama(width, "eager")), width, output_attentions=True)


def _bare(stack: ExitStack, width: int) -> Call:
    model, kept = copy.deepcopy(_llama(width, "sdpa")), {}
    for at in range(LAYERS):
        model.get_submodule(f"layers.{at}.self_attn").register_forward_hook(_keeper(kept, at), with_kwargs=True)
    return _checked(_called(model, width), kept, LAYERS)


def _places(stack: ExitStack, width: int, layers: Sequence[int], places: str | tuple[str, ...]) -> Call:
    model, kept = copy.deepcopy(_llama(width, "sdpa")), {}
    for at in layers:
        for place in places:
            site = CallSite(f"layers.{at}.self_attn", place)
            stack.callback(attach_attention(model, site, _keeper(kept, str(site)), use="read").remove)
    return _checked(_called(model, width), kept, len(layers) * len(places))


def _caching(stack: ExitStack, width: int) -> Call:
    model = copy.deepcopy(_llama(width, "sdpa"))
    hooked = stack.enter_context(ActivationCaching(r"layers\.\d+\.self_attn::pattern").prepare(model))
    call = _called(model, width)

    def again() -> Any:
        result = call()
        if len(hooked.cache.keys()) != LAYERS:
            raise RuntimeError(f"{len(hooked.cache.keys())} values were seen, {LAYERS} expected")
        return result

    return again


class _PatternByHand:
    """What somebody writes into a copy of the model: the kernel, and beside it the softmax, which is kept."""

    def __init__(self, kept: dict[Any, Any]) -> None:
        self.kept = kept

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        groups = module.num_key_value_groups
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query * module.scaling) @ key.transpose(2, 3)
        if attention_mask is None:
            scores = scores + scores.new_full(scores.shape[-2:], -torch.inf).triu_(1)
        else:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        self.kept[module.layer_idx] = scores.softmax(-1)
        causal = attention_mask is None
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=causal)
        return z.transpose(1, 2).contiguous(), None


def _by_hand(stack: ExitStack, width: int) -> Call:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kept: dict[Any, Any] = {}
    name = f"by_hand_{id(kept)}"
    ALL_ATTENTION_FUNCTIONS.register(name, _PatternByHand(kept))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = _llama(width, name)
    return _checked(_called(model, width), kept, LAYERS)


def _nnsight(stack: ExitStack, width: int = 64) -> Call:
    import nnsight

    model = nnsight.NNsight(copy.deepcopy(_llama(width, "sdpa")))
    _, rows, positions = SHAPES[width]
    ids = torch.arange(rows * positions).reshape(rows, positions)

    def again() -> Any:
        kept = []
        with model.trace(ids):
            for at in range(LAYERS):
                kept.append(model.layers[at].self_attn.source.attention_interface_0.output.save())  # noqa: PERF401  (nnsight traces the statement)
        if len(kept) != LAYERS:
            raise RuntimeError(f"{len(kept)} values were seen, {LAYERS} expected")
        return kept

    return again


def _times_of_torchlens(skipped: dict[str, str]) -> float:
    """How many forwards one trace takes; 0 where it is not installed. It takes seconds, so there is one."""
    try:
        import torchlens
    except ImportError as error:
        skipped[TORCHLENS] = str(error)
        return 0.0
    call = _called(copy.deepcopy(_llama(64, "sdpa")), 64)
    forward = min(timeit.repeat(call, number=1, repeat=20))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that the masks of transformers ask for
        traced = timeit.timeit(lambda: torchlens.trace(call.func, call.args), number=1)
    return traced / forward


def _calls(stack: ExitStack, width: int, labels: Sequence[str]) -> Call:
    model, kept = copy.deepcopy(_llama(width, "sdpa")), {}
    for at in range(LAYERS):
        for label in labels:
            site = CallSite.parse(f"layers.{at}{label}")
            stack.callback(attach_call(model, site, None, _keeper(kept, str(site))).remove)
    return _checked(_called(model, width), kept, LAYERS * len(labels))


def _makers(width: int) -> dict[str, Maker]:
    everywhere = tuple(range(LAYERS))
    return {
        IDLE: partial(_plain, width=width),
        CLOSED: partial(_closed, width=width),
        BARE: partial(_bare, width=width),
        ONE: partial(_places, width=width, layers=(6,), places=("pattern",)),
        ALL: partial(_places, width=width, layers=everywhere, places=("pattern",)),
        QKV: partial(_places, width=width, layers=everywhere, places="qkv"),
        NAMED: partial(_calls, width=width, labels=(".self_attn::apply_rotary_pos_emb",)),
        SUMS: partial(_calls, width=width, labels=("::add", "::add.1")),
        EAGER: partial(_eager, width=width),
        CONTEXT: partial(_caching, width=width),
        HAND: partial(_by_hand, width=width),
        **({} if width > 64 else {NNSIGHT: _nnsight}),
    }


LIMITS = {
    64: {CLOSED: 1.02, ONE: 1.15, ALL: 1.5, QKV: 1.1, NAMED: 1.1, SUMS: 1.2},
    768: {CLOSED: 1.02, ONE: 1.05, ALL: 1.2},
}


def calls(plan: Plan) -> list[Table]:
    """What sites inside a forward cost, at a width where overhead shows and at one where work does."""
    settle_process()
    skipped: dict[str, str] = {}
    by_width: dict[int, Samples] = {}
    with torch.no_grad():
        for width in SHAPES:
            by_width[width] = measure_makers(_makers(width), plan, skipped, copies=2)
        lens = _times_of_torchlens(skipped)
    head = ["variant", *(f"d={width}: x forward" for width in SHAPES)]
    table = Table(f"Places inside a forward: {LAYERS}-layer Llama under SDPA, no_grad", head)
    for name in _makers(64):
        ratios = {width: _ratio(samples, name) for width, samples in by_width.items() if name in samples}
        table.rows.append([name, *(f"{ratios[width]:.3f}" if width in ratios else "" for width in SHAPES)])
        for width, ratio in ratios.items():
            if name in LIMITS[width]:
                table.goals.append(Goal(f"{name}, d={width}", ratio, LIMITS[width][name]))
    table.rows += [[TORCHLENS, f"{lens:.0f}", ""]] if lens else []
    table.notes += [rounds_note(by_width.values()), *(f"{name}: {why}" for name, why in skipped.items())]
    with torch.no_grad():
        return [table, _compiled(plan)]


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _Gated(nn.Module):
    """A gated MLP with a residual sum; ``kept`` is what somebody adds to a copy in order to see the product."""

    def __init__(self, at: int, kept: dict[int, Tensor] | None, width: int = 64) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.at, self.kept = at, kept

    def forward(self, x: Tensor) -> Tensor:
        product = _gated(self.gate(x), self.up(x))
        if self.kept is not None:
            self.kept[self.at] = product
        return x + self.down(product)


class _Tower(nn.Module):
    def __init__(self, kept: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(_Gated(at, kept) for at in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


GATED = r"blocks\.\d+::_gated"
BY_HAND, CAPTURED = "kept by a copy edited by hand", "ActivationCaching"
EDITED = "Ablation of four units"


def _compiled_alone(stack: ExitStack) -> Call:
    return partial(torch.compile(_Tower(), fullgraph=True), torch.ones(64, 64))


def _compiled_by_hand(stack: ExitStack) -> Call:
    kept: dict[int, Tensor] = {}
    return _checked(partial(torch.compile(_Tower(kept), fullgraph=True), torch.ones(64, 64)), kept, LAYERS)


def _compiled_captured(stack: ExitStack) -> Call:
    model, x = _Tower(), torch.ones(64, 64)
    compiled = torch.compile(model, fullgraph=True)
    hooked = stack.enter_context(ActivationCaching(GATED).prepare(model))

    def again() -> Any:
        compiled(x)
        if len(hooked.cache.keys()) != LAYERS:
            raise RuntimeError(f"{len(hooked.cache.keys())} values were seen, {LAYERS} expected")

    return again


def _compiled_edited(stack: ExitStack) -> Call:
    model, x = _Tower(), torch.ones(64, 64)
    compiled = torch.compile(model, fullgraph=True)
    plain = compiled(x)
    stack.enter_context(Ablation(GATED, units=[0, 1, 2, 3]).prepare(model))
    if torch.equal(compiled(x), plain):
        raise RuntimeError("the edit changes nothing")
    return partial(compiled, x)


def _compiled(plan: Plan) -> Table:
    skipped: dict[str, str] = {}
    makers: dict[str, Maker] = {
        IDLE: _compiled_alone,
        BY_HAND: _compiled_by_hand,
        CAPTURED: _compiled_captured,
        EDITED: _compiled_edited,
    }
    samples = measure_makers(makers, plan, skipped, copies=1)
    table = Table(
        f"torch.compile(fullgraph=True): a Python function in {LAYERS} blocks", ["variant", "x compiled", "x by hand"]
    )
    for name in samples.seconds:
        table.rows.append([name, f"{_ratio(samples, name):.3f}", f"{_ratio(samples, name, BY_HAND):.3f}"])
    table.goals.append(Goal("calls in a full graph, captured", _ratio(samples, CAPTURED, BY_HAND), 1.1))
    table.notes += [rounds_note([samples]), *(f"{name}: {why}" for name, why in skipped.items())]
    return table


def _ratio(samples: Samples, name: str, base: str = IDLE) -> float:
    pairs = zip(samples.seconds[name], samples.seconds[base], strict=True)
    return statistics.median(mine / idle for mine, idle in pairs)
