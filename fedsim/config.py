"""Every configuration key: its name, its default, what it accepts, and what it means.

Command-line flags, Flower's run-config, the presets and a run's ``config.json`` all follow from the fields of
`Config`. Outside Python a key is written in kebab-case: the field ``local_steps`` is the flag ``--local-steps`` and
the run-config key ``local-steps``.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import sys
import unicodedata
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

import annotated_types
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from fedsim.errors import UserError
from fedsim.registry import CODECS, DATASETS, LOCAL_RULES, MEANS, MODELS, OUTER_STEPS, TEST_MODELS, is_function

Mode = Literal["centralized", "localsgd"]
Engine = Literal["local", "stacked", "flower"]  # how the clients of a run are trained
Value = bool | int | float | str
Optimizer = Literal[
    "sgdm", "lars", "lamb", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop",
    "sgd",
]  # fmt: skip
OUTER = (
    "fedavgm", "slowmo", "diloco", "fedadam", "fedyogi", "fedadagrad",  # named methods
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd",
    "yogi",
)  # fmt: skip

MAX_LOCAL_STEPS = 10**6
CHAIN = r"\+(?=[a-z])"  # between the parts of a chain; not in 1e+3
MAX_THREADS = 1024  # of one training step; more than a process can start crash it
MAX_NAME_BYTES = 255  # of a file system
SHOWN = 60  # characters of a refused value


def _number_or_bool(value: Any) -> Any:
    """A flag's text as a number or a truth value; everything else unchanged, for pydantic to judge."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"[+-]?[0-9]{1,4000}", value):
        return int(value)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", value, re.IGNORECASE):
        return float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def _number(value: Any) -> Any:
    """The same, with integers that no float can hold as infinity."""
    value = _number_or_bool(value)
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _printable(value: str) -> str:
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        raise ValueError("holds a control character, a line break or a byte that is not UTF-8: leave it out")
    return value


def _path(value: str) -> str:
    if value.startswith("~") and value[1:2] not in ("", "/"):
        raise ValueError("begins with another user's home folder: give the whole path")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in value.split("/")):
        raise ValueError(f"has a name of more than {MAX_NAME_BYTES} bytes: give shorter ones")
    return value


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError("is empty: give a folder")
    return value


def _folder_name(value: str) -> str:
    if "/" in value or value in (".", ".."):
        raise ValueError("is not a plain folder name: leave out slashes")
    return value


def _device(value: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]{1,3})?", value):
        raise ValueError("is out of range: it must be auto, cpu, cuda or cuda:N")
    return value


def _milestones(value: str) -> str:
    try:
        epochs = [float(part) for part in value.split(",")] if value else []
    except ValueError:
        epochs = [math.nan]
    if not all(0 < epoch < math.inf for epoch in epochs) or epochs != sorted(set(epochs)):
        raise ValueError("is out of range: it must be ascending epochs, for instance 50,60")
    return value


Argument = bool | float | str | tuple[float, ...]


def arguments_of(text: str, words: bool = False) -> dict[str, Argument]:
    """The arguments in a text such as ``lr=0.7, nesterov=true, betas=0.9:0.99``, where colons part a tuple's numbers.

    With `words`, a value may be a word too. Raises ValueError where the text is not of this form.
    """
    arguments: dict[str, Argument] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        values = [_number_or_bool(number) for number in value.split(":")]
        tuple_of_bools = len(values) > 1 and any(isinstance(each, bool) for each in values)
        valid = all(map(_is_argument, values)) or (words and re.fullmatch("[a-z]+([-_][a-z]+)*", value))
        if not name.isidentifier() or name in arguments or tuple_of_bools or not valid:
            kinds = "numbers, words, true or false" if words else "numbers, true or false"
            example = "alpha=0.3" if words else "lr=0.7, momentum=0.9"
            raise ValueError(f"must be names with {kinds}, for instance {example}")
        arguments[name] = values[0] if len(values) == 1 else tuple(values)
    return arguments


