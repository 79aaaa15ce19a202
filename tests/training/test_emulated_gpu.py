"""What a GPU adds to training, on an emulated one: captured steps, all workers at once, rounds, their launches.

Every result is compared with the simple steps on the CPU. The second half plants faults, each of which must be caught.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from fedsim.bench.variants import METHODS
from fedsim.config import Config
from fedsim.data.datasets import load_dataset
from fedsim.experiments.execute import execute
from fedsim.models import build_model
from fedsim.models.dropout import Dropout
from fedsim.optim import load_optimizer_state
from fedsim.optim.torch_optimizers import TORCH_OPTIMIZERS, can_be_captured
from fedsim.system.copies import on_host
from fedsim.tasks.classification import Classification
from fedsim.training import cuda_graph, local_round, stacked, step
from fedsim.training.batchnorm import calibration_sample, reestimate
from fedsim.training.cuda_graph import CapturedSteps
from fedsim.training.local_round import RoundEnd, RoundStart
from fedsim.training.stacked import StackedWorkers
from strategies.domain import NOT_NEGATIVE, Domain
from strategies.mean import mean
from strategies.screening import wrong_values
from tests.conftest import SMALL, SMALL_BATCHNORM, assert_same_bits, final_model, rows_of
from tests.emulated_gpu import EmulatedGpu, GpuError, Stream, current
from tests.gpu_counts import method_of, round_counts
from tests.pages import read_page
from tests.training.test_cuda_graph import OPTIMIZERS, assert_close, rounds
from tests.training.test_stacked import NOISE_OF_LAMB, WAYS, begin

MOST_MEMORY = 3 * 2**30  # bytes that these tests may add to the process


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_bounded_memory() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    yield
    torch.set_num_threads(threads)
    assert memory("VmHWM") - before < MOST_MEMORY


@pytest.fixture(autouse=True)
def freed_memory_is_given_back() -> Iterator[None]:
    """fedsim keeps it for its next step (`fedsim.device`)."""
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory(entry: str) -> int:
    """Bytes of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(entry):
                return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def tiny(small: Config) -> Config:
    """A rate that float32 holds exactly: captured steps read theirs as such."""
    return small.changed({"dataset.images": 64, "batch-size": 4, "lr": 2**-6})


def resnet(classes: int) -> ResNet:
    """The first two stages of torchvision's ResNet, in its form for CIFAR."""
    model = ResNet(BasicBlock, [1] * 4, classes)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(128, classes)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def named(config: Config, model: str) -> Config:
    """`config` with a model of the registry, or with `resnet`."""
    return config.changed(
        {"model": f"{__name__}:resnet", "augment.size": 16} if model == "resnet" else {"model": model}
    )


def captured(config: Config) -> dict[str, Tensor]:
    """`rounds` of captured steps on the emulated GPU, which wait for nothing."""
    with EmulatedGpu() as gpu:
        left = rounds(config.changed({"device": "cuda"}), True, True, steps_in=gpu.without_waits)
        assert gpu.counts["replays"] == 5
        return on_host(left)


@pytest.mark.parametrize(
    ("model", "precision", "keys"),
    [
        *(("lenet5", "fp32", keys) for keys in OPTIMIZERS),
        ("lenet5", "bf16", OPTIMIZERS[5]),
        *((SMALL_BATCHNORM, precision, OPTIMIZERS[0]) for precision in ("fp32", "bf16", "fp64")),
        (SMALL_BATCHNORM, "bf16", OPTIMIZERS[4]),
        pytest.param("lenet-bn", "fp32", OPTIMIZERS[0], marks=pytest.mark.slow),
        pytest.param("resnet18", "fp32", OPTIMIZERS[0], marks=pytest.mark.slow),
    ],
)
def test_a_captured_step_is_the_simple_step(tiny: Config, model: str, precision: str, keys: dict[str, Any]) -> None:
    """Bit for bit, but where LARS multiplies by the rate in another order."""
    config = named(tiny, model).changed({"precision": precision, **keys})
    another_order = config.optimizer.startswith("lars") and "lr-in-momentum" not in config.optimizer
    assert_close(captured(config), rounds(config, static=False), 1e-5 if another_order else 0)


@pytest.mark.parametrize("name", [name for name, kind in TORCH_OPTIMIZERS.items() if can_be_captured(kind)])
def test_a_captured_step_of_torchs_optimizers_is_the_simple_step(tiny: Config, name: str) -> None:
    config = tiny.changed({"optimizer": name, "precision": "fp64"})
    with EmulatedGpu():  # where they have the same form
        simple = on_host(rounds(config.changed({"device": "cuda"}), False))
    assert_close(captured(config), simple, 1e-10)


