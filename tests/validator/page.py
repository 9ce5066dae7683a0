"""docs/validator.md, written from the answers: who agrees, who differs by how much, which known faults show."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from validator.answers import REQUESTS, Answers, installed
from validator.compare import SCORE_TOLERANCE, SIGNS, TOLERANCE, Verdict, verdict

LENS_MODELS = """## Models written for TransformerLens

Twelve scripts as its users write them run twice: on a model made of TransformerLens' `HookPoint` and
`HookedRootModule`, and on the same class body over those of `tdcache.points`. Values, names and states are compared
exactly; its bridged models and its `ActivationCache` are held against our regex and our cache there too. To repeat it,
with the version that `constraints.txt` names:

```bash
python -m nox -s peers -- tests/points/test_transformer_lens.py
```

TransformerLens' own unit tests are run on its own models with tdcache's hook points: a pytest plugin replaces
`HookPoint`, `LensHandle` and `HookedRootModule` before any of its modules is imported. Each test that passes with its
own classes should pass with ours; the session lists those that do not. It downloads the source distribution, which has
the tests, or takes a checkout. On version 4.3.0, 843 tests that pass with its own classes were compared: 842 pass with
ours, and one replaces the point's `register_forward_hook` by a mock.

```bash
python -m nox -s lens_tests
python -m nox -s lens_tests -- --source TransformerLens
```
"""

DIFFERS = """## What differs

ALBERT runs one block twice in a forward: the hooks by hand edit both calls and keep the last, nnsight and pyvene read
the first. XGLM computes its pattern with batch and heads in one axis, and tdcache hands on what the model computes;
the hooks read what the module returns.

"""

Verdicts = Mapping[str, Mapping[str, Verdict]]

INTRO = """# The validator

The same six requests to many small models, through tdcache, through other libraries, and through hooks of torch that
are written by hand for each request; every value is compared with that of the hooks. A script writes this page:

```bash
python -m nox -s validate            # all models, the libraries that can be installed
python -m nox -s validate -- --models gpt2 LSTM --peers nnsight
```

| request | what is compared |
|---|---|
| cache | the output of the first block (of the own models: of one layer) |
| gradient | the gradient of a fixed weighted sum of the logits by that output |
| patch | the logits with one position of that output from another input |
| ablate | the logits with zeros for that output |
| pattern | the first attention pattern, with attention spelled out (`attn_implementation="eager"`) |
| lens | final norm and head applied to the output of each block; asked where that gives the logits for the last one |
"""


def verdicts_of(answers: Answers, by_hand: Answers) -> Verdicts:
    """How each answer of a library compares; by model and request."""
    return {
        model: {request: verdict(answer, by_hand.by[model][request]) for request, answer in of_model.items()}
        for model, of_model in answers.by.items()
    }


def page(by_hand: Answers, peers: Mapping[str, Answers], faults: Sequence[Mapping[str, str]]) -> str:
    """The whole page."""
    verdicts = {name: verdicts_of(answers, by_hand) for name, answers in peers.items() if not answers.missing}
    parts = [
        INTRO,
        _made_with(peers, len(by_hand.by)),
        "## Who agrees\n\n" + _summary(verdicts),
        "## Model by model\n\n" + _models(by_hand, verdicts),
        DIFFERS + _listed(verdicts, "differs"),
        "## What failed\n\n" + _listed(verdicts, "failed"),
        "## What is not offered\n\n" + _listed(verdicts, "not offered"),
        "## Known faults, tried again\n\n" + _faults(faults),
        LENS_MODELS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; bars in cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _made_with(peers: Mapping[str, Answers], models: int) -> str:
    found = [f"{name} {answers.version}".strip() for name, answers in peers.items() if not answers.missing]
    missing = [f"- {name} was left out: {answers.missing}" for name, answers in peers.items() if answers.missing]
    partly = [
        f"- {name} was asked about {len(answers.by)} of {models} models: its time was up."
        for name, answers in peers.items()
        if not answers.missing and len(answers.by) < models
    ]
    text = (
        f"This run: {models} models, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {installed('transformers')}, {', '.join(found)}; float32 on the CPU, each library in a "
        f"process of its own. A value agrees when it is off by at most {TOLERANCE:g} of the largest magnitude, a score "
        f"(captum returns differences of scores) by at most {SCORE_TOLERANCE:g}; `tests/validator/compare.py` says "
        'why. tdcache copies what it keeps here (`hold="snapshot"`), as the hooks do; by default it refuses a value '
        "that the model then overwrites in place. `baukit_style` is a class of ours in the style of baukit, which is "
        "on no package index."
    )
    return "\n".join([text, "", *missing, *partly]).strip()


def _summary(verdicts: Mapping[str, Verdicts]) -> str:
    words = {"same": "same bits", "close": "up to rounding", "differs": "differ", "failed": "failed"}
    rows = []
    for name, of_peer in verdicts.items():
        cells = []
        for request in REQUESTS:
            counts = Counter(of_model[request].sign for of_model in of_peer.values() if request in of_model)
            cells.append(", ".join(f"{counts[sign]} {word}" for sign, word in words.items() if counts[sign]) or "-")
        rows.append([name, *cells])
    return table(["", *REQUESTS], rows)


def _models(by_hand: Answers, verdicts: Mapping[str, Verdicts]) -> str:
    legend = (
        "Six signs a cell, in the order of the requests: `=` the same bits, `≈` the same up to rounding, `≠` differs, "
        "`✗` failed, `·` not offered, `_` not asked."
    )
    rows = [[model, *(_signs(of_peer.get(model)) for of_peer in verdicts.values())] for model in by_hand.by]
    return f"{legend}\n\n{table(['', *verdicts], rows)}"


def _signs(of_model: Mapping[str, Verdict] | None) -> str:
    if of_model is None:
        return ""
    return "`" + "".join(SIGNS[of_model[each].sign] if each in of_model else "_" for each in REQUESTS) + "`"


def _listed(verdicts: Mapping[str, Verdicts], sign: str) -> str:
    """One row for each library, request and reason, with the models that share it."""
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name, of_peer in verdicts.items():
        for model, of_model in of_peer.items():
            for request, found in of_model.items():
                if found.sign == sign:
                    why = found.text or f"off by {found.by:.0e} of the largest magnitude"
                    rows.setdefault((name, why), {}).setdefault(model, []).append(request)
    if not rows:
        return "Nothing."
    return table(["library", "what", "where"], [[*key, _where(where)] for key, where in rows.items()])


def _where(where: Mapping[str, Sequence[str]]) -> str:
    models = list(where)
    requests = [request for request in REQUESTS if any(request in each for each in where.values())]
    shown = ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    return f"{', '.join(requests)} of {shown}"


def _faults(faults: Sequence[Mapping[str, str]]) -> str:
    intro = 'A function of `tests/validator/known_faults.py` tries each; "no" means that this version does not show it.'
    rows = [[row["peer"], row["what"], row["seen"]] for row in faults]
    return f"{intro}\n\n{table(['library', 'fault', 'seen'], rows)}"
