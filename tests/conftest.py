"""What the tests share: small configurations, runs in a temporary folder, and the real data where it is present."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsim import cli
from fedsim.config import Config, Mode
from fedsim.data.folder import data_folder
from fedsim.device import resolve
from fedsim.experiments.execute import execute
from fedsim.experiments.study import LARGE_BATCH, read_study
from fedsim.registry import MODELS
from fedsim.runs.run import Run
from fedsim.system import provenance

SMALL: dict[str, Any] = {
    "dataset": "synthetic:images=128",
    "model": "lenet5",
    "batch-size": 4,
    "clients": 4,
    "local-steps": 2,
    "epochs": 2.0,
    "threads": 1,
    "device": "cpu",
}

SMALL_BATCHNORM = "tests.own_code:small_batchnorm"

# What people compare: a ResNet-18 with GroupNorm, uneven shards, an optimizer on the server, compressed updates
RESNET: dict[str, Any] = {
    **SMALL,
    "dataset": "synthetic:images=512",
    "model": "resnet18:norm=gn",
    "augment": "crop:size=8+mirror",
    "partition": "dirichlet:alpha=0.5",
    "mean": "exact:weights=shard-size",
    "outer": "fedadam:lr=0.01",
    "compress": "int8",
    "batch-size": 4,
    "rounds": 3,
    "fraction": 0.5,
    "momentum-at-sync": "reset",
    "error-feedback": False,
    "evaluate-clients-every": 2,
}

# Every other method, for the tests that compare engines: three rounds of a model with BatchNorm each
METHODS: dict[str, dict[str, Any]] = {
    "fedprox-trimmed-fp16": {"local-rule": "fedprox", "mean": "trimmed:trim=0.34", "compress": "fp16"},
    "scaffold-inferred": {"local-rule": "scaffold-inferred", "momentum": 0.0, "weight-decay": 0.0},
    "post-local-median": {"local-steps-schedule": "post-local:switch-epoch=0.2", "mean": "median"},
    "qsr-qsgd-re-estimated": {"local-steps-schedule": "qsr:alpha=0.03", "compress": "qsgd"},
    "fedyogi-randomk-local": {"outer": "fedyogi", "compress": "randomk", "batchnorm-at-sync": "local"},
    "lars-sign-first-worker": {"optimizer": "lars", "compress": "sign", "batchnorm-at-sync": "first-worker"},
    "lamb-clipped-int4": {"optimizer": "lamb", "lr": 0.001, "mean": "clipped", "compress": "int4"},
    "diloco-bf16-pooled": {"outer": "diloco", "compress": "bf16", "batchnorm-at-sync": "pooled"},
    "fedadagrad-powersgd": {"outer": "fedadagrad", "compress": "powersgd", "momentum-at-sync": "average"},
    "adacomm": {"local-steps-schedule": "adacomm:every=0.2,shrink=0.6", "compress": "qsgd", "schedule": "constant"},
    "uneven-fednova": {"workers": "uneven:speed=0.5/1,away=0.3", "local-rule": "fednova", "momentum-at-sync": "reset"},
    "streaming-int8": {"outer": "streaming:fragments=3", "compress": "int8", "compress-down": "fp16"},
    "groups-noloco-topk": {
        "topology": "groups:size=2,every=2",
        "outer": "noloco",
        "compress": "topk",
        "momentum-at-sync": "average",
        "evaluate-clients-every": 1,
    },
    "flowers-fedadam": {"outer": "flwr.serverapp.strategy:FedAdam:eta=0.01"},
}
METHODS["qsr-qsgd-re-estimated"] |= {"batchnorm-at-sync": "re-estimated:images=100", "schedule": "constant"}
for method in METHODS.values():
    by = "epoch" if "local-steps-schedule" in method else "round"
    method |= {"model": "lenet-bn", "rounds": 3, "record-by": by}

TEXT: dict[str, Any] = {  # what learns the next byte of a text, who holds which documents
    **SMALL,
    "dataset": "text:context=8",
    "model": "gpt-tiny:layers=1,width=8,heads=2",
    "optimizer": "adamw",
    "lr": 0.01,
    "rounds": 3,
    "evaluate-clients-every": 2,
}

# These files start many processes: they run first and, where there are several workers, on one of them
OF_PROCESSES = ("test_flwr_run.py", "test_ray.py", "test_deployment.py")
# Then those of a long test: at the end one worker would take it, and the others have nothing to do
LONG = ("test_tutorial.py", "test_your_method.py", "test_torch_distributed.py")

Execute = Callable[..., Run]
Call = Callable[..., tuple[int, str, str]]
torch.set_num_threads(1)  # two threads on cores that other tests use wait for each other
TIMES = int(os.environ.get("FEDSIM_EXAMPLES", "1"))  # as many examples of hypothesis
NEEDS_FLWR_DATASETS = pytest.mark.skipif(
    importlib.util.find_spec("flwr_datasets") is None, reason="needs flwr-datasets: pip install fedsim[noniid]"
)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


REAL_DATA = data_folder(Config())  # read before `cache` hides it


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does: fixtures end the processes that they have started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files `OF_PROCESSES` first, then `LONG`; tests with the fixture `real_data` have the marker `data`."""
    first = (*OF_PROCESSES, *LONG)
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile`` one worker takes all files `OF_PROCESSES`, whose memory would add up side by side."""
    from xdist.scheduler import LoadFileScheduling

    class OneAtATime(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "of processes" if file.endswith(OF_PROCESSES) else file

    return OneAtATime(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_finish() -> None:
    """What the tests have imported stays: a garbage collection need not look through it, which takes 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache() -> Iterator[Path]:
    """A cache folder for all tests, so that images are decoded once, and an empty data folder."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="fedsim-") as folder:
        (empty := Path(folder) / "no-data").mkdir()
        patch.setenv("FEDSIM_DATA", str(empty))
        patch.setenv("XDG_CACHE_HOME", folder)
        yield Path(folder)


@pytest.fixture(scope="session", autouse=True)
def writing_a_run_takes_no_wait() -> Iterator[None]:
    """What only a power cut would show is left out, and git and the packages are asked for their versions once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        for name in ("versions", "_commit"):
            patch.setattr(provenance, name, functools.cache(getattr(provenance, name)))
        yield


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_returned() -> Iterator[None]:
    """After each file: within a run fedsim keeps it (`fedsim.device.keep_freed_memory`).

    What is left, such as modules, stays: a later collection would look through it for half a second.
    """
    yield
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture
def small(tmp_path: Path) -> Config:
    """A run of a quarter of a second on the CPU: 8 rounds of 4 clients, 2 steps each, in 2 epochs of 128 images."""
    return Config().changed({**SMALL, "results-dir": str(tmp_path)})