def _is_argument(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _arguments(value: str) -> str:
    arguments_of(value)
    return value


def _partition_arguments(value: str) -> str:
    arguments_of(value, words=True)
    return value


NOT_FOR_IMAGES = {  # partitioners of flwr-datasets that no key or no image data set can serve -> why, and the remedy
    "distribution": "takes a matrix of shares, which partition-args cannot hold: give dirichlet",
    "id-to-size-fnc": "takes a function: give linear, square, exponential, or size with partition_sizes",
    "vertical-even": "divides the columns of a table, not images: give another",
    "vertical-size": "divides the columns of a table, not images: give another",
}


def _partition(value: Any) -> Any:
    if isinstance(value, str) and value in NOT_FOR_IMAGES:
        raise ValueError(NOT_FOR_IMAGES[value])
    return value


def _strategy(value: str) -> str:
    if value != "localsgd" and not is_function(value):
        hint = " (did you mean localsgd?)" if difflib.get_close_matches(value, ["localsgd"]) else ""
        raise ValueError(f"is neither localsgd nor module:Class, e.g. flwr.serverapp.strategy:FedAdam{hint}")
    return value


def table_of(text: str) -> list[tuple[float, int]]:
    """The epochs and local steps in a text such as ``10:1,50:16``; a ValueError where it is not of this form."""
    table: list[tuple[float, int]] = []
    for part in text.split(",") if text else []:
        of_epoch, of_steps = part.split(":")
        epoch, steps = _number(of_epoch.strip()), _number_or_bool(of_steps.strip())
        ascending = type(epoch) is float and (table[-1][0] if table else 0) < epoch < math.inf
        if not ascending or type(steps) is not int or not 1 <= steps <= MAX_LOCAL_STEPS:
            raise ValueError
        table.append((epoch, steps))
    return table


def _local_steps_table(value: str) -> str:
    try:
        table_of(value)
    except (ValueError, TypeError):  # text in place of a number
        raise ValueError("is out of range: it must be ascending epochs with their J, for instance 10:1,50:16") from None
    return value


class Named(NamedTuple):
    """In the metadata of a key: the names that it accepts, and what else."""

    names: tuple[str, ...]
    other: str


ANY_MODEL = Named(tuple(MODELS), "package.module:function")
ANY_AUGMENT = Named(("crop+mirror", "crop", "none"), "package.module:function")
ANY_DATASET = Named(DATASETS, "a file NAME.npz or package.module:function")


ANY_RULE = Named(("none", *LOCAL_RULES), "NAME:ARGUMENT=VALUE")
ANY_CODEC = Named(("none", *CODECS), "NAME:ARGUMENT=VALUE, or two of them with a + between")
ANY_OUTER = Named(("none", *OUTER, *OUTER_STEPS), "NAME:ARGUMENT=VALUE")
ANY_MEAN = Named(tuple(MEANS), "NAME:ARGUMENT=VALUE")
ANY_TEST_MODEL = Named(("none", *TEST_MODELS), "NAME:ARGUMENT=VALUE")


def _method(known: Named) -> AfterValidator:
    """That a text names one of `known` or, of codecs, a chain; their arguments are read where they are made."""

    def check(value: str) -> str:
        for part in re.split(CHAIN, value) if known is ANY_CODEC else [value]:
            name = part.partition(":")[0]
            _named(name, known, False)
            if name == "none" != value:
                raise ValueError("must be a method with arguments, or none")
        return value

    return AfterValidator(check)


def _model(value: str) -> str:
    return _named(value, ANY_MODEL, is_function(value))


def _augment(value: str) -> str:
    return _named(value, ANY_AUGMENT, is_function(value))


def _dataset(value: str) -> str:
    return _named(value, ANY_DATASET, is_function(value) or value.endswith(".npz"))


def _named(value: str, known: Named, own: bool) -> str:
    if value not in known.names and not own:
        near = difflib.get_close_matches(value, known.names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"is unknown: it must be one of {', '.join(known.names)}, or {known.other}{hint}")
    return value


Bool = Annotated[bool, BeforeValidator(_number_or_bool)]
Integer = Annotated[int, BeforeValidator(_number_or_bool)]
Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[Integer, Field(ge=1, le=10**9)]
CountOrZero = Annotated[Integer, Field(ge=0, le=10**9)]
Steps = Annotated[Integer, Field(ge=1, le=MAX_LOCAL_STEPS)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
Epochs = Annotated[Number, Field(gt=0, le=10**6)]
EpochsOrZero = Annotated[Number, Field(ge=0, le=10**6)]
Seconds = Annotated[Number, Field(ge=0, le=10**9)]
Text = Annotated[str, AfterValidator(_printable)]
Folder = Annotated[Text, AfterValidator(_path)]
Name = Annotated[Folder, AfterValidator(_folder_name)]
# Marks in the metadata of a key
LOCALSGD, OPERATIONAL = "only runs of LocalSGD have it", "it is not part of a run's identity"


def kebab(name: str) -> str:
    """The key of a field's name."""
    return name.replace("_", "-")


class Config(BaseModel, frozen=True):
    """All keys of a run; see the module's docstring for their spelling."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=kebab,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )

    # Data
    dataset: Annotated[Folder, ANY_DATASET, AfterValidator(_dataset)] = "cifar100"
    """The data set."""
    data_dir: Annotated[Folder, OPERATIONAL] = ""
    """Folder of the data set's files; empty: FEDSIM_DATA, or fedsim in the user's cache folder."""
    crop_size: CountOrZero = 0
    """Side of the square that a model is given of each image, cut at random in training; 0: the whole image's size."""
    crop_padding: Annotated[Integer, Field(ge=0, le=1000)] = 4
    """Pixels around an image that a random crop may reach into."""
    crop_padding_mode: Literal["constant", "reflect"] = "constant"
    """These pixels: black, or the image reflected."""
    augment: Annotated[Text, ANY_AUGMENT, AfterValidator(_augment)] = "crop+mirror"
    """What is done to images in training: cut at random and mirrored half of the time, cut, or nothing."""
    normalize: Literal["dataset", "cifar10", "none"] = "dataset"
    """Mean and standard deviation to normalize by, the paper's Table 1 used CIFAR-10's; none: pixels from 0 to 1."""
    synthetic_classes: Annotated[Integer, Field(ge=2, le=1000)] = 10
    """Number of classes of the synthetic set."""
    synthetic_images: Annotated[Integer, Field(ge=1, le=10**8)] = 8000
    """Training images of the synthetic set; its test set has a quarter as many."""
    partition: Annotated[
        Literal[
            "iid",
            "dirichlet",
            "inner-dirichlet",
            "pathological",
            "shard",
            "size",
            "linear",
            "square",
            "exponential",
            "continuous",
            "natural-id",
            "grouped-natural-id",
            "pachinko",
        ],
        BeforeValidator(_partition),
        LOCALSGD,
    ] = "iid"
    """Who holds which training images; all but iid and pachinko are partitioners of flwr-datasets."""
    partition_args: Annotated[Text, AfterValidator(_partition_arguments), LOCALSGD] = ""
    """Arguments of partition, for instance alpha=0.3 or num_classes_per_partition=2."""
    small_shards: Annotated[Bool, LOCALSGD] = False
    """Allow clients with fewer images than batch-size; a batch then holds some of them more than once."""
    client_weights: Annotated[Literal["equal", "shard-size"], LOCALSGD] = "equal"
    """How much a client's update counts in the mean: as any other's (with local-epochs, by the images that it trained
    on), or in proportion to its number of images."""
    validation: CountOrZero = 0
    """Training images to hold out, drawn by the seed; evaluate on them instead of the test set."""

    # Model and optimizer
    model: Annotated[Text, ANY_MODEL, AfterValidator(_model)] = "lenet-bn"
    """The model."""
    norm: Literal["bn", "gn"] = "bn"
    """Normalization in the ResNets: BatchNorm or GroupNorm."""
    optimizer: Optimizer = "sgdm"
    """The optimizer: one of fedsim's three, or one of PyTorch's with optimizer-args."""
    optimizer_backend: Literal["fedsim", "torch-optimizer"] = "fedsim"
    """Implementation of lars and lamb: fedsim's faster one, or torch-optimizer's."""
    lr: Positive = 0.01
    """Peak learning rate."""
    lr_scaling_batch: CountOrZero = 0
    """Scale lr by (total batch of all clients / lr-scaling-batch); 0: do not scale."""
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    """With lr-scaling-batch: scale lr by the ratio (Goyal et al. 2017) or its root (Krizhevsky 2014)."""
    momentum: Decay = 0.9
    """Momentum of sgdm and lars."""
    nesterov: Bool = False
    """Nesterov momentum, for sgdm and lars."""
    weight_decay: NotNegative = 4e-4
    """L2 penalty (sgdm, lars) or weight decay (lamb, adamw); else as PyTorch's optimizer uses it."""
    decay_biases_and_norms: Bool = True
    """Decay all parameters, or only those of more than one dimension: weights, not biases and norms."""
    trust_coefficient: Positive = 0.001
    """LARS: the trust coefficient."""
    lars_lr_in_momentum: Bool = False
    """LARS: multiply by the rate inside the momentum, as algorithm 1 of its paper."""
    lars_adapt_undecayed: Bool = False
    """LARS: use a trust ratio for undecayed parameters too."""
    beta1: Decay = 0.9
    """LAMB: decay of the mean of gradients."""
    beta2: Decay = 0.999
    """LAMB: decay of the mean of squared gradients."""
    lamb_bias_correction: Literal["none", "step-size", "moments"] = "none"
    """LAMB: correct nothing, the step size (torch-optimizer's debias), or the moments (algorithm 2 of its paper)."""
    lamb_clamp: NotNegative = 10.0
    """LAMB: upper bound of the weight norm in the ratio; 0: none."""
    lamb_adapt_undecayed: Bool = True
    """LAMB: use a trust ratio for undecayed parameters too."""
    optimizer_args: Annotated[Text, AfterValidator(_arguments)] = ""
    """Arguments of an optimizer of PyTorch's over its defaults, for instance betas=0.9:0.95, eps=1e-6."""

    # Schedule and budget
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """Learning rate after the warm-up."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """Change the rate at every local step or every epoch."""
    warmup_epochs: EpochsOrZero = 0.0
    """Epochs of linear warm-up."""
    milestones: Annotated[Text, AfterValidator(_milestones)] = ""
    """Multistep: epochs at which the rate decays, ascending, for instance 50,60."""
    gamma: Positive = 0.1
    """Multistep: factor at each milestone."""
    epochs: Epochs = 10.0
    """Budget: passes over the training images, by all clients together."""
    rounds: Annotated[Integer, LOCALSGD, Field(ge=0, le=10**7)] = 0
    """Budget in rounds instead; 0: as many as epochs gives."""

    # LocalSGD
    clients: Annotated[Count, LOCALSGD] = 4
    """K, the number of clients."""
    local_steps: Annotated[Steps, LOCALSGD] = 10
    """J, the local steps of each client in a round."""
    local_epochs: Annotated[CountOrZero, LOCALSGD] = 0
    """Passes of each client over its own images in a round, in place of local-steps; 0: local-steps."""
    local_steps_schedule: Annotated[
        Literal["constant", "post-local", "qsr", "linear", "doubling", "table"], LOCALSGD
    ] = "constant"
    """How J changes during the run, from local-steps on; all but constant need record-by epoch."""
    local_steps_max: Annotated[CountOrZero, LOCALSGD] = 0
    """Linear, doubling: the largest J."""
    qsr_alpha: Annotated[NotNegative, LOCALSGD] = 0.0
    """Qsr: J is at least (qsr-alpha / rate) squared."""
    switch_epoch: Annotated[EpochsOrZero, LOCALSGD] = 0.0
    """Post-local: the epoch from which on J is local-steps; 0: the first of milestones."""
    local_steps_table: Annotated[Text, AfterValidator(_local_steps_table), LOCALSGD] = ""
    """Table: from which epochs on which J, for instance 10:1,50:16."""
    batch_size: Count = 64
    """Images in a step of each client."""
    fraction: Annotated[Number, LOCALSGD, Field(gt=0, le=1)] = 1.0
    """Fraction of the clients sampled in each round."""
    min_clients: Annotated[CountOrZero, LOCALSGD, OPERATIONAL] = 0
    """Fewest clients to start with and to aggregate; 0: start with all, aggregate any number."""
    max_failures: Annotated[CountOrZero, LOCALSGD, OPERATIONAL] = 0
    """Failures of one client in a row that end a run; 0: 3, or no limit where min-clients is given."""
    round_timeout: Annotated[Seconds, LOCALSGD, OPERATIONAL] = 0.0
    """Seconds to wait for the replies of a round, with Flower's engines; 0: no timeout."""
    strategy: Annotated[Text, AfterValidator(_strategy), LOCALSGD] = "localsgd"
    """How the server aggregates: localsgd, or module:Class of Flower's, e.g. flwr.serverapp.strategy:FedAdam."""
    strategy_args: Annotated[Text, AfterValidator(_arguments), LOCALSGD] = ""
    """Arguments of the strategy's class, for instance eta=0.1, beta_1=0.9."""
    mean: Annotated[Text, _method(ANY_MEAN), ANY_MEAN, LOCALSGD] = "exact"
    """The mean of the clients' updates; all but exact withstand a few absurd ones."""
    trim: Annotated[Number, LOCALSGD, Field(ge=0, lt=0.5)] = 0.25
    """Trimmed: the fraction of the clients whose largest and smallest values are left out, each value by itself."""
    outer: Annotated[Text, _method(ANY_OUTER), ANY_OUTER, LOCALSGD] = "none"
    """The server's optimizer on the mean of the clients' models; none: the mean itself."""
    outer_args: Annotated[Text, AfterValidator(_arguments), LOCALSGD] = ""
    """Arguments of outer over its defaults, for instance lr=0.7, momentum=0.9, nesterov=true."""
    local_rule: Annotated[Text, _method(ANY_RULE), ANY_RULE, LOCALSGD] = "none"
    """What corrects local steps: a pull to the model of the round, control variates (sent or, with plain SGD, inferred
    by the clients), a changed loss, or updates divided by the number of steps."""
    prox_mu: Annotated[NotNegative, LOCALSGD] = 0.01
    """Fedprox: the factor of the distance that is added to the gradient."""
    momentum_at_sync: Annotated[Literal["keep", "reset", "average"], LOCALSGD] = "keep"
    """Keep, reset or average the clients' optimizer states at each sync."""
    delay: Annotated[Integer, LOCALSGD, Field(ge=0, le=1)] = 0
    """Rounds by which the mean reaches the clients late: with 1 they send and receive while they compute."""
    batchnorm_at_sync: Annotated[Literal["average", "first-worker", "pooled", "local", "re-estimated"], LOCALSGD] = (
        "average"
    )
    """Running statistics of BN: averaged, those of the first worker averaged (the paper's code), pooled with the
    variance of the means, local to each client (tested with the first worker's), or re-estimated before each test."""
    batchnorm_images: Annotated[Integer, LOCALSGD, Field(ge=2, le=10**9)] = 12_800
    """Re-estimated: training images, drawn by the seed, that statistics are estimated on; all, if there are fewer."""
    compress: Annotated[Text, _method(ANY_CODEC), ANY_CODEC, LOCALSGD] = "none"
    """How clients compress the updates of parameters that they send."""
    compress_down: Annotated[Text, _method(ANY_CODEC), ANY_CODEC, LOCALSGD] = "none"
    """How the server compresses the change of the parameters for clients that took part in the last round."""
    compress_ratio: Annotated[Number, LOCALSGD, Field(gt=0, le=1)] = 0.01
    """Topk, randomk: the fraction of each parameter's values to send, either way."""
    compress_levels: Annotated[Integer, LOCALSGD, Field(ge=1, le=127)] = 7
    """Qsgd: levels between zero and the norm."""
    compress_rank: Annotated[Integer, LOCALSGD, Field(ge=1, le=10**4)] = 4
    """Powersgd: rank of the factors of each matrix."""
    error_feedback: Annotated[Bool, LOCALSGD] = True
    """With compress: add what a message left out to the client's next update."""
    test_model: Annotated[Text, _method(ANY_TEST_MODEL), ANY_TEST_MODEL, LOCALSGD] = "none"
    """What is tested in place of the model of the run, and saved beside it: a moving average of the models."""
    shuffle_every: Annotated[Literal["epoch", "round"], LOCALSGD] = "epoch"
    """Shuffle a client's shard after each pass over it, or every round (the paper's code)."""

    # The run
    seed: Annotated[Integer, Field(ge=0, le=10**18)] = 2025
    """Seed of shards, initial weights, shuffling, augmentation and dropout."""
    device: Annotated[Text, AfterValidator(_device)] = "auto"
    """Where to train: auto, cpu, cuda or cuda:N; auto: cuda if there is one, else cpu."""
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"
    """Precision of convolutions and matrix products; everything else is fp32 (with fp64: fp64)."""
    threads: Annotated[Integer, Field(ge=0, le=MAX_THREADS)] = 0
    """CPU threads of a training step; 0: one for each client; every core for one client and in centralized mode."""
    record_by: Annotated[Literal["round", "epoch"], LOCALSGD] = "round"
    """Unit of rows, evaluate-every and checkpoint-every: a round, or an epoch of all clients."""
    evaluate_every: Count = 1
    """Rounds or epochs between evaluations (see record-by)."""
    checkpoint_every: Annotated[Count, OPERATIONAL] = 10
    """Rounds or epochs between checkpoints; the last one always has one."""
    stop_after_epochs: Annotated[EpochsOrZero, OPERATIONAL] = 0.0
    """Stop after this many epochs; run the same command without it to resume; 0: off."""
    stop_after_rounds: Annotated[CountOrZero, LOCALSGD, OPERATIONAL] = 0
    """Stop after this many rounds; run the same command without it to resume; 0: off."""
    results_dir: Annotated[Folder, AfterValidator(_not_empty), OPERATIONAL] = "results"
    """Folder of the runs' folders."""
    resume: Annotated[Name, LOCALSGD, OPERATIONAL] = ""
    """Name of a run in results-dir to resume; its configuration is read from its folder."""
    accept_changed_code: Annotated[Bool, OPERATIONAL] = False
    """Resume a run although the code of its own model, data set or strategy has changed since."""
    name: Annotated[Name, OPERATIONAL] = ""
    """Name of the run's folder; empty: made from the configuration."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        if self.nesterov and (self.momentum == 0 or self.optimizer not in ("sgdm", "lars")):
            raise ValueError("nesterov = true needs optimizer sgdm or lars with a momentum above 0")
        if self.optimizer_backend == "torch-optimizer":
            for name in OF_FEDSIM_ALONE:
                if getattr(self, name) != FIELDS[name].default:
                    raise ValueError(f"{kebab(name)} is not known to torch-optimizer: give --optimizer-backend fedsim")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("milestones is empty: schedule = multistep needs them, for instance --milestones 50,60")
        return self

    @property
    def clients_per_round(self) -> int:
        """The clients sampled in each round: the nearest whole number to fraction * clients, at least one."""
        return max(1, round(self.fraction * self.clients))

    @property
    def failures_to_end(self) -> float:
        """How many failures of one client in a row end a run (see max-failures)."""
        return self.max_failures or (math.inf if self.min_clients else 3)

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """This configuration with some keys (kebab-case) changed; unknown keys and bad values are a UserError."""
        try:
            return Config.model_validate({**self.as_keys(), **changes}, by_alias=True, by_name=False)
        except ValidationError as failure:
            raise _user_error(failure) from None

    def as_keys(self) -> dict[str, Value]:
        """Every key in kebab-case, as in Flower's run-config."""
        return {kebab(name): value for name, value in self}

    def identity(self, mode: Mode) -> dict[str, Value]:
        """The keys that shape the result of a run in `mode`."""
        return {
            kebab(name): value
            for name, value in self
            if has_key(mode, name) and OPERATIONAL not in FIELDS[name].metadata
        }

    def record(self, mode: Mode) -> dict[str, Value]:
        """The contents of ``config.json``: the mode, `identity` and, with a constant J > 1, how `epochs` are met."""
        keys = {"mode": mode, **self.identity(mode)}
        return {**keys, BUDGET: "to a step"} if _has_budget(keys) else keys


BUDGET = "budget"  # in a record: `epochs` are met to a step, or, in runs of earlier versions, to a round
OF_FEDSIM_ALONE = (
    "lars_lr_in_momentum",
    "lars_adapt_undecayed",
    "lamb_bias_correction",
    "lamb_clamp",
    "lamb_adapt_undecayed",
)
OF_A_NODE = ("data-dir", "device", "threads")
OF_FLOWER = ("partition-id", "num-partitions")
FIELDS: Mapping[str, FieldInfo] = Config.model_fields
RENAMED = {  # former name of a key -> its present one
    "reference-batch": "lr-scaling-batch",
    "scaling": "lr-scaling",
    "decay-on": "decay-biases-and-norms",
    "reshuffle": "shuffle-every",
}
RENAMED_VALUES: dict[tuple[str, Any], Value] = {  # former name of a key and a former value -> its present value
    ("decay-on", "all"): True,
    ("decay-on", "matrices"): False,
    ("batchnorm-at-sync", "worker-0"): "first-worker",
}


def check_used(config: Config, choice: str, used_by: Mapping[str, Sequence[str]]) -> None:
    """Raise UserError where a key has a value that nothing uses.

    `used_by` names for fields the values of the field `choice` with which they are used.
    """
    chosen = getattr(config, choice)
    for name, values in used_by.items():
        if chosen not in values and getattr(config, name) != FIELDS[name].default:
            use = " or ".join(values)
            raise UserError(f"{kebab(name)} is not used by {kebab(choice)} = {chosen}: leave it out, or give {use}")


def engine_named(name: str) -> Engine:
    """`name` if it is an engine's; raises UserError."""
    if name in get_args(Engine):
        return cast(Engine, name)
    if name in ("auto", "threads"):
        raise UserError(f"engine = {name} is called local now: give --engine local, or leave it out")
    raise UserError(f"engine = {name!r} is unknown: it must be one of {', '.join(get_args(Engine))}")


def has_key(mode: Mode, name: str) -> bool:
    """Whether the field `name` is a key of runs in `mode`."""
    return mode == "localsgd" or LOCALSGD not in FIELDS[name].metadata


def current_names(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The `keys` of an older configuration, or of a study kept beside older runs, as they are called now."""
    return {RENAMED.get(name, name): _current_value(name, value) for name, value in keys.items()}


def complete_record(held: Mapping[str, Any]) -> dict[str, Any]:
    """A record, which has a mode, with present names; keys that are newer than it have their defaults."""
    keys = {**Config().identity(held["mode"]), **current_names(held)}
    return {BUDGET: "to a round", **keys} if _has_budget(keys) else keys


def _has_budget(keys: Mapping[str, Any]) -> bool:
    """Whether the number of local steps depends on how `epochs` are met."""
    whole = keys["mode"] == "centralized" or keys["rounds"] or keys["local-epochs"] or keys["local-steps"] == 1
    return not whole and keys["local-steps-schedule"] == "constant"


def _current_value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_current_value(name, each) for each in value]
    return RENAMED_VALUES.get((name, value), value) if isinstance(value, Hashable) else value


def typed(name: str, value: Any) -> Any:
    """`value` (text of a flag, or a TOML value) as the type of the key `name`, within its range."""
    if name not in map(kebab, FIELDS):
        raise unknown(name)
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as failure:
        raise _user_error(failure, name) from None


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    field = FIELDS[name.replace("-", "_")]
    kind: Any = Annotated[(field.annotation, name, *field.metadata)]
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def own_keys(node_config: Mapping[str, Value]) -> dict[str, Value]:
    """The keys of a SuperNode's node config that replace the run's: its images, and its hardware."""
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


def suggestions(field: FieldInfo) -> tuple[str, ...]:
    """The names that a key accepts, also where it accepts other values too."""
    return next((named.names for named in field.metadata if isinstance(named, Named)), choices(field))


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values that a key accepts where it has a few names; else none."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def accepted(field: FieldInfo, limits: bool = True) -> str:
    """What a key accepts, in words; empty where its description has to say it.

    Without `limits`, those bounds are left out that no sensible value comes near.
    """
    if names := choices(field):
        return f"one of {', '.join(names)}"
    for named in field.metadata:
        if isinstance(named, Named):
            return f"one of {', '.join(named.names)}, or {named.other}"
    return " and ".join(_bounds(field, limits))


def about(field: FieldInfo) -> str:
    """What a key means and accepts, for help."""
    return "; ".join(filter(None, [(field.description or "").rstrip("."), accepted(field, limits=False)]))


def _bounds(field: FieldInfo, limits: bool) -> Iterator[str]:
    for bound in field.metadata:
        match bound:
            case annotated_types.Gt(gt):
                yield f"greater than {gt}"
            case annotated_types.Ge(ge):
                yield f"at least {ge}"
            case annotated_types.Lt(lt):
                yield f"less than {lt}"
            case annotated_types.Le(int(le)) if limits or le < 10**6:
                yield f"at most {le:,}"


def _user_error(failure: ValidationError, name: str = "") -> UserError:
    """The first error of a validation in one line that names the key and the remedy."""
    error = failure.errors(include_url=False)[0]
    reason = str(error.get("ctx", {}).get("error", ""))
    if not name and not error["loc"]:
        return UserError(reason)
    name = name or str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return unknown(name)
    value = _shown(error["input"])
    if reason:
        return UserError(f"{name} = {value} {reason}")
    field = FIELDS[name.replace("-", "_")]
    if error["type"] in KINDS:
        return UserError(f"{name} = {value} is not {KINDS[error['type']]}")
    if names := choices(field):
        near = difflib.get_close_matches(value, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return UserError(f"{name} = {value} is unknown: it must be {accepted(field)}{hint}")
    value = value.strip("'")  # a flag's text, which is a number
    finite = "finite and " if error["type"] == "finite_number" else ""
    return UserError(f"{name} = {value} is out of range: it must be {finite}{accepted(field)}")


KINDS = {  # pydantic's error types
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
}


def unknown(name: str) -> UserError:
    """The error of a key that there is not."""
    near = difflib.get_close_matches(kebab(name), map(kebab, FIELDS), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see --help for the keys"
    return UserError(f"unknown key {_shown(name)[1:-1]}: {hint}")


def _shown(value: object) -> str:
    """A value on one line, shortened."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


CORES = "FEDSIM_CORES"  # in the environment of a process that has been given a share of its machine


def cpu_count() -> int:
    """The cores that this process may use; raises UserError where its environment gives no number of them."""
    if given := os.environ.get(CORES):
        if not given.isdecimal() or not 1 <= int(given[:SHOWN]) <= MAX_THREADS:
            raise UserError(f"{CORES} = {_shown(given)} in the environment: give a number of cores, or leave it out")
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
