"""Attribution beside captum, zennit and tdhook: all layers of GPT-2 in one pass, a path of 64 points, LRP on a CNN."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.machinery import ModuleSpec
from math import nan
from types import ModuleType
from typing import Any

import torch
from harness import Call, Goal, Maker, Plan, Samples, Table, measure_makers, rounds_note, settle_process
from rows_memory import forget_peak, map_big_blocks, resident
from tensordict import TensorDict
from torch import Tensor, nn
from zoo import narrow_gpt2, token_ids

from tdcache.attribution import LRP, DeepLift, GradientXActivation, IntegratedGradients, Saliency, epsilon_plus

LAYERS, STEPS, CHUNK = 12, 64, 16
OURS = "tdcache"


class Logits(nn.Module):
    """GPT-2 with ids as its only input and its last state as output."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt2 = narrow_gpt2()

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt2(ids).last_hidden_state[:, -1]


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Refuse to time variants that do not agree."""
    theirs = theirs.detach().to(ours.dtype)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * ours.abs().max().item()):
        raise ValueError(f"{what} differs by {(ours - theirs).abs().max():.2g}")


# Gradient times activation, all layers.


def _layers_once() -> tuple[Logits, Tensor]:
    return Logits().eval(), token_ids(2, 16)


def _gxa(stack: ExitStack) -> Call:
    model, ids = _layers_once()
    factory = GradientXActivation(r"gpt2\.h\.\d+\.mlp", target=3)

    def call() -> Any:
        with factory.prepare(model) as hooked:
            return hooked(TensorDict({"input": ids}, batch_size=[len(ids)]))["attr"]

    if len(call().keys()) != LAYERS:
        raise ValueError("not all layers have scores")
    return call


def _gxa_captum(stack: ExitStack) -> Call:
    from captum.attr import LayerGradientXActivation

    model, ids = _layers_once()
    methods = [LayerGradientXActivation(model, block.mlp) for block in model.gpt2.h]
    return lambda: [method.attribute(ids, target=3) for method in methods]


def _gxa_captum_list(stack: ExitStack) -> Call:
    from captum.attr import LayerGradientXActivation

    model, ids = _layers_once()
    method = LayerGradientXActivation(model, [block.mlp for block in model.gpt2.h])
    return lambda: method.attribute(ids, target=3)


def _gxa_by_hand(stack: ExitStack) -> Call:
    model, ids = _layers_once()

    def call() -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [b.mlp.register_forward_hook(lambda module, args, out: seen.append(out)) for b in model.gpt2.h]
        total = model(ids)[:, 3].sum()
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(total, seen)
        return [(value * grad).detach() for value, grad in zip(seen, grads, strict=True)]

    return call


# Saliency of a CNN.


def _saliency(stack: ExitStack) -> Call:
    model, x = cnn(), images()
    factory = Saliency(target=3)

    def call() -> Tensor:
        with factory.prepare(model) as hooked:
            return hooked(TensorDict({"input": x}, batch_size=[len(x)]))["attr", "input"]

    return call


def _saliency_captum(stack: ExitStack) -> Call:
    from captum.attr import Saliency as Theirs

    model, x = cnn(), images()
    call = partial(Theirs(model).attribute, x, target=3)
    same(_saliency(stack)(), call(), "saliency")
    return call


# Integrated gradients of a CNN.


def cnn(pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), pool(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
    ).eval()  # fmt: skip


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _ig(stack: ExitStack, chunk: int | None = CHUNK) -> Call:
    model, x = cnn(), images()
    factory = IntegratedGradients(target=3, n_steps=STEPS, chunk=chunk)

    def call() -> Tensor:
        with factory.prepare(model) as hooked:
            return hooked(TensorDict({"input": x}, batch_size=[len(x)]))["attr", "input"]

    return call


def _ig_captum(stack: ExitStack, chunk: int | None = CHUNK) -> Call:
    from captum.attr import IntegratedGradients as Theirs

    model, x = cnn(), images()
    method = Theirs(model)
    rows = None if chunk is None else chunk * len(x)
    call = partial(method.attribute, x, target=3, n_steps=STEPS, internal_batch_size=rows)
    same(_ig(stack)(), call(), "integrated gradients")
    return call


def _ig_tdhook(stack: ExitStack) -> Call:
    from tdhook.attribution import IntegratedGradients as Theirs

    model, x = cnn(), images()

    def pick(targets: TensorDict, _: Any) -> TensorDict:
        return targets.apply(lambda tensor: tensor[..., 3])

    method = Theirs(init_attr_targets=pick, n_steps=STEPS, multiply_by_inputs=True)

    def call() -> Tensor:
        with method.prepare(model) as hooked:
            data = TensorDict({"input": x, ("baseline", "input"): torch.zeros_like(x)}, batch_size=[len(x)])
            return hooked(data)["attr", "input"]

    same(_ig(stack)(), call(), "integrated gradients")
    return call


# DeepLift of the same CNN with average pools: at a max pool captum's scores miss the difference of outputs.


def _deeplift(stack: ExitStack) -> Call:
    model, x = cnn(nn.AvgPool2d), images()
    factory = DeepLift(target=3)

    def call() -> Tensor:
        with factory.prepare(model) as hooked:
            return hooked(TensorDict({"input": x}, batch_size=[len(x)]))["attr", "input"]

    return call


def _deeplift_captum(stack: ExitStack) -> Call:
    from captum.attr import DeepLift as Theirs

    model, x = cnn(nn.AvgPool2d), images()
    method = Theirs(model)

    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # captum's own, of its hooks
            return method.attribute(x, target=3)

    same(_deeplift(stack)(), call(), "DeepLift")
    return call


# LRP of the same CNN.


def _stand_in_for_torchvision() -> None:
    """zennit imports it for models that are not measured here."""
    names = (
        "torchvision",
        "torchvision.models",
        "torchvision.models.resnet",
        "torchvision.ops",
        "torchvision.ops.misc",
    )
    for name in names:
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__spec__ = module.__spec__ or ModuleSpec(name, None)  # others ask whether it is installed
    for name in ("Bottleneck", "BasicBlock"):
        setattr(sys.modules["torchvision.models.resnet"], name, type(name, (), {}))
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})  # type: ignore[attr-defined]


def _lrp(stack: ExitStack) -> Call:
    model, x = cnn(), images()
    factory = LRP(target=3, rules=epsilon_plus())

    def call() -> Tensor:
        with factory.prepare(model) as hooked:
            return hooked(TensorDict({"input": x}, batch_size=[len(x)]))["attr", "input"]

    return call


def _lrp_zennit(stack: ExitStack) -> Call:
    _stand_in_for_torchvision()
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    model, x = cnn(), images()

    def call() -> Tensor:
        with Gradient(model, EpsilonPlus()) as attributor:
            return attributor(x, lambda output: output * torch.eye(10)[[3] * len(x)])[1]

    same(_lrp(stack)(), call(), "relevance")
    return call


def _lrp_tdhook(stack: ExitStack) -> Call:
    from tdhook.attribution import LRP as Theirs
    from tdhook.attribution.lrp_helpers.rules import EpsilonPlus

    model, x = cnn(), images()

    def pick(targets: TensorDict, _: Any) -> TensorDict:
        return targets.apply(lambda tensor: tensor[..., 3])

    method = Theirs(EpsilonPlus(1e-6), init_attr_targets=pick)

    def call() -> Tensor:
        with method.prepare(model) as hooked:
            return hooked(TensorDict({"input": x}, batch_size=[len(x)]))["attr", "input"]

    same(_lrp(stack)(), call(), "relevance")
    return call


ROWS: Mapping[str, tuple[str, Mapping[str, Maker]]] = {
    "layers": (
        f"Gradient x activation of all {LAYERS} layers, GPT-2 shape",
        {
            OURS: _gxa,
            "hand-written, one pass": _gxa_by_hand,
            "captum, a list of layers": _gxa_captum_list,
            "captum, layer by layer": _gxa_captum,
        },
    ),
    "saliency": (
        "Saliency, CNN, four images",
        {OURS: _saliency, "captum": _saliency_captum},
    ),
    "ig": (
        f"Integrated gradients, {STEPS} steps, CNN, four images",
        {
            OURS: _ig,
            "tdcache, all steps at once": partial(_ig, chunk=None),
            "captum": _ig_captum,
            "captum, all steps at once": partial(_ig_captum, chunk=None),
            "tdhook, all steps at once": _ig_tdhook,
        },
    ),
    "deeplift": (
        "DeepLift, CNN, four images",
        {OURS: _deeplift, "captum": _deeplift_captum},
    ),
    "lrp": (
        "LRP, epsilon-plus, CNN, four images",
        {OURS: _lrp, "zennit": _lrp_zennit, "tdhook": _lrp_tdhook},
    ),
}


def attribution(plan: Plan) -> list[Table]:
    """Time of each method beside its peers, and the peak memory of the path."""
    settle_process()
    tables = []
    for row, (title, makers) in ROWS.items():
        skipped: dict[str, str] = {}
        samples = measure_makers(makers, plan, skipped, copies=1, rounds=8 if plan.quick else 30)
        peaks = {name: _peak(name) for name in makers if name in samples} if row == "ig" else {}
        tables.append(_table(title, samples, peaks, skipped))
        tables[-1].goals += _goals(row, samples, peaks)
    return tables


def _table(title: str, samples: Samples, peaks: Mapping[str, float], skipped: Mapping[str, str]) -> Table:
    table = Table(title, ["variant", "ms", "x tdcache", *(["peak MB"] if peaks else [])])
    for name in samples.seconds:
        spread = samples.time(name)
        cells = [name, f"{spread.median * 1e3:.2f}", f"{spread.median / samples.time(OURS).median:.2f}"]
        table.rows.append([*cells, *([f"{peaks[name] / 1e6:.0f}"] if peaks else [])])
    table.notes += [f"{name}: {reason}" for name, reason in skipped.items()]
    table.notes.append(rounds_note([samples]))
    return table


def _goals(row: str, samples: Samples, peaks: Mapping[str, float]) -> list[Goal]:
    ours = samples.time(OURS).median
    goals = []
    if row == "layers" and "captum, layer by layer" in samples:
        gain = samples.time("captum, layer by layer").median / ours
        goals.append(Goal("all layers, gain over captum's loop", gain, LAYERS / 2, "x", at_least=True))
    peers = [name for name in samples.seconds if name.startswith(("captum", "zennit", "tdhook"))]
    if peers:
        best = min(samples.time(name).median for name in peers)
        goals.append(Goal(f"{row}, time over the best peer", ours / best, 1.0, "x"))
    if "captum" in peaks:
        goals.append(Goal(f"{row}, peak memory over captum's", peaks[OURS] / peaks["captum"], 1.0, "x"))
    return goals


def _peak(name: str) -> float:
    """Peak bytes of one call in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else nan


def _measure_peak(make: Callable[[ExitStack], Call]) -> float:
    settle_process()
    map_big_blocks()
    with ExitStack() as stack:
        call = make(stack)
        call()
        gc.collect()
        forget_peak()
        before = resident()
        call()
        return resident("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps(_measure_peak(ROWS["ig"][1][sys.argv[1]])))