def ends_on(config: Config, take_rounds: Callable[[Config, Sequence[RoundStart]], list[RoundEnd]]) -> list[RoundEnd]:
    """The ends of two rounds of three workers, the second from those of the first."""
    starts, found = [begin(config, worker) for worker in (3, 0, 2)], []
    for round_ in (1, 2):
        ends = take_rounds(config, starts)
        starts = [
            RoundStart(start.worker, round_ + 1, end.weights, end.state)
            for start, end in zip(starts, ends, strict=True)
        ]
        found += ends
    return found


def emulated_ends(config: Config, way: str) -> list[RoundEnd]:
    with EmulatedGpu():
        ends = ends_on(config.changed({"device": "cuda"}), StackedWorkers(WAYS[way]).take_rounds)
        return [replace(end, weights=on_host(end.weights), state=on_host(end.state)) for end in ends]


@functools.cache
def ends_one_by_one(config: Config) -> list[RoundEnd]:
    return ends_on(config, lambda config, starts: [local_round.take_local_round(config, start) for start in starts])


def assert_same_ends(config: Config, way: str, within: float, but: Sequence[str] = ()) -> None:
    """In bf16, whose rounding differs between the ways, with the same way on the CPU, without graphs."""
    bf16 = config.precision == "bf16"
    expected_ends = ends_on(config, StackedWorkers(WAYS[way]).take_rounds) if bf16 else ends_one_by_one(config)
    for one, other in zip(expected_ends, emulated_ends(config, way), strict=True):
        for part in ("weights", "state"):
            expected, found = getattr(one, part), getattr(other, part)
            assert_close(found, expected | {name: found[name] for name in expected.keys() & set(but)}, within)
        assert one.loss == pytest.approx(other.loss, abs=within)
        assert one.samples == other.samples


@pytest.mark.parametrize(
    ("way", "model", "precision", "optimizer"),
    [
        *(("groups", "lenet5", "fp64", optimizer) for optimizer in ("sgdm", "lars", "lamb")),
        ("products", "lenet5", "fp64", "sgdm"),
        ("groups", SMALL_BATCHNORM, "bf16", "sgdm"),
        pytest.param("groups", "lenet-bn", "bf16", "sgdm", marks=pytest.mark.slow),
        *(pytest.param(way, "lenet-bn", "fp64", "sgdm", marks=pytest.mark.slow) for way in WAYS),
        pytest.param("groups", "lenet-bn", "fp32", "sgdm", marks=pytest.mark.slow),
        pytest.param("products", "lenet-bn", "bf16", "sgdm", marks=pytest.mark.slow),
        *(pytest.param(way, "resnet", "fp64", "sgdm", marks=pytest.mark.slow) for way in ("groups", "products")),
        pytest.param("groups", "lenet-bn", "bf16", "lars", marks=pytest.mark.slow),
        pytest.param("groups", "resnet", "bf16", "sgdm", marks=pytest.mark.slow),
    ],
)
def test_all_workers_at_once_are_one_by_one(tiny: Config, way: str, model: str, precision: str, optimizer: str) -> None:
    text = f"{optimizer}:trust=0.05" if optimizer == "lars" else optimizer
    shape = {"precision": precision, "optimizer": text, "batch-size": 2}
    config = named(tiny, model).changed(shape)
    within = {"fp64": 1e-12, "fp32": 1e-4, "bf16": 0}[precision]
    assert_same_ends(config, way, within, NOISE_OF_LAMB if optimizer == "lamb" and model == "lenet-bn" else ())