@pytest.fixture
def run(small: Config) -> Execute:
    """Execute `small` with some keys changed, in `mode`; returns the run."""

    def execute_small(mode: Mode = "localsgd", **changes: Any) -> Run:
        keys = {name.replace("_", "-"): value for name, value in changes.items()}
        return execute(resolve(small.changed(keys), mode), mode)

    return execute_small


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in this process, in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return called


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> str:
    """The folder of the real CIFAR-100, which FEDSIM_DATA names in the test; without the data the test is skipped."""
    if not (REAL_DATA / "cifar-100-python" / "train").exists():
        pytest.skip(f"no CIFAR-100 in {REAL_DATA}: set FEDSIM_DATA")
    monkeypatch.setenv("FEDSIM_DATA", str(REAL_DATA))
    return str(REAL_DATA)


def register(monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[int], nn.Module]) -> None:
    """Let `name` be a model of the registry for a test."""
    monkeypatch.setattr("tests.conftest.registered", build, raising=False)
    monkeypatch.setitem(MODELS.places, name, "tests.conftest:registered")


def final_model(run: Run | Path) -> dict[str, Tensor]:
    """The global model that a run left in its folder."""
    folder = run.folder if isinstance(run, Run) else run
    state: dict[str, Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return state


def rows_of(run: Run | Path) -> list[dict[str, Any]]:
    """The rows of a run without seconds and overheads, which interruptions change."""
    folder = run.folder if isinstance(run, Run) else run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"]
        for way in ("up", "down"):
            row.pop(f"overhead_bytes_{way}", None)
    return rows


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Both have the same names, and each name the same bits."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"these differ: {different}"


def write_run(
    folder: Path,
    config: Config,
    mode: Mode,
    accuracies: list[float | None],
    finished: bool = True,
    **costs: float,
) -> Path:
    """Write the records of a run with a row per accuracy; `costs` are those of one round (or epoch)."""
    each = {"steps_done": 10, "syncs": 1, "bytes_up": 1000, "bytes_down": 1000, "seconds": 2.0, **costs}
    rows: list[dict[str, Any]] = [
        {
            "round": round_,
            "epoch": float(round_),
            **{name: round_ * value for name, value in each.items()},
            "test_accuracy": accuracy,
        }
        for round_, accuracy in enumerate(accuracies, 1)
    ]
    tested = [accuracy for accuracy in accuracies if accuracy is not None]
    summary = {
        "finished": finished,
        "best_test_accuracy": max(tested, default=None),
        "final_test_accuracy": tested[-1] if tested else None,
        **{name: value for name, value in rows[-1].items() if name != "test_accuracy"},
        "parameters": 250,
        "device": "cpu (of the test)",
        "commit": "abc",
        "command": "run.py paper",
        "versions": {"torch": "1"},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.record(mode, own=False)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


STUDY = """title = "A study of the tests"
mode = "localsgd"
twins = true
[grid]
clients = [2, 4]
local-steps = [1, 8]
seed = [1, 2]
[set]
dataset = "synthetic"
batch-size = 16
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Records of `STUDY`: all of K = 2; of K = 4 one seed at J = 1, one unfinished at J = 8, and no baseline."""
    folder = tmp_path / "results" / "mine"
    folder.mkdir(parents=True)
    (folder / "study.toml").write_text(STUDY)
    for cell in read_study(str(folder / "study.toml")).cells():
        k, down, seed = cell.config.clients, cell.coords[1], cell.config.seed
        if (k, seed) == (4, 2) or (k, down) == (4, LARGE_BATCH):
            continue
        final = 0.4 + 0.02 * seed + (0.1 if down == 8 else 0.0)
        sent = 0.0 if down == LARGE_BATCH else k * (1000.0 if down == 8 else 8000.0)
        costs = {"steps_done": 8, "syncs": {1: 8, 8: 1, LARGE_BATCH: 0}[down], "bytes_up": sent, "bytes_down": sent}
        write_run(
            folder / cell.config.name,
            cell.config,
            cell.mode,
            [0.1, None, final + 0.01, final],
            (k, down) != (4, 8),
            **costs,
        )
    return folder
