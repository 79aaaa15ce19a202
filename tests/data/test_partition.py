"""Uneven partitions: who holds what, and runs on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.config import Config
from fedsim.data import uneven
from fedsim.data.cache import user_cache
from fedsim.data.image_sets import load_images
from fedsim.data.local_folder import write_shards
from fedsim.data.official import coarse_labels
from fedsim.data.pachinko import pachinko
from fedsim.data.partition import check_partition, class_counts, images_held, shard_of
from fedsim.data.uneven import partition_of
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.cost import cost
from fedsim.experiments.execute import execute
from fedsim.federation.strategy import build_strategy
from fedsim.models import initial_model
from fedsim.report.partition import show_partition
from fedsim.rng import generator
from fedsim.training.local_round import RoundStart, check_machine, take_local_round
from fedsim.training.run_plan import run_plan
from tests.conftest import NEEDS_FLWR_DATASETS, Call, Execute, final_model, rows_of
from tests.federation.equal_runs import stopped_and_resumed

DIRICHLET = {"partition": "dirichlet:alpha=0.5"}


def shards(config: Config) -> list[list[int]]:
    return [shard_of(config, worker).tolist() for worker in range(config.clients)]


@pytest.fixture
def small(small: Config) -> Config:
    """With enough images for uneven shards."""
    return small.changed({"dataset.images": 512, "batch-size": 16})


@NEEDS_FLWR_DATASETS
@pytest.mark.parametrize(
    ("partition", "arguments", "sizes"),
    [
        ("dirichlet", "alpha=0.5", None),
        ("dirichlet", "alpha=1/2/3/4, self_balancing=true", None),
        ("inner-dirichlet", "partition_sizes=100/200/100/112, alpha=0.3", [100, 200, 100, 112]),
        ("pathological", "num_classes_per_partition=5", None),
        ("shard", "num_shards_per_partition=2", [128] * 4),
        ("size", "partition_sizes=12/100/200/200", [12, 100, 200, 200]),
        ("linear", "", [51, 102, 153, 206]),
        ("square", "", None),
        ("exponential", "", None),
        ("continuous", "strictness=0.5", [128] * 4),
        ("pathological", "num_classes_per_partition=5, class_assignment_mode=first-deterministic", None),
        ("grouped-natural-id", "group_size=3, partition_by=label", None),
    ],
)
def test_partitions_are_disjoint_and_seeded(
    small: Config, partition: str, arguments: str, sizes: list[int] | None
) -> None:
    config = small.changed({"partition": f"{partition}:{arguments}" if arguments else partition})
    of_clients = shards(config)
    everything = np.concatenate(of_clients)
    assert len(set(everything.tolist())) == len(everything) == images_held(config) > 250
    assert len(everything) == 512 or partition_of(config).held(512, 4) is None
    if sizes:
        assert list(map(len, of_clients)) == sizes
    assert shards(config.changed({"seed": 1})) != of_clients
    uneven.uneven_shards.cache_clear()
    assert shards(config) == of_clients


@NEEDS_FLWR_DATASETS
def test_clients_by_class_and_by_groups_of_classes(small: Config, capsys: pytest.CaptureFixture[str]) -> None:
    counts = class_counts(small.changed({"partition": "natural-id", "clients": 10}))
    assert np.array_equal(counts, np.diag(counts.diagonal()))
    keys = {"partition": "grouped-natural-id:group-size=3,mode=allow-bigger", "clients": 3}
    counts = class_counts(small.changed(keys))
    assert sorted((counts > 0).sum(1)) == [3, 3, 4]
    assert set((counts > 0).sum(0)) == {1}  # a class is with one client
    assert counts.sum() == 512
    assert capsys.readouterr().err == ""  # flwr-datasets' progress bar is not shown


@NEEDS_FLWR_DATASETS
def test_clients_by_superclass_on_the_real_cifar100(real_data: str) -> None:
    keys = {"partition": "natural-id:partition-by=coarse_label", "clients": 20, "device": "cpu"}
    counts = class_counts(Config().changed({**keys, "data-dir": real_data}))
    superclasses = coarse_labels(Path(real_data))
    assert [set(superclasses[row > 0]) for row in counts] == [{number} for number in range(20)]
    assert set(counts.sum(1)) == {2500}


@NEEDS_FLWR_DATASETS
def test_dirichlet_is_the_draw_of_the_papers(small: Config) -> None:
    """Hsu et al. 2019: of each class in turn, a share of every client by one draw."""
    config = small.changed({**DIRICHLET, "partition.alpha": "0.5", "partition.shuffle": "false"})
    labels = load_images(config).train.labels.numpy()
    order = generator(config.seed, 0, 0, "shard").permutation(len(labels))
    rng = np.random.default_rng(config.seed)
    expected: list[list[int]] = [[] for _ in range(4)]
    for number in range(10):
        of_class = order[labels[order] == number]
        ends = (rng.dirichlet([0.5] * 4).cumsum() * len(of_class)).astype(int)[:-1]
        for held, part in zip(expected, np.split(of_class, ends), strict=True):
            held += part.tolist()
    assert shards(config) == expected


def test_pachinko_divides_evenly_and_by_superclass() -> None:
    labels = np.arange(2000) % 100
    superclass = np.arange(100) // 5
    parts = pachinko(labels, superclass, 20, 0.1, 10.0, np.random.default_rng(0))
    assert sorted(np.concatenate(parts).tolist()) == list(range(2000))
    assert {len(part) for part in parts} == {100}
    assert len(pachinko(labels, superclass, 30, 0.1, 10.0, np.random.default_rng(0))[0]) == 2000 // 30
    first = np.bincount(superclass[labels[parts[0]]], minlength=20)
    assert first.max() > 20  # an even share is 5
    even = pachinko(labels, superclass, 20, 1e6, 1e6, np.random.default_rng(0))
    assert np.bincount(superclass[labels[even[0]]], minlength=20).max() < 15


def test_pachinko_on_the_real_cifar100(real_data: str) -> None:
    keys = {"partition": "pachinko", "clients": 100, "batch-size": 20, "device": "cpu", "data-dir": real_data}
    config = Config().changed(keys)
    check_partition(config)
    counts = class_counts(config)
    assert set(counts.sum(1)) == {500}
    assert set(counts.sum(0)) == {500}
    assert images_held(config) == 50_000
    assert images_held(config.changed({"clients": 30})) == 30 * 1666
    of_superclass = np.zeros((100, 20))
    np.add.at(of_superclass.T, coarse_labels(Path(real_data)), counts.T)
    assert np.median(of_superclass.max(1)) > 150  # of a few superclasses each, where an even share is 25


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partition": "iid:alpha=1"}, "iid has no argument alpha: it must be one of seed, small-shards"),
        ({"partition": "pachinko"}, "partition = pachinko needs superclasses, which cifar100 alone has"),
        ({"partition": "pachinko", "clients": 600}, "clients = 600 is more than the 512 training images"),
        ({"partition": "vertical-even"}, "partition = vertical-even is unknown: it must be one of iid, dirichlet"),
        ({"partition": "size:partition-sizes=ab"}, "partition-sizes = ab must be one or several whole numbers"),
        ({"mean": "median:weights=shard-size"}, "median has no argument weights: it takes none"),
    ],
)
def test_a_partition_that_cannot_be_is_told_in_a_line(small: Config, keys: dict[str, Any], message: str) -> None:
    refused(small, keys, message)


@NEEDS_FLWR_DATASETS
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"partition": "dirichlet"},
            "partition = dirichlet needs alpha: give dirichlet:alpha=..., one or",
        ),
        ({"partition": "linear:alpha=1"}, "linear has no argument alpha: it must be one of seed, small-shards"),
        (
            {"partition": "dirichlet:alpha=1,partition-by=image"},
            "dirichlet: partition-by = image must be one of label, coarse_label",
        ),
        (
            {"partition": "natural-id:partition-by=coarse_label"},
            "partition = natural-id:partition-by=coarse_label goes by superclasses, which cifar100 alone has",
        ),
        ({"partition": "natural-id"}, "partition = natural-id makes 10 clients, not 4: make them equal"),
        (
            {"partition": "dirichlet:alpha=-1"},
            "dirichlet: alpha = -1 must be one or several numbers with a / between",
        ),
        (
            {"partition": "size:partition-sizes=512"},
            "partition = size:partition-sizes=512 makes 1 clients, not 4: make them equal",
        ),
        (
            {**DIRICHLET, "partition.alpha": "0.01", "partition.min-partition-size": "0", "seed": 3, "clients": 8},
            "leaves client 1 without images: give it other arguments, another seed or fewer clients",
        ),
        (
            {"partition": "size:partition-sizes=12/100/200/200"},
            "batch-size = 16 is more than the 12 images of client 0: give a smaller batch-size, or the partition",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_told_in_a_line(small: Config, keys: dict[str, Any], message: str) -> None:
    refused(small, keys, message)


def test_arguments_of_pachinko_are_checked_before_the_data_is_read(call: Call) -> None:
    code, _, err = call(*"partition --dataset cifar100 --partition pachinko:gamma=1".split())
    assert code == 2
    assert err.startswith("error: partition = pachinko:gamma=1: pachinko has no argument gamma")


def refused(small: Config, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        execute(small.changed({**keys, "name": "run"}), "localsgd")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(Path(small.results_dir).iterdir())


def test_a_machine_without_flwr_datasets_says_what_to_install(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    config = small.changed({**DIRICHLET, "seed": 4})
    with pytest.raises(UserError, match=r"needs flwr-datasets on this machine .*: pip install flwr-datasets"):
        shard_of(config, 0)


@NEEDS_FLWR_DATASETS
def test_a_partition_is_drawn_once_and_kept(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the processes of a node, one for each message; a damaged one is drawn again."""
    config = small.changed({**DIRICHLET, "seed": 5})
    of_clients = shards(config)
    uneven.uneven_shards.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flwr_datasets", None)
        assert shards(config) == of_clients
    (folder,) = (path for path in cache_folders() if np.array_equal(np.load(path), np.concatenate(of_clients)))
    folder.write_bytes(folder.read_bytes()[:-8] + b"\0" * 8)
    uneven.uneven_shards.cache_clear()
    assert shards(config) == of_clients