@pytest.mark.parametrize(
    ("mode", "engine", "keys"),
    [
        ("centralized", "local", {}),
        ("localsgd", "local", {"augment": "tests.own_code:erase"}),
        (
            "localsgd",
            "stacked",
            {"model": "tests.own_code:batchnorm", "augment": "center:size=12+tests.own_code:erase"},
        ),
        ("localsgd", "stacked", {"outer": "fedadam:lr=0.01", "compress": "int8"}),
        ("localsgd", "stacked", {"outer": "slowmo", "momentum-at-sync": "average", "local-rule": "scaffold"}),
    ],
)
def test_a_run_on_the_gpu_is_the_run_on_the_cpu_and_is_resumed_bitwise(
    tiny: Config, mode: Any, engine: Any, keys: dict[str, Any]
) -> None:
    shape = {"precision": "fp64", "dataset.images": 24, "clients": 3, "epochs": 2.0, "evaluate-every": 4}
    config = tiny.changed({**shape, **keys})
    on_cpu = execute(config.changed({"name": "cpu"}), mode)
    with EmulatedGpu():
        on_gpu = config.changed({"device": "cuda"})
        whole = execute(on_gpu.changed({"name": "whole"}), mode, engine)
        execute(on_gpu.changed({"name": "parts", "stop-after-epochs": 1.0}), mode, engine)
        parts = execute(on_gpu.changed({"name": "parts"}), mode, engine)
    assert_close(final_model(whole), final_model(on_cpu), 1e-9)
    assert_same_bits(final_model(parts), final_model(whole))
    assert rows_of(parts) == rows_of(whole)


@pytest.mark.parametrize(
    ("by_products", "model", "captured", "launches"),
    [
        (False, SMALL_BATCHNORM, 90, 170),
        (True, "lenet5", 80, 90),
        pytest.param(False, "lenet-bn", 150, 170, marks=pytest.mark.slow),
    ],
)
def test_a_round_of_twelve_workers_takes_few_launches_and_waits(
    tiny: Config, by_products: bool, model: str, captured: int, launches: int
) -> None:
    counts = round_counts(tiny.changed({"model": model, "batch-size": 1, "clients": 12}), by_products)
    assert counts["replays"] == tiny.local_steps
    assert counts["captured"] < captured  # gradients that are zeroed and added to would be two more of each parameter
    assert counts["launches"] <= launches
    assert counts["waits"] == 3  # for the losses, for the updates' values, for the average's


@pytest.mark.parametrize(
    "keys", [pytest.param(keys, marks=[pytest.mark.slow] * (name != "int8"), id=name) for name, keys in METHODS.items()]
)
def test_a_round_of_each_method_takes_what_is_written(tiny: Config, keys: dict[str, Any]) -> None:
    shape = {"model": "lenet-bn", "batch-size": 1, "local-steps": 1, "clients": 4}
    counts = round_counts(tiny.changed({**shape, **keys}))
    start = f"| 4 | {method_of(keys)} | "
    (row,) = (
        line.strip("| ").split(" | ")[2:] for line in read_page("engine.md").splitlines() if line.startswith(start)
    )
    assert [counts[name] for name in ("captured", "launches", "waits", "copies")] == list(map(int, row))


def draws_and_waits(config: Config, patch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], list[int]]:
    """In three rounds of two workers: which round was drawn after how many waits, and the waits until each end."""
    drawn: list[tuple[int, int]] = []

    def counted(config: Config, start: RoundStart) -> Any:
        drawn.append((start.round, current().counts["waits"]))
        return local_round.round_inputs(config, start)

    patch.setattr(stacked, "round_inputs", counted)
    config = config.changed({"device": "cuda", "clients": 2, "rounds": 3})
    with EmulatedGpu() as gpu:
        workers = StackedWorkers()
        starts, waits = [begin(config, worker) for worker in (0, 1)], []
        for round_ in (1, 2, 3):
            workers.take_rounds(config, [replace(start, round=round_) for start in starts])
            waits.append(gpu.counts["waits"])
    return drawn, waits


def test_the_next_rounds_draws_are_made_before_the_wait(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, waits = draws_and_waits(tiny, monkeypatch)
    assert [round_ for round_, _ in drawn] == [1, 1, 2, 2, 3, 3]
    assert {after for round_, after in drawn if round_ > 1} == {waits[0] - 1, waits[1] - 1}


def test_a_checkpoint_waits_once(tiny: Config) -> None:
    with EmulatedGpu() as gpu:
        content = {"round": 1, "of": {str(i): {"x": torch.ones(2, device="cuda")} for i in range(12)}}
        with gpu.counting() as counts:
            held = on_host(content)
        assert counts["waits"] == 1
        assert [each["x"].tolist() for each in held["of"].values()] == [[1, 1]] * 12


def test_the_mean_on_the_gpu_has_the_bits_of_the_mean_on_the_cpu() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 5), "b": (7,), "c": (), "d": (2, 3, 4, 4)}
    parts = [{name: torch.randn(shape, generator=random) for name, shape in shapes.items()} for _ in range(5)]
    for i, part in enumerate(parts):
        part["d"] = part["d"].to(memory_format=torch.channels_last)
        part["steps"] = torch.tensor(i)
    weights = [0.1, 0.15, 0.2, 0.25, 0.3]
    with EmulatedGpu() as gpu:
        on_gpu = [{name: value.to("cuda") for name, value in part.items()} for part in parts]
        with gpu.counting() as counts:
            averaged = mean(on_gpu, weights)
        assert counts["launches"] == 4 * len(parts) + 2  # those of integers included, whatever the number of tensors
        assert_same_bits(on_host(averaged), mean(parts, weights))


