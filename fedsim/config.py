"""Every configuration key: its name, its default, its range, its meaning.

Command-line flags, Flower's run-config, the presets and a run's ``config.json`` all follow from the fields
of `Config`. A key is written in kebab-case outside Python: the field ``local_steps`` is the flag
``--local-steps`` and the run-config key ``local-steps``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedsim.errors import UserError

Mode = Literal["centralized", "localsgd"]
Value = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """What a key accepts: a test and the words that describe it."""

    accepts: Callable[[Any], bool]
    words: str


def one_of(*names: str) -> Range:
    """One of a few names."""
    return Range(lambda value: value in names, "one of " + ", ".join(names))


POSITIVE = Range(lambda value: value > 0, "a number greater than 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "0 or more")
COUNT = Range(lambda value: value >= 1, "a whole number of at least 1")
FRACTION = Range(lambda value: 0 <= value < 1, "at least 0 and less than 1")
ANY = Range(lambda value: True, "any text")
BOTH: tuple[Mode, ...] = ("centralized", "localsgd")
LOCAL: tuple[Mode, ...] = ("localsgd",)
ALONE: tuple[Mode, ...] = ("centralized",)


def key(default: Value, accepts: Range, help: str, modes: tuple[Mode, ...] = BOTH, shapes_result: bool = True) -> Any:
    """Declare one configuration key.

    Keys that do not shape the result (where the data lies, when to stop for today) are left out of a run's
    identity: changing them does not make it another run.
    """
    metadata = {"accepts": accepts, "help": help, "modes": modes, "shapes_result": shapes_result}
    return field(default=default, metadata=metadata)


def _device(value: str) -> bool:
    kind, _, index = value.partition(":")
    return kind in ("auto", "cpu", "cuda", "mps") and (index == "" or (kind == "cuda" and index.isdigit()))


def _milestones(value: str) -> bool:
    try:
        epochs = [float(part) for part in value.split(",")] if value else []
    except ValueError:
        return False
    return all(0 < epoch < math.inf for epoch in epochs) and epochs == sorted(set(epochs))


@dataclass(frozen=True)
class Config:
    """All keys of a run; see the module's docstring for how each is spelled where."""

    # Data
    dataset: str = key("cifar100", one_of("cifar100", "synthetic"), "the images to learn")
    data_dir: str = key(
        "",
        ANY,
        "folder that holds cifar-100-python/; empty: FEDSIM_DATA, or fedsim in the user's cache folder",
        shapes_result=False,
    )
    normalize: str = key(
        "dataset",
        one_of("dataset", "cifar10"),
        "whose mean and standard deviation normalise the images (the paper's Table 1 used CIFAR-10's)",
    )
    synthetic_classes: int = key(10, Range(lambda v: 2 <= v <= 1000, "from 2 to 1000"), "classes of the synthetic set")
    synthetic_images: int = key(8000, COUNT, "training images of the synthetic set; a quarter as many test it")

    validation: int = key(
        0, NOT_NEGATIVE, "training images held out, drawn by the seed; tests are then on them, not on the test images"
    )

    # Model and optimizer
    model: str = key("lenet-bn", one_of("lenet-bn", "lenet5"), "the network")
    optimizer: str = key("sgdm", one_of("sgdm", "lars", "lamb"), "the optimizer, on each client or of the one machine")
    optimizer_backend: str = key(
        "fedsim", one_of("fedsim", "torch-optimizer"), "whose lars and lamb: fedsim's faster ones, or torch-optimizer's"
    )
    lr: float = key(0.01, POSITIVE, "peak learning rate")
    reference_batch: int = key(
        0, NOT_NEGATIVE, "scale lr by the batch of all clients together / reference-batch; 0: do not scale"
    )
    scaling: str = key(
        "linear",
        one_of("linear", "sqrt"),
        "lr with a reference-batch: by the ratio (Goyal et al. 2017), or by its root (Krizhevsky 2014)",
    )
    momentum: float = key(0.9, FRACTION, "momentum of sgdm and lars")
    nesterov: bool = key(False, ANY, "Nesterov's momentum, for sgdm and lars")
    weight_decay: float = key(4e-4, NOT_NEGATIVE, "L2 penalty (sgdm, lars) or decay (lamb)")
    decay_on: str = key(
        "all", one_of("all", "matrices"), "decay all parameters, or only those of more than one dimension"
    )
    trust_coefficient: float = key(0.001, POSITIVE, "lars: the trust coefficient")
    lars_lr_in_momentum: bool = key(False, ANY, "lars: the rate inside the momentum, as algorithm 1 of its paper")
    lars_adapt_undecayed: bool = key(False, ANY, "lars: a trust ratio for undecayed parameters too")
    beta1: float = key(0.9, FRACTION, "lamb: decay of the mean of gradients")
    beta2: float = key(0.999, FRACTION, "lamb: decay of the mean of squared gradients")
    lamb_bias_correction: str = key(
        "none",
        one_of("none", "step-size", "moments"),
        "lamb: none, of the step size (torch-optimizer's debias), or of the moments (algorithm 2 of its paper)",
    )
    lamb_clamp: float = key(10.0, NOT_NEGATIVE, "lamb: the largest weight norm that the ratio sees; 0: any")
    lamb_adapt_undecayed: bool = key(True, ANY, "lamb: a trust ratio for undecayed parameters too")

    # Schedule and budget
    schedule: str = key("constant", one_of("constant", "cosine", "multistep"), "the rate after the warm-up")
    schedule_unit: str = key("step", one_of("step", "epoch"), "change the rate at every local step or every epoch")
    warmup_epochs: float = key(0.0, NOT_NEGATIVE, "epochs of linear warm-up")
    milestones: str = key("", Range(_milestones, "ascending epochs, for instance 50,60"), "multistep: epochs of decay")
    gamma: float = key(0.1, POSITIVE, "multistep: factor at each milestone")
    epochs: float = key(10.0, POSITIVE, "budget: passes over the training images, of all clients together")
    rounds: int = key(0, NOT_NEGATIVE, "budget in rounds instead; 0: as many as epochs allows", LOCAL)

    # LocalSGD
    clients: int = key(4, COUNT, "K, the clients", LOCAL)
    local_steps: int = key(10, COUNT, "J, the local steps of each client in a round", LOCAL)
    batch_size: int = key(64, COUNT, "images a step, on each client")
    fraction: float = key(
        1.0, Range(lambda v: 0 < v <= 1, "above 0 and at most 1"), "share of the clients that each round samples", LOCAL
    )
    min_clients: int = key(
        0,
        NOT_NEGATIVE,
        "the fewest clients that a run begins with and a round is averaged over; 0: begin with all, average over any",
        LOCAL,
        False,
    )
    round_timeout: float = key(
        0.0,
        NOT_NEGATIVE,
        "seconds after which a round goes on without who has not answered, by Flower's engines; 0: wait for all",
        LOCAL,
        False,
    )
    strategy: str = key("localsgd", one_of("localsgd"), "what the server does with the updates", LOCAL)
    momentum_at_sync: str = key(
        "keep",
        one_of("keep", "reset", "average"),
        "each client's optimizer state at a sync: kept, begun anew, or averaged",
        LOCAL,
    )
    batchnorm_at_sync: str = key(
        "average",
        one_of("average", "worker-0"),
        "BN's running statistics: averaged, or those of worker 0 (the paper's code)",
        LOCAL,
    )
    reshuffle: str = key(
        "epoch",
        one_of("epoch", "round"),
        "shuffle a client's shard anew when it has been passed over, or at every round (the paper's code)",
        LOCAL,
    )

    # The run
    seed: int = key(2025, NOT_NEGATIVE, "seed of shards, initial weights, shuffling, augmentation and dropout")
    device: str = key(
        "auto", Range(_device, "auto, cpu, cuda, cuda:N or mps"), "where to train; auto: cuda if there is one, else cpu"
    )
    precision: str = key(
        "fp32",
        one_of("fp32", "tf32", "bf16", "fp64"),
        "of convolutions and matrix products; all else is in fp32 (fp64: in fp64, for comparisons)",
    )
    threads: int = key(
        0, NOT_NEGATIVE, "CPU threads of one training step; 0: one for a client, every core in centralized mode"
    )
    record_by: str = key(
        "round",
        one_of("round", "epoch"),
        "a row, evaluate-every and checkpoint-every count rounds, or epochs of all clients together",
        LOCAL,
    )
    evaluate_every: int = key(1, COUNT, "rounds or epochs (see record-by; centralized: epochs) between tests")
    checkpoint_every: int = key(
        10, COUNT, "rounds or epochs between checkpoints; the last always has one", shapes_result=False
    )
    stop_after_epochs: float = key(
        0.0, NOT_NEGATIVE, "end early after so many epochs, to be gone on with later; 0: do not", shapes_result=False
    )
    stop_after_rounds: int = key(
        0, NOT_NEGATIVE, "end early after so many rounds, to be gone on with later; 0: do not", LOCAL, False
    )
    results_dir: str = key("results", ANY, "folder of the runs' folders", shapes_result=False)
    resume: str = key(
        "", ANY, "a run in results-dir to go on with; what shapes its result is taken from its folder", LOCAL, False
    )
    name: str = key("", ANY, "the run's folder; empty: made from the configuration", shapes_result=False)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check(item, getattr(self, item.name))
        if self.nesterov and (self.momentum == 0 or self.optimizer == "lamb"):
            raise UserError("nesterov = true needs optimizer sgdm or lars with a momentum above 0")
        if self.optimizer_backend == "torch-optimizer":
            for name in OF_FEDSIM_ALONE:
                if getattr(self, name) != FIELDS[name].default:
                    raise UserError(f"{kebab(name)} is not known to torch-optimizer: give --optimizer-backend fedsim")
        if self.schedule == "multistep" and not self.milestones:
            raise UserError("milestones is empty: schedule = multistep needs them, for instance --milestones 50,60")
        for name in ("name", "resume"):
            value = getattr(self, name)
            if Path(value).name != value or value in (".", ".."):
                raise UserError(f"{name} = {value!r} is no plain folder name: leave out slashes")

    @property
    def clients_per_round(self) -> int:
        """The clients that each round samples: the nearest whole number to fraction * clients, at least one."""
        return max(1, round(self.fraction * self.clients))

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """This configuration with some keys (kebab-case) changed; unknown keys and bad values fail."""
        values: dict[str, Any] = {spelled(name): typed(name, value) for name, value in changes.items()}
        return dataclasses.replace(self, **values)

    def as_keys(self) -> dict[str, Value]:
        """Every key in kebab-case, as Flower's run-config wants them."""
        return {kebab(item.name): getattr(self, item.name) for item in dataclasses.fields(self)}

    def identity(self, mode: Mode) -> dict[str, Value]:
        """The keys that shape the result of a run in `mode`: what its folder's ``config.json`` holds."""
        return {
            kebab(item.name): getattr(self, item.name)
            for item in dataclasses.fields(self)
            if mode in item.metadata["modes"] and item.metadata["shapes_result"]
        }