def cache_folders() -> list[Path]:
    return list((user_cache() / "arrays").glob("*/*/images.npy"))


@NEEDS_FLWR_DATASETS
def test_an_epoch_counts_the_images_that_clients_hold(
    small: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"partition": "size:partition-sizes=96/96/96/96"}
    config = resolve(small.changed({**keys, "local-steps": 3}), "localsgd")
    run = execute(config, "localsgd")
    line = (
        "partition = size:partition-sizes=96/96/96/96: clients hold 384 of 512 training images; an epoch counts these\n"
    )
    assert capsys.readouterr().out == line
    last = rows_of(run)[-1]
    assert (last["round"], last["epoch"]) == (4, 2.0)  # 2 epochs of 384 images in rounds of 4 * 3 * 16
    assert cost(config, "localsgd").images == 4 * 4 * 3 * 16
    node = config.changed({"data-dir": str(tmp_path / "shards" / "0")})
    write_shards(config, tmp_path / "shards")
    with pytest.raises(
        UserError,
        match="96/96/96/96: on a node with images of its own it is not known how many",
    ):
        check_machine(node)
    check_machine(node.changed({"partition": "iid"}))


@NEEDS_FLWR_DATASETS
def test_clients_draw_batches_from_their_own_shards_and_weigh_by_them(small: Config) -> None:
    """One round by hand: each client's steps, and the mean weighted by the sizes of the shards or equally."""
    keys = {"partition": "size:partition-sizes=12/300/200,small-shards=true", "clients": 3}
    config = resolve(small.changed({**keys, "rounds": 1, "precision": "fp64"}), "localsgd")
    begin = initial_model(config).state_dict()
    ends = [take_local_round(config, RoundStart(worker, 1, begin, {})).weights for worker in range(3)]
    for weights, by in (("shard-size", [12 / 512, 300 / 512, 200 / 512]), ("equal", [1 / 3] * 3)):
        run = execute(config.changed({"mean.weights": weights, "name": weights}), "localsgd")
        for name, value in final_model(run).items():
            expected = sum(share * end[name] for share, end in zip(by, ends, strict=True))
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)


