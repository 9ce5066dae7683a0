"""What one library answered to every request, asked in a process of its own and kept in two files.

Some libraries replace functions of torch, freeze models or remove hooks: none may meet another.
"""

from __future__ import annotations

import importlib
import json
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from validator.subjects import NotOfferedError, Score, Subject

REQUESTS = ("cache", "gradient", "patch", "ablate", "pattern", "lens")
PEERS = {
    "tdcache": "tdcache",
    "nnsight": "nnsight",
    "transformer_lens": "transformer-lens",
    "torchlens": "torchlens",
    "pyvene": "pyvene",
    "baukit_style": "",
    "captum": "captum",
}
"""Each library's module here, ``by_<name>``, and its name on the package index."""

Kind = Literal["value", "score", "not offered", "failed"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of one request: ``text`` says why where it is no value."""

    kind: Kind
    text: str = ""
    value: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All answers of one library by model and request, and its version; empty where it could not be imported."""

    by: dict[str, dict[str, Answer]]
    version: str = ""
    missing: str = ""


def asked_of(subject: Subject) -> tuple[str, ...]:
    """The requests that this model allows."""
    left_out = {"pattern"} if subject.attention is None else set()
    if not subject.blocks:
        left_out.add("lens")
    return tuple(request for request in REQUESTS if request not in left_out)


def ask(library: Any, subject: Subject, request: str) -> Answer:
    """One request to one library, on a copy of the model; an error is an answer too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(library, request)(subject.fresh())
        if isinstance(found, Score):
            return Answer(kind="score", value=found.values.detach().clone())
        return Answer(kind="value", value=found.detach().clone())
    except NotOfferedError as reason:
        return Answer(kind="not offered", text=str(reason))
    except Exception as error:  # noqa: BLE001 - whatever a library raises is its answer
        return Answer(kind="failed", text=one_line(error))


def one_line(error: BaseException) -> str:
    """An error as the page shows it."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'…' if len(text) > 160 else ''}"


def answers_of(name: str, subjects: Iterable[Subject], seconds: float = float("inf")) -> Answers:
    """All that a library answers until its time is up; ``"hand"`` are the hooks by hand."""
    try:
        library = importlib.import_module(f"validator.by_{name}")
    except Exception as error:  # noqa: BLE001 - a library that cannot be imported is listed with its reason
        return Answers(by={}, missing=one_line(error))
    by: dict[str, dict[str, Answer]] = {}
    end = time.monotonic() + seconds
    for subject in subjects:
        if time.monotonic() < end:
            by[subject.name] = {each: ask(library, subject, each) for each in asked_of(subject)}
    return Answers(by=by, version=installed(PEERS.get(name, "")))


def installed(distribution: str) -> str:
    """The version of a distribution; empty where there is none."""
    try:
        return version(distribution) if distribution else ""
    except PackageNotFoundError:
        return ""


def write(answers: Answers, folder: Path, name: str) -> None:
    """Keep answers in ``name.json`` and ``name.safetensors``."""
    texts, tensors = {}, {}
    for model, of_model in answers.by.items():
        for request, answer in of_model.items():
            texts.setdefault(model, {})[request] = {**asdict(answer), "value": None}
            if answer.value is not None:
                tensors[f"{model}|{request}"] = answer.value.contiguous()
    kept = {"by": texts, "version": answers.version, "missing": answers.missing, "torch": torch.__version__}
    (folder / f"{name}.json").write_text(json.dumps(kept))
    save_file(tensors, folder / f"{name}.safetensors")


def read(folder: Path, name: str) -> Answers:
    """What :func:`write` kept; a process that died before it wrote is a library that is missing."""
    if not (folder / f"{name}.json").exists():
        return Answers(by={}, missing="its process ended before it had answered")
    kept = json.loads((folder / f"{name}.json").read_text())
    tensors = load_file(folder / f"{name}.safetensors")
    by = {
        model: {
            request: Answer(**{**answer, "value": tensors.get(f"{model}|{request}")})
            for request, answer in of_model.items()
        }
        for model, of_model in kept["by"].items()
    }
    return Answers(by=by, version=kept["version"], missing=kept["missing"])