def test_wrong_values_are_found_by_one_wait() -> None:
    fine = {"x": torch.ones(3), "v": torch.zeros(2), "n": torch.tensor(7)}
    cases = {  # value of a tensor -> what is wrong with it
        "": ("x", torch.ones(0)),
        "x is not finite": ("x", torch.tensor([1.0, -math.inf])),
        "v is not finite": ("v", torch.tensor([math.nan, 1.0])),
        "v is negative": ("v", torch.tensor([1.0, -1e-30])),
        "x is above 1e15": ("x", torch.tensor([1.0, -2e15])),
        "n is not between 0 and 7": ("n", torch.tensor(8)),
        "n is above 1e15": ("n", torch.tensor(-(2**63))),
        "m is above 1e15": ("m", torch.tensor(2**63 - 1)),
    }
    parts = [fine, {}, *(fine | {name: value} for name, value in cases.values())]
    reasons = ["", "", *cases]
    domains = {"v": NOT_NEGATIVE, "n": Domain(0, 7)}
    assert wrong_values(parts, domains) == reasons
    with EmulatedGpu() as gpu:
        on_gpu = [{name: value.to("cuda") for name, value in part.items()} for part in parts]
        with gpu.counting() as counts:
            assert wrong_values(on_gpu, domains) == reasons
        assert counts["waits"] == 1


def test_a_model_is_tested_by_one_wait_in_this_thread(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "GPU_TEST_BATCH", 5)
    config = tiny.changed({"precision": "fp64"})
    images = load_dataset(config).test
    expected = step.evaluate(Classification(), build_model("lenet5", 10, 0, precision="fp64"), images)
    with EmulatedGpu() as gpu:
        config = config.changed({"device": "cuda"})
        model, images = build_model("lenet5", 10, 0, "cuda", "fp64"), load_dataset(config).test
        with gpu.counting() as counts:
            assert step.evaluate(Classification(), model, images) == pytest.approx(expected, rel=1e-12)
        assert counts["waits"] == 1
        assert counts["launches"] > len(images) / 5 * 10  # of other threads none would be counted


def test_statistics_are_reestimated_in_this_thread(tiny: Config) -> None:
    with EmulatedGpu() as gpu:
        config = tiny.changed({"precision": "fp64", "device": "cuda", "model": "lenet-bn"})
        model, images = build_model("lenet-bn", 10, 0, "cuda", "fp64"), load_dataset(config).train
        with gpu.counting() as counts:
            reestimate(Classification(), model, images, calibration_sample(config, images, 12_800), "fp64")
        assert counts["launches"] > 50  # of other threads none would be counted


# Faults, planted one at a time


def constant_rate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda_graph, "set_lr", lambda optimizer, lr: None)  # the rate that the optimizer was built with


def warm_up_trains(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)


def warm_up_leaves_momentum(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cuda_graph, "load_optimizer_state", lambda *arguments: None)


def no_warm_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CapturedSteps, "warm_up", lambda self: None)


def before_take(patch: pytest.MonkeyPatch, change: Callable[[CapturedSteps], object]) -> None:
    take = CapturedSteps._take

    def changed(self: CapturedSteps, *step: Any) -> None:
        change(self)
        take(self, *step)

    patch.setattr(CapturedSteps, "_take", changed)


def value_read_in_the_step(patch: pytest.MonkeyPatch) -> None:
    before_take(patch, lambda self: print(self._lr.item()))


def operand_on_the_host(patch: pytest.MonkeyPatch) -> None:
    before_take(patch, lambda self: vars(self).update(_within=torch.arange(self._batch_size)))


def stale_batch(patch: pytest.MonkeyPatch) -> None:
    before_take(patch, lambda self: vars(self)["_step"].zero_())


def pageable_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CapturedSteps, "_fill", lambda self, buffer, values: buffer.copy_(values, non_blocking=True))


def before_run(patch: pytest.MonkeyPatch, change: Callable[[CapturedSteps], None]) -> None:
    run = CapturedSteps.run

    def changed(self: CapturedSteps, inputs: Any) -> Tensor:
        change(self)
        return run(self, inputs)

    patch.setattr(CapturedSteps, "run", changed)


