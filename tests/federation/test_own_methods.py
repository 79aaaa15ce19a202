"""Methods of the user's own, by their names in every key that chooses something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedsim
from fedsim.cli.listing import listed
from fedsim.config import ARGUMENTS, Config
from fedsim.errors import UserError
from fedsim.experiments.execute import check, execute
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.registry import CODECS
from fedsim.runs.folder import read_config
from strategies.arguments import arguments_of
from strategies.compression import TopK
from tests.conftest import Call, assert_same_bits, final_model, rows_of

OWN = "tests.own_methods:"
EVERYWHERE: list[dict[str, Any]] = [
    {"layer": f"{OWN}Drift:strength=0.2", "momentum": 0.0},
    {"local-rule": f"{OWN}Drift", "layer": "delay"},
    {"layer": f"{OWN}Drift+{OWN}Drift:strength=0.3"},
    {"outer": f"{OWN}Half:part=0.7"},
    {"compress": f"topk:ratio=0.5+{OWN}Rounded:digits=2", "compress-down": f"{OWN}Rounded"},
    {"mean": f"{OWN}First"},
    {"partition": f"{OWN}EveryOther"},
    {"optimizer": f"{OWN}SignSGD:scale=0.5"},
    {"schedule": f"{OWN}Triangle"},
    {"local-steps-schedule": f"{OWN}Alternating", "record-by": "epoch"},
    {"local-steps-schedule": f"{OWN}Growing", "record-by": "epoch"},
    {"workers": f"{OWN}Shifts:part=0.6"},
]


@pytest.mark.parametrize("keys", EVERYWHERE)
def test_own_code_stands_where_a_name_may_and_resumes_bitwise(small: Config, keys: dict[str, Any]) -> None:
    config = small.changed({"rounds": 4, "checkpoint-every": 1, **keys})
    whole = execute(config.changed({"name": "whole"}), "localsgd")
    execute(config.changed({"name": "cut", "stop-after-rounds": 2}), "localsgd")
    cut = execute(config.changed({"name": "cut"}), "localsgd")
    assert_same_bits(final_model(whole.folder), final_model(cut.folder))
    assert rows_of(whole.folder) == rows_of(cut.folder)
    held = read_config(whole.folder)
    for key, text in keys.items():
        if OWN in str(text):
            assert held[key] == text
            assert (key in held[ARGUMENTS]) == (key not in ("mean", "schedule", "local-steps-schedule"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer": f"{OWN}Forgets"}, "in a trial end gives no conv1.bias in the memory that `keeps` declares"),
        ({"layer": f"{OWN}Replies"}, "in a trial end gives secret, which is not in the reply that `replies` declares"),
        ({"layer": f"{OWN}Random"}, "gives other results when it is called again: let it draw no random numbers"),
        ({"layer": f"{OWN}InPlace"}, "in a trial begin changes a tensor that it was given: return new ones"),
        ({"layer": f"{OWN}Third"}, "fails in a trial (ValueError: no third round, own_methods.py line "),
        ({"layer": f"{OWN}Undeclared"}, "in a trial begin adds to the gradients: declare constant = True"),
        ({"layer": f"{OWN}Peeks"}, "in a trial begin reads what the server has sent: declare reads_message = True"),
        ({"layer": f"{OWN}Drift:strength=1"}, "Drift: strength = 1 must be a number at least 0 and less than 1"),
        ({"layer": f"{OWN}Drift:strenth=0.5"}, "has no argument strenth (did you mean strength?)"),
        ({"layer": f"{OWN}Rounded"}, f"{OWN}Rounded is no subclass of strategies.method.Method"),
        ({"layer": f"{OWN}Nothing"}, "tests.own_methods has no function or class Nothing"),
        ({"layer": "tests.no_methods:Drift"}, "no module tests.no_methods on this machine: install it, or put"),
        ({"layer": f"{OWN}NotFrozen"}, "is no frozen dataclass: write @dataclass(frozen=True) above it"),
        ({"layer": f"{OWN}Misspelt"}, "has begins, which nothing calls (did you mean begin?): correct it, or begin it"),
        ({"layer": f"{OWN}Drift:strength"}, "Drift: strength has no value: give strength=..."),
        ({"outer": f"{OWN}Drift"}, "its begin runs on a worker, where outer has no part: give it as --layer"),
        ({"compress": f"{OWN}Shorter"}, " in a tensor like the one encoded as [1]"),
        ({"mean": f"{OWN}Worst"}, "in a trial it gives values that are not finite: "),
        ({"partition": f"{OWN}Overlapping"}, "gives other things than numbers of images, each to one client"),
        ({"schedule": f"{OWN}Negative"}, "gives the factor -0.09"),
        ({"local-steps-schedule": f"{OWN}Standing"}, "gives J = 0 at step 0: it must be a whole number from 1 on"),
        ({"workers": f"{OWN}Idle"}, "gives 0 steps to worker 0 in round 1: it must be a whole number from 1 to 2"),
        ({"local-rule": "fedproxx"}, "is unknown: it must be one of none, fedprox"),
        ({"optimizer": f"{OWN}Drift"}, f"{OWN}Drift is no subclass of torch.optim.Optimizer"),
    ],
)  # fmt: skip
def test_what_it_does_wrong_is_one_line_before_anything_is_written(
    small: Config, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(small.changed({"record-by": "epoch", **keys}), "localsgd", "local")
    [key] = keys
    assert str(caught.value).startswith(f"{key} = ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keys", [{}, {"compress": "int8"}])
def test_a_worker_whose_memory_would_not_be_finite_begins_again_without(small: Config, keys: dict[str, Any]) -> None:
    run = execute(small.changed({"layer": f"{OWN}Spoils", "rounds": 8, **keys}), "localsgd")
    assert [row["left_out"] for row in rows_of(run.folder)] == [{}] * 5 + [{"1": MEMORY_LOST}] + [{}] * 2


def test_a_choice_may_be_an_object_or_a_dict_and_is_recorded_as_its_text(tmp_path: Path) -> None:
    ways = (TopK(0.5), {"name": "topk", "ratio": 0.5}, "topk:ratio=0.50")
    assert {Config().changed({"compress": way}).compress for way in ways} == {"topk:ratio=0.5"}


def test_a_changed_default_is_another_run(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small.changed({"rounds": 1, "compress": "topk"})
    execute(config, "localsgd")
    monkeypatch.setattr(TopK.__init__, "__defaults__", (0.02,))
    arguments_of.cache_clear()
    with pytest.raises(UserError, match=r"holds a run of another configuration \(compress = "):
        execute(config, "localsgd")
    arguments_of.cache_clear()


def test_a_tracker_of_ones_own_gets_the_configuration_and_each_row(tmp_path: Path) -> None:
    keys = {"dataset": "synthetic:images=96", "model": "lenet5", "clients": 2, "batch_size": 8, "local_steps": 2}
    result = fedsim.localsgd(**keys, rounds=2, results_dir=tmp_path, progress=False, track=f"{OWN}Lines")
    first, *lines = (result.folder / "lines.txt").read_text().splitlines()
    assert first == "K = 2, J = 2"
    assert lines == [f"{row['syncs']} {row['bytes_up']} {row['bytes_down']}" for row in rows_of(result.folder)]


def test_one_split_may_have_several_seeds(small: Config) -> None:
    """The shards are those of the partition's seed, and the initial weights those of the run's."""
    from fedsim.data.partition import shard_of

    one, other = (small.changed({"partition.seed": 7, "seed": seed}) for seed in (1, 2))
    assert [shard_of(one, k).tolist() for k in range(4)] == [shard_of(other, k).tolist() for k in range(4)]
    assert shard_of(one, 0).tolist() == shard_of(small.changed({"seed": 7}), 0).tolist()


def test_the_list_shows_every_name_with_its_arguments_and_their_ranges(call: Call) -> None:
    lines = list(listed("compress"))
    assert {line.partition(":")[0] for line in lines if not line.startswith((" ", "or "))} == set(CODECS.names)
    assert "    ratio: a number greater than 0 and at most 1 (default: 0.01)" in lines
    assert call("list", "partition")[1].count("small-shards: true or false (default: false)") == 13
    drift = call("list", "local-rule", f"{OWN}Drift")[1].splitlines()
    assert drift[0] == f"{OWN}Drift: A worker adds a part of its last drift to its gradients."
    assert drift[1:] == ["    strength: a number at least 0 and less than 1 (default: 0.1)"]
    assert call("list", "compress", "topk")[1].count("\n") == 2
    chain = call("list", "compress", "topk:ratio=0.1+int8")[1].splitlines()
    assert chain[1] == "    ratio: a number greater than 0 and at most 1 (default: 0.01): here 0.1"
    assert [line.partition(":")[0] for line in chain] == ["topk", "    ratio", "int8"]
    assert "has no argument rate (did you mean ratio?)" in call("list", "compress", "topk:rate=0.1")[2]
    assert call("list", "compress", "topkk")[2].startswith(
        "error: compress = topkk is unknown: it must be one of none, "
    )
    assert call("list", "lr")[2].startswith("error: lr has no choices: give one of dataset, ")
