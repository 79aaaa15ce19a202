"""The command line as a user meets it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedsim import __version__
from fedsim.__main__ import main as run_main
from fedsim.cli.commands import cli
from fedsim.config import FIELDS, Mode, has_key
from fedsim.errors import RunFailed
from fedsim.experiments import execute
from fedsim.experiments.study import read_study, study_names
from fedsim.runs.shown import print_row
from fedsim.system.provenance import program
from strategies.arguments import kebab
from tests.commands import run
from tests.conftest import Call, write_run

ROOT = Path(__file__).parents[1]
TINY = (
    "--dataset synthetic:images=256 --model lenet5 --batch-size 16 --clients 2 --local-steps 2 "
    "--rounds 3 --device cpu --threads 1"
).split()

NOT_FOR_A_RUN = set(  # slow to import
    "flwr.simulation flwr_datasets matplotlib pandas ray scipy sqlalchemy sympy torch._dynamo torchvision".split()
)
HERE = {"device": "cpu", "threads": 1}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("localsgd --local-step 3", "--local-step"),
        ("localsgd --local-step 3", "--local-steps"),
        ("centralized --clients 3", "--clients"),
        ("localsgd --clients 0", "clients = 0 is out of range: it must be at least 1"),
        ("localsgd --clients two", "clients = 'two' is not a whole number"),
        ("localsgd --lr -1", "lr = -1 is out of range: it must be greater than 0"),
        ("localsgd --dataset imagenet", "dataset = imagenet is unknown: it must be one of cifar100, cifar10"),
        ("localsgd --model lenet", "did you mean lenet5?"),
        ("localsgd --model lenet6", "model = lenet6 is unknown: it must be one of lenet-bn, lenet5"),
        ("localsgd --optimizer lbfgs", "optimizer = lbfgs is unknown: it must be one of sgdm, lars, lamb"),
        ("localsgd --strategy fedprox", "--strategy is written --outer module:Class now"),
        ("localsgd --engine ray", "engine = 'ray' is unknown: it must be one of local, stacked, flower"),
        ("localsgd --preset table3", "unknown preset table3: it must be one of batchnorm, demo, diloco-text"),
        ("localsgd --preset table1", "preset = table1 is for mode centralized, not localsgd: give it to centralized"),
        ("localsgd --dataset synthetic --clients 9000", "clients = 9000 is more than the 8000"),
        ("localsgd --dataset synthetic --clients 1000", "batch-size = 64 is more than a shard of 8 images"),
        ("centralized --dataset synthetic --batch-size 8001", "batch-size = 8001 is more than a shard of 8000 images"),
        ("centralized --dataset synthetic --epochs 1.5", "epochs = 1.5: centralized training runs whole epochs"),
        ("localsgd --data-dir {folder}/damaged", "holds a damaged cifar-100-python"),
        ("localsgd --dataset synthetic --device cuda:99", "device = cuda:99 is not on this machine"),
        ("localsgd --dataset synthetic --results-dir {folder}/file", "results-dir = {folder}/file cannot be written"),
        ("localsgd --dataset synthetic --name a/b", "name = 'a/b' is not a plain folder name"),
        ("grid --dataset synthetic --clients 4,x", "clients = '4,x' is not a list of whole numbers"),
        (
            "grid --dataset synthetic --seeds 1,x",
            "seeds = '1,x' is not a list of whole numbers: for instance --seeds 4",
        ),
        ("grid --dataset synthetic --clients 4,9000", "clients = 9000 is more than the 8000"),
        ("grid --dataset synthetic --engine ray", "engine = 'ray' is unknown"),
        ("study kj-small --engine threads", "engine = 'threads' is unknown: it must be one of local, stacked, flower"),
        (
            "grid --dataset synthetic --gpus-per-cell 0.5",
            "gpus-per-cell = 0.5 is a share of a Ray node: give --ray too",
        ),
        ("grid --dataset synthetic --ray --gpus-per-cell 0", "gpus-per-cell = 0.0 is not a share of a GPU"),
        ("grid --dataset synthetic --gpus-per-cell 2 --ray", "gpus-per-cell = 2.0 is not a share of a GPU"),
        ("grid --dataset synthetic --ray --cpus-per-cell -1", "cpus-per-cell = -1.0 is not a number of cores"),
        ("grid --dataset synthetic --ray auto --cpus-per-cell 1.5", "cpus-per-cell = 1.5 is not a number of cores"),
        ("study kj-small --ray --engine flower", "engine = flower with --ray"),
        ("study --ray table3", "unknown study table3: it must be one of batchnorm, demo, diloco-text"),
        ("study table3", "unknown study table3: it must be one of batchnorm, demo, diloco-text"),
        ("study kj-smal", "or a file NAME.toml (did you mean kj-small?)"),
        ("localsgd --preset table11", "or a file NAME.toml (did you mean table1?)"),
        ("study ...toml", "...toml: name = '..' is not a plain folder name: leave out slashes"),
        (
            "localsgd --config {folder}/bare.toml",
            "bare.toml: model is a key of runs: write it below [set], and title and mode above that",
        ),
        (
            "localsgd --dataset synthetic --epochs 2.5 --rounds 3",
            "epochs = 2.5 is not used with rounds = 3: leave one of them out",
        ),
        (
            "grid --dataset synthetic --epochs 1,2 --rounds 3",
            "epochs = 1.0 is not used with rounds = 3: leave one of them out",
        ),
        (
            "localsgd --dataset synthetic --schedule-unit epoch",
            "schedule-unit is not used by a constant rate: leave it out, or give --schedule",
        ),
        (
            "centralized --dataset synthetic --optimizer lars:adapt-undecayed=true",
            "adapt-undecayed = true is not used where every parameter is decayed: leave it out, or give --no-",
        ),
        (
            "centralized --dataset synthetic --optimizer lamb:adapt-undecayed=false",
            "adapt-undecayed = false is not used where every parameter is decayed",
        ),
        (
            "localsgd --dataset synthetic --outer fedadam:eps=0",
            "outer = fedadam:eps=0: fedadam divides zero by zero where no worker has moved: give an eps above 0",
        ),
        (
            "localsgd --dataset synthetic --optimizer adam:eps=0",
            "optimizer = adam:eps=0 divides zero by zero where a gradient is zero: give an eps above 0",
        ),
        ("study a/b", "unknown study a/b: it must be one of batchnorm, demo, diloco-text"),
        ("study table1 --seeds 1,x", "seeds = '1,x' is not a list of whole numbers"),
        ("study table1 --engine ray", "engine = 'ray' is unknown"),
        ("export-shards --dataset synthetic", "--out must be given: see --help"),
        ("time-to-accuracy --latency 20ms", "--bandwidth, --target must be given: see --help"),
        (
            "export-shards --dataset synthetic -o {folder}/damaged",
            "damaged cannot be made (Directory not empty)",
        ),
        ("export-shards --dataset synthetic -o {folder}/file", "out = {folder}/file cannot be made (Not a directory)"),
        (
            "export-shards --dataset synthetic --clients 9000 -o new",
            "clients = 9000 is more than the 8000",
        ),
        ("localsgd --config {folder}/none.toml", "none.toml cannot be read (No such file or directory)"),
        ("localsgd --preset {folder}/bad.toml", "bad.toml: unknown key lrr: did you mean lr?"),
        ("centralized --preset {folder}/mine.toml", "mine.toml is for mode localsgd, not centralized"),
        ("localsgd --dataset synthetic --clients 9000 --dry-run", "clients = 9000 is more than the 8000"),
        ("study kj-small --dry-run --cells k9", "cells = 'k9' matches no cell of kj-small"),
        ("localsgd --dataset synthetic --track wandb", "track = wandb is unknown: it must be one of tensorboard"),
        (
            "localsgd --dataset synthetic --track tensorboard --engine flower",
            "track = tensorboard with engine = flower",
        ),
        ("localsgd --dataset synthetic --track wandb --dry-run", "track = wandb is unknown"),
        ("localsgd --dataset synthetic --engine ray --dry-run", "engine = 'ray' is unknown"),
        (
            "localsgd --dataset synthetic --local-epochs 1 --partition linear --engine stacked --dry-run",
            "local-epochs = 1: clients that hold more images take more steps than others",
        ),
        (
            "grid --dataset synthetic --local-epochs 1 --partition linear --engine stacked --dry-run",
            "local-epochs = 1: clients that hold more images take more steps than others",
        ),
        (
            "localsgd --dataset synthetic --results-dir {folder}/file/new --dry-run",
            "results-dir = {folder}/file/new cannot be written (Not a directory)",
        ),
        ("study demo --results-dir {folder}/file --dry-run", "results-dir = {folder}/file cannot be written"),
        ("grid --dataset synthetic --track tensorboard --engine flower", "track = tensorboard with engine = flower"),
        ("grid --dataset synthetic --track wandb --ray", "track = wandb is unknown"),
        ("grid --dataset synthetic --error-feedback yes", "error-feedback = 'yes' is not true or false"),
        ("grid --dataset synthetic --error-feedback true,x", "error-feedback = 'x' is not true or false"),
        (
            "grid --dataset synthetic --error-feedback true,true",
            "error-feedback = [True, True] has True twice: leave one of them out",
        ),
        ("grid --dataset synthetic --no-error-feedback true", "Got unexpected extra argument (true)"),
        ("localsgd --dataset synthetic --error-feedback true,false", "Got unexpected extra argument (true,false)"),
        ("grid --dataset synthetic --lr 0.1,x", "lr = 'x' is not a number"),
        ("grid --dataset synthetic --lr 0.1,0.1", "lr = [0.1, 0.1] has 0.1 twice: leave one of them out"),
        ("grid --dataset synthetic --checkpoint-every 1,2", "grid checkpoint-every: results of mode localsgd do not"),
        ("localsgd --dataset synthetic --lr 0.1,0.2", "lr = '0.1,0.2' is not a number"),
        ("watch nowhere", "nowhere is not a folder"),
        ("watch damaged", "damaged holds no runs"),
        ("report nowhere", "nowhere holds no runs"),
        ("time-to-accuracy nowhere --bandwidth 1Mbit --latency 1ms --target 0.5", "nowhere holds no runs"),
        ("report ~nosuchuser", "results = '~nosuchuser' begins with another user's home folder"),
        ("time-to-accuracy --bandwidth fast --latency 1ms --target 0.5", "bandwidth = 'fast' is not a number above 0"),
        ("time-to-accuracy --bandwidth 1Mbit --latency 1 --target 0.5", "latency = '1' is not a number with one of us"),
        ("time-to-accuracy --bandwidth 1Mbit --latency 1ms --target 0.5 --link tree", "link = 'tree' is unknown"),
        ("time-to-accuracy --bandwidth 1Mbit --latency 1ms --target 0.5 --upload 1", "upload = '1' is not a number"),
        (
            "time-to-accuracy --bandwidth 1Mbit --latency 1ms --target 0.5 --jitter normal",
            "jitter = 'normal' is not",
        ),
        ("time-to-accuracy --bandwidth 1Mbit --latency 1ms --target 0.5 --slow 1:0.5", "slow = '1:0.5' is not COUNT:"),
        ("deploy --nodes 0", "nodes = 0 is out of range: it must be from 1 to 65534"),
        ("deploy --nodes two", "nodes = 'two' is not a whole number"),
        ("deploy", "--nodes"),
        ("deploy --nodes 2 --port 0", "port = 0 is out of range: it must be from 1 to 65533"),
        ("deploy --nodes 2 --port 65534", "port = 65534 is out of range"),
        (
            "deploy --nodes 2 --host a.example,b:8000",
            "host = 'b:8000' is not a DNS name or IP address of a server: give it without a port",
        ),
        ("deploy --nodes 2 --host -a.example", "host = '-a.example' is not a DNS name or IP address"),
        ("deploy --nodes 2 --host 1.2.3.400", "host = '1.2.3.400' is not a DNS name or IP address"),
        ("deploy --nodes 2 --host a.example,", "host = '' is not a DNS name or IP address"),
        ("deploy --nodes 2 --name default", "name = 'default' is not a connection name"),
        ("deploy --nodes 2 --name=--help", "name = '--help' is not a connection name"),
        ("deploy --nodes 70000", "nodes = 70000 is out of range: it must be from 1 to 65534"),
        ("deploy --nodes 2 --host 0.0.0.0", "host = '0.0.0.0' is not a DNS name or IP address of a server"),
        ("deploy --nodes 2 -o a\x07b", "a\\x07b' holds a control character"),
        ("deploy --nodes 2 --name a.b", "name = 'a.b' is not a connection name"),
        ("deploy --nodes 2 -o {folder}/damaged", "out = {folder}/damaged exists and is not empty: give another -o"),
        ("deploy --nodes 2 -o {folder}/file", "out = {folder}/file exists and is not empty"),
        ("deploy --nodes 2 -o {folder}/file/below", "out = {folder}/file/below cannot be written"),
        ("deploy --nodes 2 --ca {folder}/damaged", "ca = {folder}/damaged holds no ca.crt with its ca.key"),
        ("deploy --nodes 2 --ca damaged --insecure", "ca: there are no certificates to sign with --insecure"),
        ("localsgd --dataset synthetic --device mps", "device = 'mps' is out of range"),
        ("localsgd --dataset synthetic:images=100000000", "dataset: synthetic images = 100000000 needs 1,200 GB of"),
        ("localsgd --threads 100000", "threads = 100000 is out of range: it must be at least 0 and at most 1,024"),
        (
            "localsgd --dataset synthetic --results-dir ~nosuch",
            "results-dir = '~nosuch' begins with another user's home",
        ),
        (f"localsgd --dataset synthetic --results-dir {'a/' * 2500}", "File name too long"),
        ("demo --results-dir ~nosuch", "results-dir = '~nosuch' begins with another user's home folder"),
        ("study kj-small --results-dir ~nosuch", "results-dir = '~nosuch' begins with another user's home folder"),
        ("localsgd --dataset synthetic --name \x1b[2J", r"name = '\x1b[2J' holds a control character"),
        ("report \x1b[2J", r"results = '\x1b[2J' holds a control character"),
        ("train", "error: No such command 'train'.\n"),
        ("localsdg", "error: No such command 'localsdg'. Did you mean 'localsgd'?\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call: Call, tmp_path: Path, arguments: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    head = 'title = "a"\nmode = "localsgd"\n[set]\n'
    (tmp_path / "mine.toml").write_text(head)
    (tmp_path / "bad.toml").write_text(f"{head}lrr = 0.1")
    (tmp_path / "bare.toml").write_text('model = "lenet5"\n')
    (tmp_path / "...toml").write_text(head)
    (tmp_path / "damaged" / "cifar-100-python").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(*(part.format(folder=tmp_path) for part in arguments.split()))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words.format(folder=tmp_path) in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("cores", ["abc", "0", "-1", "1.5", "9" * 5000])
def test_a_number_of_cores_in_the_environment_that_is_none_is_one_line(
    call: Call, monkeypatch: pytest.MonkeyPatch, cores: str
) -> None:
    monkeypatch.setenv("FEDSIM_CORES", cores)
    code, out, err = call(*"centralized --dataset synthetic:images=64 --epochs 1 --device cpu".split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: FEDSIM_CORES = {repr(cores)[:50]}")
    assert err.endswith(" in the environment: give a number of cores, or leave it out\n")


def test_another_configuration_under_the_same_name_is_refused(call: Call, tmp_path: Path) -> None:
    assert call("localsgd", *TINY, "--name", "mine")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "results" / "mine").iterdir()}
    code, out, err = call("localsgd", *TINY, "--name", "mine", "--lr", "0.5")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "lr = 0.01, not 0.5" in err
    assert {path: path.read_bytes() for path in (tmp_path / "results" / "mine").iterdir()} == before


def test_a_run_is_left_alone_when_finished_and_run_again_when_asked(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("localsgd", *TINY)
    assert code == 0
    assert out.count("round ") == 3
    assert "finished: test accuracy" in out
    (folder,) = (tmp_path / "results").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "model.pt",
        "summary.json",
        ".lock",
    }
    code, out, _ = call("localsgd", *TINY)
    assert (code, out.count("round ")) == (0, 0)
    assert "finished: test accuracy" in out
    assert call("localsgd", *TINY, "--rerun")[1].count("round ") == 3


def test_stop_after_says_how_to_resume(call: Call) -> None:
    code, out, _ = call("localsgd", *TINY, "--stop-after-rounds", "2")
    assert (code, out.count("round ")) == (0, 2)
    assert "stopped early" in out
    assert call("localsgd", *TINY)[1].count("round ") == 1


def test_a_study_is_run_reported_and_planned(call: Call, tmp_path: Path) -> None:
    keys = {"dataset": "synthetic:images=128", "model": "lenet5", "batch-size": 16, "epochs": 1.0}
    lines = [f"{name} = {json.dumps(value)}" for name, value in keys.items()]
    head = ['title = "Mine"', 'mode = "localsgd"', "[grid]", "local-steps = [1, 2]", "seed = [1]", "[set]"]
    (tmp_path / "mine.toml").write_text("\n".join([*head, *lines]))
    code, out, _ = call("study", "mine.toml", "--seeds", "1,2", "--device", "cpu", "--threads", "1")
    assert (code, "4/4  mine/j2-seed2  test " in out) == (0, True)
    assert out.endswith(f"python run.py report {tmp_path}/results/mine -o report\n")
    assert len(list((tmp_path / "results" / "mine").glob("j*-seed[12]/summary.json"))) == 4
    assert call("report")[0] == 0
    assert "Mine" in (tmp_path / "report" / "index.html").read_text()
    assert call("time-to-accuracy", "--bandwidth", "100Mbit", "--latency", "20ms", "--target", "0.01")[0] == 0
    assert (tmp_path / "report" / "time-to-accuracy-mine.csv").exists()


def test_the_names_of_studies_are_complete_in_a_pipe(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = call("study")
    listed = [line.partition(": ")[0] for line in out.splitlines()]
    assert (code, sorted(name for name in listed if name in study_names())) == (0, study_names())
    asked = listed.index("What buys the syncs back")  # a question stands above its studies
    assert [name for name in listed[asked + 1 : asked + 13 : 2] if not name.startswith("methods-")] == []
    code, _, err = call("study", "--also", "outer=diloco")
    assert (code, err) == (2, "error: also is of the studies that run: name one, for instance kj-small\n")


def test_a_file_is_a_preset_and_a_dry_run_writes_nothing(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('title = "Mine"\nmode = "localsgd"\n[set]\nlr = 0.25\nrounds = 5\n')
    code, out, _ = call("localsgd", *TINY, "--config", "mine.toml", "--rounds", "4", "--dry-run")
    assert code == 0
    assert "new: 4 rounds, 8 local steps, 256 images, 2.0 MB up, 2.0 MB down" in out
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.toml"]
    assert call("localsgd", *TINY, "--preset", "mine.toml", "--name", "one")[0] == 0
    assert json.loads((tmp_path / "results/one/config.json").read_text())["lr"] == 0.25
    assert (
        "one  finished: 3 rounds, 6 local steps, "
        in call("localsgd", *TINY, "--name", "one", "--lr", "0.25", "--dry-run")[1]
    )
    code, out, _ = call("study", "demo", "--dry-run", "--cells", "k4-*", "--device", "cpu")
    assert (code, out.count(" new: "), out.count("\n")) == (0, 3, 5)
    tuned = "[grid]\nclients = [1, 2]\nlocal-steps = [1]\n[set]\ndataset = 'synthetic'\nmodel = 'lenet5'\n"
    tuned += "[tune]\nvalidation = 1000\nbudget = 0.1\ngrid = {lr = [0.1, 0.2, 0.3]}\n"
    (tmp_path / "tuned.toml").write_text('title = "Tuned"\nmode = "localsgd"\n' + tuned)
    out = call("study", "tuned.toml", "--device", "cpu", "--dry-run")[1]
    assert out.count(" new: 109 rounds, 109 local steps, 6,976 images, ") == 3  # of K = 1: a tenth of 7000 / 64 * 10
    assert out.count(" new: 1,250 rounds, ") == 1
    assert out.count(" new: ") == 6 + 2
    assert not (tmp_path / "results" / "tuned").exists()
    study = read_study("tuned.toml")
    chosen = study.model_copy(update={"chosen": {"k1-j1": {"lr": 0.2}}})
    (cell, *_) = chosen.cells()
    write_run(tmp_path / "results/tuned" / cell.config.name, cell.config.changed(HERE), cell.mode, [0.1])
    (tmp_path / "results/tuned/study.toml").write_text(chosen.toml)
    code, out, _ = call("study", "tuned.toml", "--device", "cpu", "--threads", "1", "--dry-run")
    assert (code, f"{cell.config.name}  finished: " in out) == (0, True)
    code, out, _ = call("centralized", *TINY[:-10], "--epochs", "2", "--device", "cpu", "--dry-run")
    assert (code, "  new: 32 local steps, 512 images, " in out) == (0, True)


def test_any_key_of_a_grid_may_be_a_list(call: Call, tmp_path: Path) -> None:
    keys = "grid --lr 0.01,0.1 --optimizer sgdm,lars:trust=0.01,nesterov=true --schedule multistep:milestones=1/2 "
    keys += "--clients 1 --local-steps 8"
    code, out, err = call(*keys.split(), *TINY[:-10], "--device", "cpu", "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == [
        f"k1-j8-{optimizer}-{lr}-seed2025"
        for optimizer in ("sgdm", "lars-trust=0.01,nesterov=true")
        for lr in ("lr0.01", "lr0.1")
    ]


@pytest.mark.parametrize(
    ("keys", "cells"),
    [
        ("--local-epochs 1,2", ["k2-local-epochs1", "k2-local-epochs2"]),
        ("--local-epochs 1", ["k2"]),
        ("--preset mine.toml", ["k2"]),
        ("", ["k2-j10", "k2-j20", "k2-j30"]),
        ("--local-steps 4", ["k2-j4"]),
    ],
)
def test_a_grid_of_local_epochs_crosses_no_local_steps(call: Call, tmp_path: Path, keys: str, cells: list[str]) -> None:
    (tmp_path / "mine.toml").write_text('title = "Mine"\nmode = "localsgd"\n[set]\nlocal-epochs = 2\n')
    command = ["grid", *TINY[:6], "--batch-size", "4", "--device", "cpu", "--clients", "2", *keys.split(), "--dry-run"]
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == [f"{cell}-seed2025" for cell in cells]
    assert re.match("grid(-local-epochs)?-sgdm-b4-[0-9a-f]{6}:", out)


@pytest.mark.parametrize(
    ("switches", "values"),
    [
        (
            "--decay-biases-and-norms true,false --error-feedback false,true --compress int8",
            [(False, False), (False, True), (True, False), (True, True)],
        ),
        ("--decay-biases-and-norms --no-error-feedback --compress int8", [(True, False)]),
        ("--no-decay-biases-and-norms", [(False, True)]),
        ("--decay-biases-and-norms=true", [(True, True)]),
    ],
)
def test_switches_of_a_grid_may_be_lists(call: Call, tmp_path: Path, switches: str, values: list[Any]) -> None:
    keys = [*TINY[:-10], "--device", "cpu", "--epochs", "0.5", "--name", "switches"]
    code, _, err = call("grid", *keys, "--clients", "1", "--local-steps", "8", *switches.split())
    assert (code, err) == (0, "")
    configs = [json.loads(path.read_text()) for path in tmp_path.glob("results/switches/*/config.json")]
    crossed = [(config["decay-biases-and-norms"], config["error-feedback"]) for config in configs]
    assert sorted(crossed) == values


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("fedsim loc", "plain,localsgd"),
        ("fedsim localsgd --local-steps-s", "plain,--local-steps-schedule"),
        ("fedsim grid --model le", "plain,lenet5"),
        ("fedsim study methods-ou", "plain,methods-outer"),
        ("fedsim study kj-small --cells k4-j4,k16-j1", "plain,k4-j4,k16-j16"),
        ("fedsim compare results/a results/b", "file,results/b"),
    ],
)
def test_a_shell_completes_commands_keys_and_choices(words: str, completed: str) -> None:
    code = "import sys; sys.argv[0] = 'fedsim'; from fedsim.__main__ import main; main()"
    asked = {"_FEDSIM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert completed in done.stdout.split(), done.stderr


def test_the_completion_that_is_shown_is_of_the_installed_command(call: Call) -> None:
    """Also by ``python run.py``, whose name no shell could complete."""
    code, out, _ = call("--show-completion", "bash")
    assert (code, "_FEDSIM_COMPLETE=bash_complete" in out, "RUN" in out) == (0, True, False)


def test_the_console_command_is_the_command_line() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"fedsim": f"{run_main.__module__}:{run_main.__name__}"}


def test_a_tracker_that_is_not_installed_is_one_line(call: Call) -> None:
    if importlib.util.find_spec("tensorboard"):
        pytest.skip("tensorboard is installed")
    code, out, err = call("centralized", *TINY[:-10], "--track", "tensorboard")
    assert (code, out) == (2, "")
    assert err == "error: track = tensorboard: it is not installed: pip install 'fedsim[tensorboard]'\n"


def test_a_tracker_has_the_rows(call: Call, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert call("localsgd", *TINY, "--name", "one", "--stop-after-rounds", "2", "--track", "tensorboard")[0] == 0
    assert call("localsgd", *TINY, "--name", "one", "--track", "tensorboard")[0] == 0
    events = accumulator.EventAccumulator(str(tmp_path / "results/one/tensorboard")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "results/one/metrics.jsonl").read_text().splitlines()]
    seen = [(event.step, event.value) for event in events.Scalars("test_accuracy")]
    assert seen == [(row["round"], pytest.approx(row["test_accuracy"])) for row in rows]
    for name in ("syncs", "bytes_up", "bytes_down"):
        assert [event.value for event in events.Scalars(name)] == [pytest.approx(row[name]) for row in rows]
    text = events.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert {"    clients = 2", "    local-steps = 2"} <= set(text.splitlines())


def test_shards_are_written_for_nodes(call: Call, tmp_path: Path) -> None:
    code, out, _ = call(*"export-shards --dataset synthetic:images=70 --clients 3 -o shards/".split())
    assert (code, out) == (0, "3 shards in shards\n")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.npy")) == [
        f"shards/{worker}/{name}.npy" for worker in range(3) for name in ("images", "labels")
    ]


def test_a_failed_run_is_one_line_and_exit_code_1(call: Call) -> None:
    arguments = "centralized --dataset synthetic:images=512 --model lenet5 --device cpu --lr 1e9"
    code, _, err = call(*arguments.split())
    assert (code, err.count("\n")) == (1, 1)
    assert "is nan: a lower --lr may help" in err


GRIDS_OTHERS = (("grid", "seed"), ("grid", "resume"))  # it has --seeds, and resumes its cells without a key


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_help_cuts_nothing_in_80_columns(call: Call, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Each flag stands on a line with all that follows it, and each key's help is there to its end."""
    monkeypatch.setenv("COLUMNS", "80")
    has_all = command and "help_all" in {parameter.name for parameter in cli.commands[command].params}
    code, out, _ = call(*command.split(), "--help-all" if has_all else "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    words = "".join(out.split())
    for parameter in cli.commands[command].params if command else []:
        assert all(flag in words for flag in [*parameter.opts, *parameter.secondary_opts])
        assert "".join((getattr(parameter, "help", None) or "").split()) in words
    assert "…" not in out
    assert "\\" not in out


def test_the_short_help_fits_on_a_screen_and_tells_of_the_rest(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in cli.commands:
        code, out, _ = call(command, "--help")
        assert (code, len(out.splitlines()) <= 45) == (0, True), command
    _, out, _ = call("localsgd", "--help")
    assert "--outer" not in out
    assert re.search(r"--help-all: \d+ more", out)


def test_every_key_is_a_flag_with_its_default_in_the_help(call: Call) -> None:
    for command in ("localsgd", "centralized", "grid"):
        code, out, _ = call(command, "--help-all")
        assert code == 0
        for name, field in FIELDS.items():
            mode: Mode = "centralized" if command == "centralized" else "localsgd"
            offered = has_key(mode, name) and (command, name) not in GRIDS_OTHERS
            assert (f"--{kebab(name)} " in out) == offered, name
            if offered and (command != "grid" or name not in ("clients", "local_steps", "results_dir")):
                default = {"": "empty", True: "true", False: "false"}.get(field.default, field.default)
                assert f"(default:{default})" in "".join(out.split())
        assert out.index("Keys used most:") < out.index("Options:") < out.index("Data:") < out.index("The run:")
        assert out.index("Schedule and budget:") < out.index("--warmup-epochs") < out.index("--checkpoint-every")


def test_help_and_version_come_without_torch() -> None:
    for arguments in ("localsgd --help", "--version"):
        command = [sys.executable, "-X", "importtime", "run.py", *arguments.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0
        imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
        assert "fedsim.cli" in imported
        assert not imported & {"torch", "numpy", "flwr"}


def test_without_a_command_there_is_help_and_no_error(call: Call) -> None:
    code, out, err = call()
    assert (code, err) == (2, "")
    assert "Commands:" in out


def test_the_version_is_printed_by_the_module_too() -> None:
    for start in (["run.py"], ["-m", "fedsim"]):
        done = subprocess.run([sys.executable, *start, "--version"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"fedsim {__version__}\n", "")


@pytest.mark.parametrize(
    ("start", "called"),
    [
        ("/usr/local/bin/fedsim", "fedsim"),
        ("run.py", "python run.py"),
        (f"{ROOT}/fedsim/__main__.py", "python -m fedsim"),
    ],
)
def test_the_program_is_named_as_the_user_called_it(monkeypatch: pytest.MonkeyPatch, start: str, called: str) -> None:
    monkeypatch.setattr(sys, "argv", [start, "study"])
    assert program() == called


def test_errors_of_several_lines_are_printed_on_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RunFailed("the SuperLink did not start:\n  line one\r\n\x1b[31mline two")

    monkeypatch.setattr(execute, "configured_run", fail)
    code, _, err = call("localsgd")
    assert (code, err) == (1, "error: the SuperLink did not start: line one \\x1b[31mline two\n")


def test_names_and_paths_are_shown_as_they_are(call: Call) -> None:
    """Not read as rich's markup or emoji."""
    keys = [*TINY[:-10], "--epochs", "0.1", "--device", "cpu", "--clients", "1,2", "--local-steps", "1"]
    code, out, err = call("grid", *keys, "--results-dir", "r[/b]", "--name", "[red]:smile:", "--lr", "1e30")
    assert code == 1, err  # every cell diverges
    assert "failed: " in out
    assert "/r[/b]/[red]:smile:/grid.csv" in "".join(out.split())
    code, out, err = call("report", "r[/b]", "-o", "[/b]")
    assert code == 0, err
    assert "[/b]/index.html" in "".join(out.split())


@pytest.mark.parametrize("tested_on", ["test", "validation"])
def test_a_row_fits_80_columns(capsys: pytest.CaptureFixture[str], tested_on: str) -> None:
    row = {
        "round": 123456,
        "epoch": 123.456,
        "lr": 0.12345,
        "train_loss": 4.60517,
        "test_loss": 4.60517,
        "test_accuracy": 0.98765,
        "tested_on": tested_on,
        "seconds": 98765.4,
    }
    print_row(row)
    print_row({**row, "test_loss": None, "test_accuracy": None})
    print_row({**row, "train_loss": None, "seconds": 1.25})
    full, untested, early = capsys.readouterr().out.splitlines()
    assert "123456" in full
    assert "98.77%" in full
    assert "98765 s" in full
    assert len(full) == len(untested) == len(early) <= 79
    assert early.endswith("  1.2 s")


def test_the_real_command_runs_and_records_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "run.py"), "localsgd", *TINY, "--name", "one"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "results" / "one" / "summary.json").read_text())
    assert summary["command"].startswith("run.py localsgd --dataset synthetic")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert {"torch._C", "flwr"} <= imported
    assert not imported & NOT_FOR_A_RUN
    bad = run(tmp_path, *command[4:], "--lr", "0")
    assert (bad.returncode, bad.stderr.count("\n")) == (2, 1)
    assert "Traceback" not in bad.stderr