def stale_draws(patch: pytest.MonkeyPatch) -> None:
    kept = []

    def change(self: CapturedSteps) -> None:
        kept.append(self._drawn)
        self._drawn = self._drawn.clone()

    before_run(patch, change)


def freed_draws(patch: pytest.MonkeyPatch) -> None:
    before_run(patch, lambda self: vars(self).update(_drawn=self._drawn.clone()))


def gradient_outside_the_graph(patch: pytest.MonkeyPatch) -> None:
    """Kept from the warm-up by the capture, and replaced by the next step outside it."""
    zero_grad = nn.Module.zero_grad
    patch.setattr(nn.Module, "zero_grad", lambda self: zero_grad(self, set_to_none=not current().capturing))


def dropout_from_a_generator(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Dropout, "forward", lambda self, x: F.dropout(x, self.p))


def statistics_of_batchnorm_dropped(patch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        copies = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, *copies, self.weight, self.bias, True, self.momentum or 0.0, self.eps)

    patch.setattr(nn.BatchNorm2d, "forward", forward)


def optimizer_state_replaced(patch: pytest.MonkeyPatch) -> None:
    """Loaded as new tensors instead of in place, so that the graph steps on the old ones."""
    load = load_optimizer_state

    def replaced(parameters: Any, optimizer: Any, state: Any) -> None:
        for entries in optimizer.state.values():
            entries.update({name: torch.zeros_like(value) for name, value in entries.items()})
        load(parameters, optimizer, state)

    patch.setattr("tests.training.test_cuda_graph.load_optimizer_state", replaced)


def warm_up_before_the_weights_are_there(patch: pytest.MonkeyPatch) -> None:
    wait = Stream.wait_stream
    patch.setattr(Stream, "wait_stream", lambda self, other: None if other is current().default else wait(self, other))


def replay_before_the_warm_up_ends(patch: pytest.MonkeyPatch) -> None:
    wait = Stream.wait_stream
    patch.setattr(Stream, "wait_stream", lambda self, other: None if self is current().default else wait(self, other))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (constant_rate, "losses"),
        (warm_up_trains, "running_mean"),
        (warm_up_leaves_momentum, "losses"),
        (no_warm_up, "losses"),
        (value_read_in_the_step, "the host waits for the device"),
        (operand_on_the_host, "operands on the host and on the device"),
        (stale_batch, "losses"),
        (pageable_copy, "a copy of memory that is not pinned"),
        (stale_draws, "losses"),
        (freed_draws, "memory that was freed after the capture"),
        (gradient_outside_the_graph, "memory that was freed after the capture"),
        (dropout_from_a_generator, "draws from a generator"),
        (statistics_of_batchnorm_dropped, "running_mean"),
        (optimizer_state_replaced, "memory that was freed after the capture"),
        (warm_up_before_the_weights_are_there, "a race"),
        (replay_before_the_warm_up_ends, "a race"),
    ],
)
def test_a_fault_in_captured_steps_is_caught(
    tiny: Config, fault: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.changed({"model": SMALL_BATCHNORM})
    simple = simple_rounds(config.precision)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        assert_close(captured(config), simple, 1e-6)


@functools.cache
def simple_rounds(precision: str) -> dict[str, Tensor]:
    shape = {"model": SMALL_BATCHNORM, "dataset.images": 64, "precision": precision}
    return rounds(Config().changed({**SMALL, **shape}), static=False)


def test_a_copy_read_before_its_end_is_caught() -> None:
    with EmulatedGpu():
        early = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
        with pytest.raises(GpuError, match="the host uses a copy that may not have ended"):
            early.tolist()
        torch.cuda.synchronize()
        assert early.tolist() == [1, 1]


def test_a_draw_too_late_would_be_noticed(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked.StackedReplicas, "_draw_ahead", lambda self, starts: None)
    drawn, waits = draws_and_waits(tiny, monkeypatch)
    assert all(after >= waits[round_ - 2] for round_, after in drawn if round_ > 1)


def test_a_wait_a_worker_would_be_counted(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of each worker looked at by themselves, as before they were gathered."""
    from strategies import screening

    together = screening.wrong_values
    one_by_one = lambda parts, domains={}: [together([part], domains)[0] for part in parts]  # noqa: E731
    monkeypatch.setattr(screening, "wrong_values", one_by_one)
    assert round_counts(tiny.changed({"clients": 3, "batch-size": 1}))["waits"] == 5
