"""fedsim from Python."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedsim
from fedsim.api import as_keys
from fedsim.config import FIELDS, Config
from fedsim.config.options import GridOptions, LocalSGDOptions, StudyOptions
from fedsim.errors import UserError
from fedsim.experiments.study import read_study
from fedsim.experiments.tune import trials_of
from fedsim.models.lenet import LeNet5
from tests.conftest import assert_same_bits, write_run

TINY: dict[str, Any] = {
    "dataset": "synthetic:images=256",
    "model": "lenet5",
    "batch_size": 16,
    "epochs": 1,
    "device": "cpu",
    "threads": 1,
    "progress": False,
}


def test_import_takes_neither_torch_nor_numpy() -> None:
    slow = {"torch", "numpy", "flwr", "pandas", "pydantic"}
    code = f"import sys, fedsim; print(fedsim.__version__, {slow} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{fedsim.__version__} set()\n", done.stderr


def test_a_run_is_a_frame_a_summary_and_a_model_and_is_not_run_twice(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), list[dict[str, Any]]()
    keys = {**TINY, "clients": np.int64(2), "local_steps": 4, "lr": np.float32(0.5), "results_dir": tmp_path}
    run = fedsim.localsgd(**keys, on_row=seen.append)
    assert run.finished
    assert list(run.rows["round"]) == [row["round"] for row in seen] == [1, 2]
    assert run.rows["test_accuracy"].iloc[-1] == run.summary["final_test_accuracy"]
    assert (run.config["clients"], run.config["lr"], run.config["mode"]) == (2, 0.5, "localsgd")
    LeNet5(10).load_state_dict(run.state_dict())
    assert all(torch.equal(value, run.state_dict()[name]) for name, value in run.model().state_dict().items())
    panels = {panel.get_ylabel(): len(panel.lines) for panel in run.plot().axes}
    assert panels == {"test_loss": 1, "test_accuracy": 1}
    assert fedsim.localsgd(**keys, on_row=seen.append).folder == run.folder
    assert len(seen) == 2
    assert torch.get_num_threads() == before
    assert fedsim.centralized(**TINY, name="one", results_dir=tmp_path).rows["syncs"].tolist() == [0]


def test_a_grid_gives_each_row_with_the_name_of_its_run(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    found = fedsim.grid(**TINY, clients=2, local_steps=[2, 4], name="g", results_dir=tmp_path, on_row=seen.append)
    assert {row["run"] for row in seen} == set(found.runs["run"])
    for name in found.runs["run"]:
        assert [row["round"] for row in seen if row["run"] == name] == list(found[name].rows["round"])


def test_calls_in_several_threads_have_the_bits_of_calls_alone(tmp_path: Path) -> None:
    shape = {**TINY, "clients": 5, "local_steps": 2, "batch_size": 8, "epochs": 1, "results_dir": tmp_path}
    asked = [
        {"engine": "local", "model": "lenet5"},
        {"engine": "stacked", "model": "lenet5", "optimizer": "lars"},
        {"engine": "stacked", "model": "tests.own_code:small_batchnorm"},
        {"engine": "local", "model": "tests.own_code:mlp", "outer": "flwr.serverapp.strategy:FedAdam"},
    ]

    def call(name: str, number: int) -> Any:
        return fedsim.localsgd(**{**shape, **asked[number]}, seed=number, name=f"{name}-{number}")

    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda number: call("together", number), range(len(asked))))
    for number, run in enumerate(together):
        assert_same_bits(run.state_dict(), call("alone", number).state_dict())


def test_what_is_not_what_the_summary_was_written_with_is_not_returned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fedsim.localsgd(**TINY, clients=2, local_steps=4, name="run", results_dir=tmp_path)
    files = {name: (run.folder / name).read_bytes() for name in ("model.pt", "metrics.jsonl", "summary.json")}
    flipped = bytearray(files["model.pt"])
    flipped[len(flipped) // 2] ^= 1
    (run.folder / "model.pt").write_bytes(flipped)
    with pytest.raises(fedsim.UserError, match=r"model.pt is not what summary.json was written with.*give --rerun"):
        run.state_dict()
    (run.folder / "model.pt").unlink()
    with pytest.raises(fedsim.UserError, match=r"run holds no model.pt: run it"):
        run.state_dict()
    (run.folder / "metrics.jsonl").write_bytes(files["metrics.jsonl"].replace(b'"train_loss": ', b'"train_loss": 1'))
    with pytest.raises(fedsim.UserError, match=r"metrics.jsonl is not what summary.json was written with"):
        run.rows  # noqa: B018
    assert len(fedsim.StudyResult(tmp_path).runs) == 0
    warned = f"warning: {run.folder}/metrics.jsonl: its SHA-256 is not the one in summary.json; the run is left out\n"
    assert capsys.readouterr().err == warned
    (run.folder / "summary.json").write_bytes(files["summary.json"].replace(b'"syncs": ', b'"syncs": 1'))
    with pytest.raises(fedsim.UserError, match=r"summary.json is damaged"):
        run.summary  # noqa: B018


def test_keys_that_are_lists_are_crossed(tmp_path: Path) -> None:
    keys = {**TINY, "results_dir": tmp_path, "name": "mine", "local_steps": 8}
    found = fedsim.grid(clients=list(np.arange(2, 3)), lr=np.array([0.01, 0.1]), seed=range(7, 8), **keys)
    names = {f"k2-lr{lr}-seed7" for lr in (0.01, 0.1)}
    assert set(found.runs["run"]) == names
    assert found["k2-lr0.1-seed7"].config["lr"] == 0.1
    assert len(found.rows) == sum(len(found[name].rows) for name in names)
    again = fedsim.study(
        tmp_path / "mine" / "study.toml", device="cpu", threads=1, results_dir=tmp_path, progress=False
    )
    assert again.folder == found.folder
    assert found == fedsim.StudyResult(str(found.folder))
    assert found["k2-lr0.1-seed7"] == fedsim.Result(str(found.folder / "k2-lr0.1-seed7"))
    for open_folder, words in (
        (fedsim.Result, "is not the folder of a run: give one that holds a config.json"),
        (fedsim.StudyResult, "holds no runs: give the folder of a study"),
    ):
        with pytest.raises(fedsim.UserError, match=words):
            open_folder(str(tmp_path / "none"))
    with pytest.raises(fedsim.UserError, match="k9-seed7 is not the folder of a run"):
        found["k9-seed7"]


def test_frames_have_numbers_and_one_name_for_one_thing(tmp_path: Path) -> None:
    for steps, rate, first, last in ((2, 0.1, 0.1, 0.2), (8, 0.1, 0.1, 0.6), (8, 0.5, 0.2, None)):
        config = Config(lr=rate, local_steps=steps, seed=1)
        write_run(tmp_path / f"{steps}-{rate}", config, "localsgd", [first, last], finished=rate < 0.5)
    write_run(tmp_path / "twin", Config(lr=0.1), "centralized", [0.3])
    runs = fedsim.StudyResult(tmp_path).runs
    assert runs.pivot_table(columns="local_steps", values="final_test_accuracy").to_dict("list") == {2: [0.2], 8: [0.4]}
    means = runs.groupby("lr").mean(numeric_only=True)
    assert means["final_test_accuracy"].tolist() == pytest.approx([(0.2 + 0.6 + 0.3) / 3, 0.2])
    assert means["steps_done"].tolist() == pytest.approx([(20 + 20 + 10) / 3, 20])
    assert runs["local_steps"].isna().tolist() == [False, False, False, True]
    assert runs[["clients", "seed", "finished"]].dtypes.astype(str).tolist() == ["float64", "int64", "bool"]
    rows = fedsim.Result(tmp_path / "8-0.5").rows
    assert rows.dtypes.astype(str)[["round", "steps_done", "test_accuracy"]].tolist() == ["int64", "int64", "float64"]
    assert rows["test_accuracy"].isna().tolist() == [False, True]


def test_the_signature_has_every_key_with_its_default_and_its_help() -> None:
    parameters = inspect.signature(fedsim.localsgd).parameters
    assert {name: parameters[name].default for name in FIELDS} == {n: field.default for n, field in FIELDS.items()}
    assert all(f"    {name} = " in (fedsim.localsgd.__doc__ or "") for name in FIELDS)
    assert "clients" not in inspect.signature(fedsim.centralized).parameters
    for function, options in (
        (fedsim.localsgd, LocalSGDOptions),
        (fedsim.grid, GridOptions),
        (fedsim.study, StudyOptions),
    ):
        assert set(options.in_python()) <= set(inspect.signature(function).parameters)
        assert all(f"    {name} = " in (function.__doc__ or "") for name in options.in_python())
    assert "dry_run" not in inspect.signature(fedsim.study).parameters


def blocks(page: str, language: str) -> list[str]:
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python.md", "python"):
        exec(block, names)
    assert set(names["model"]) == set(LeNet5(10).state_dict())
    assert len(names["found"].runs) == 4


def test_the_study_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(blocks("studies.md", "toml")[0])
    study = read_study(str(tmp_path / "mine.toml"))
    assert (len(study.cells()), len(trials_of(study, study.cells()))) == (9, 9)


def build(classes: int) -> torch.nn.Module:
    return LeNet5(classes)


def test_a_function_is_named_where_every_process_can_import_it() -> None:
    assert as_keys(LocalSGDOptions, {"model": build}) == {"model": "tests.test_api:build"}
    for function in (lambda classes: build(classes), type("Here", (), {"__module__": "__main__"})):
        with pytest.raises(
            UserError, match=r"^model = .*it cannot be imported by name: define it at the top of a file"
        ):
            as_keys(LocalSGDOptions, {"model": function})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"local_step": 3}, "unknown key local-step: did you mean local-steps?"),
        ({"on_rows": lambda row: None}, "unknown key on-rows: "),
        ({"epochs": 2.5, "rounds": 3}, "epochs = 2.5 is not used with rounds = 3: leave one of them out"),
        ({"clients": 0}, "clients = 0 is out of range"),
        ({"clients": "two"}, "clients = 'two' is not a whole number"),
        ({"track": "wandb"}, "track = wandb is unknown: it must be one of tensorboard, or package.module:"),
        ({"preset": "none"}, "unknown preset none"),
        ({"preset": Path("none.toml")}, "none.toml cannot be read"),
        ({"lr": np.array([0.1, 0.2])}, "lr = array([0.1, 0.2]) is not a number"),
        ({"on_row": print, "engine": "flower"}, "on_row with engine = flower: its rows are written by another process"),
        (
            {"track": "tensorboard", "engine": "flower"},
            "track = tensorboard with engine = flower: its rows are written",
        ),
        ({"engine": "ray"}, "engine = 'ray' is unknown"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(fedsim.UserError) as caught:
        fedsim.localsgd(**{**TINY, "results_dir": tmp_path / "new", **keys})
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    with pytest.raises(fedsim.UserError, match="clients is a key of localsgd alone: leave it out"):
        fedsim.centralized(clients=3)
    with pytest.raises(fedsim.UserError, match="unknown key lr: "):
        fedsim.study("demo", lr=0.1)
    with pytest.raises(fedsim.UserError, match="on_row with Ray: its rows are written by other processes"):
        fedsim.grid(clients=[1, 2], on_row=lambda row: None, engine="flower")