OF_FEDSIM_ALONE = (
    "lars_lr_in_momentum",
    "lars_adapt_undecayed",
    "lamb_bias_correction",
    "lamb_clamp",
    "lamb_adapt_undecayed",
)
OF_A_NODE = ("data-dir", "device", "threads")
OF_FLOWER = ("partition-id", "num-partitions")
FIELDS = {item.name: item for item in dataclasses.fields(Config)}


def kebab(name: str) -> str:
    """The key of a field's name."""
    return name.replace("_", "-")


def own_keys(node_config: Mapping[str, Value]) -> dict[str, Value]:
    """The keys of a SuperNode's node config that stand over the run's: where its images lie, and its hardware."""
    own = {}
    for name, value in node_config.items():
        if name in OF_A_NODE:
            own[name] = value
        elif name in OF_FLOWER:
            continue
        elif (near := difflib.get_close_matches(name, (*OF_A_NODE, *OF_FLOWER), n=1, cutoff=0.8)) or kebab(name) in map(
            kebab, FIELDS
        ):
            hint = f"did you mean {near[0]}?" if near else f"a node may set {', '.join(OF_A_NODE)}; give it to the run"
            raise UserError(f"{name} cannot stand in the node config: {hint}")
    return own


def spelled(name: str) -> str:
    """The field's name of a key; an unknown key fails, and the nearest one is named."""
    attribute = name.replace("-", "_")
    if attribute not in FIELDS or "_" in name:
        near = difflib.get_close_matches(kebab(name), map(kebab, FIELDS), n=1, cutoff=0.5)
        hint = f": did you mean {near[0]}?" if near else ": see --help for the keys"
        raise UserError(f"unknown key {name}{hint}")
    return attribute


def typed(name: str, value: Any) -> Any:
    """`value` (a string from a flag, or a TOML value) as the type of its key."""
    kind: type[Any] = type(FIELDS[spelled(name)].default)
    if isinstance(value, str) and kind is not str:
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise UserError(f"{name} = {value!r} is not {_KINDS[kind]}") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name} = {value!r} is not {_KINDS[kind]}")
    return value


_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    accepts: Range = item.metadata["accepts"]
    finite = not isinstance(value, float) or math.isfinite(value)
    if not finite or not accepts.accepts(value):
        words = f"{accepts.words}{_near(item, value)}"
        raise UserError(f"{kebab(item.name)} = {value!r} is out of range: it must be {words}")


def _near(item: dataclasses.Field[Any], value: Any) -> str:
    words = item.metadata["accepts"].words
    near = difflib.get_close_matches(str(value), words.removeprefix("one of ").split(", "), n=1)
    return f" (did you mean {near[0]}?)" if near and words.startswith("one of ") else ""


CORES = "FEDSIM_CORES"  # in the environment of a process that has been given a share of its machine


def cpu_count() -> int:
    """The cores that this process may use."""
    if CORES in os.environ:
        return int(os.environ[CORES])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