def test_a_client_weighs_the_images_that_the_server_planned(small: Config) -> None:
    for weights, planned in (("equal", 2 * 16), ("shard-size", 128)):
        config = small.changed({"mean.weights": weights})
        strategy = build_strategy(config, run_plan(config), initial_model(config))
        assert strategy.usable.examples(1, 3) == (planned, planned)


@NEEDS_FLWR_DATASETS
def test_an_uneven_run_resumes_and_nodes_with_their_own_folders_hold_the_same(run: Execute, tmp_path: Path) -> None:
    keys = {**DIRICHLET, "mean": "exact:weights=shard-size", "rounds": 4, "batch-size": 8}
    stopped_and_resumed(run, keys)
    synthetic: dict[str, Any] = {"dataset": "synthetic:images=512", "device": "cpu", "batch-size": 8}
    config = Config().changed({**DIRICHLET, **synthetic})
    write_shards(config, tmp_path / "shards")
    sizes = [len(np.load(tmp_path / "shards" / str(worker) / "labels.npy")) for worker in range(4)]
    assert sizes == list(map(len, shards(config)))


@NEEDS_FLWR_DATASETS
def test_the_partition_is_shown_and_drawn(small: Config, tmp_path: Path, call: Call) -> None:
    command = "partition --dataset synthetic:images=512 --partition linear --clients 4 -o partition.svg"
    code, out, err = call(*command.split())
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert [line[1] for line in lines[1:5]] == ["51", "102", "153", "206"]
    assert lines[5] == "linear: 4 clients hold 512 of 512 training images".split()
    assert (tmp_path / "partition.svg").read_text().startswith("<?xml")
    with pytest.raises(UserError, match=r"out = partition\.tiff is not a name of a figure: it must end with one of"):
        show_partition(small, "partition.tiff", None)  # type: ignore[arg-type]
