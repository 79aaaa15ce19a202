"""Every configuration key: its name, its default, what it accepts, and what it means.

Command-line flags, Flower's run-config, the presets and a run's ``config.json`` all follow from the fields of
`Config`. Outside Python a key is written in kebab-case: the field ``local_steps`` is the flag ``--local-steps`` and
the run-config key ``local-steps``.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from fedsim import registry
from fedsim.config.messages import error_at, unknown, user_error
from fedsim.config.types import (
    LOCALSGD,
    MAX_THREADS,
    OPERATIONAL,
    Bool,
    Count,
    CountOrZero,
    Decay,
    Epochs,
    EpochsOrZero,
    Folder,
    From,
    Integer,
    Name,
    NotNegative,
    Number,
    Positive,
    Seconds,
    Steps,
    Text,
    check_device,
    not_empty,
)
from fedsim.errors import UserError
from fedsim.registry import Seam
from strategies.arguments import Choice, kebab

Mode = Literal["centralized", "localsgd"]
Engine = Literal["local", "stacked", "flower"]  # how the clients of a run are trained
Value = bool | int | float | str


class Declared(BaseModel, frozen=True):
    """A class that declares keys or options: a strict type each, its name in kebab-case, its docstring as help."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=kebab,
        validate_by_name=True,
        use_attribute_docstrings=True,
    )


class Config(Declared, frozen=True):
    """All keys of a run; see the module's docstring for their spelling."""

    # Data
    dataset: Annotated[Folder, From(registry.DATASETS)] = "cifar100"
    """The data set."""
    data_dir: Annotated[Folder, OPERATIONAL] = ""
    """Folder of the data set's files; empty: FEDSIM_DATA, or fedsim in the user's cache folder."""
    augment: Annotated[Text, From(registry.AUGMENTATIONS)] = "crop+mirror"
    """What is done to images in training: cut at random, mirrored half of the time, cut in the middle, or nothing."""
    normalize: Literal["dataset", "cifar10", "none"] = "dataset"
    """Mean and standard deviation to normalize by, the paper's Table 1 used CIFAR-10's; none: pixels from 0 to 1."""
    partition: Annotated[Text, From(registry.PARTITIONS), LOCALSGD] = "iid"
    """Who holds which training images; all but iid and pachinko are partitioners of flwr-datasets."""
    validation: CountOrZero = 0
    """Training images to hold out, drawn by the seed; evaluate on them instead of the test set."""

    # Model and optimizer
    model: Annotated[Text, From(registry.MODELS)] = "lenet-bn"
    """The model."""
    init: Folder = ""
    """File of the weights to begin from: a run's model.pt, or a state_dict; empty: drawn by the seed."""
    optimizer: Annotated[Text, From(registry.OPTIMIZERS)] = "sgdm"
    """The optimizer: one of fedsim's three, or one of PyTorch's."""
    lr: Positive = 0.01
    """Peak learning rate."""
    lr_scaling: Annotated[Text, From(registry.RATE_SCALINGS)] = "none"
    """Scale lr by the ratio of the total batch of all clients to another (Goyal et al. 2017), or by its root."""
    momentum: Decay = 0.9
    """Momentum of sgdm and lars."""
    weight_decay: NotNegative = 4e-4
    """L2 penalty (sgdm, lars) or weight decay (lamb, adamw); else as PyTorch's optimizer uses it."""
    decay_biases_and_norms: Bool = True
    """Decay all parameters, or only those of more than one dimension: weights, not biases and norms."""
    clip_grad_norm: NotNegative = 0.0
    """Largest norm of a step's gradient, over all parameters; a longer one is scaled down to it; 0: no limit."""

    # Schedule and budget
    schedule: Annotated[Text, From(registry.SCHEDULES)] = "constant"
    """Learning rate after the warm-up."""
    schedule_unit: Literal["step", "epoch"] = "step"
    """Change the rate at every local step or every epoch."""
    warmup_epochs: EpochsOrZero = 0.0
    """Epochs of linear warm-up."""
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
    local_steps_schedule: Annotated[Text, From(registry.LOCAL_STEPS_SCHEDULES), LOCALSGD] = "constant"
    """How J changes during the run, from local-steps on; all but constant need record-by epoch."""
    workers: Annotated[Text, From(registry.WORKERS), LOCALSGD] = "even"
    """Clients of equal speed that are always there; or of unlike speeds, which take a part of J, and at times away."""
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
    mean: Annotated[Text, From(registry.MEANS), LOCALSGD] = "exact"
    """The mean of the clients' updates; all but exact withstand a few absurd ones."""
    topology: Annotated[Text, From(registry.TOPOLOGIES), LOCALSGD] = "all"
    """Whose models a client averages at a sync: those of all, or of some, with a model of each client's own."""
    outer: Annotated[Text, From(registry.OUTER_STEPS), LOCALSGD] = "none"
    """The server's optimizer on the mean of the clients' models, or a strategy of Flower's as module:Class, for
    instance flwr.serverapp.strategy:FedAdam; none: the mean itself."""
    local_rule: Annotated[Text, From(registry.LOCAL_RULES), LOCALSGD] = "none"
    """What corrects local steps: a pull to the model of the round, control variates (sent or, with plain SGD, inferred
    by the clients), a changed loss, or updates divided by the number of steps."""
    layer: Annotated[Text, From(registry.OTHER_LAYERS), LOCALSGD] = "none"
    """Other methods: delay, with which the mean arrives a round late, while clients compute; or one's own."""
    momentum_at_sync: Annotated[Text, From(registry.MOMENTUM), LOCALSGD] = "keep"
    """Keep, reset or average the clients' optimizer states at each sync."""
    batchnorm_at_sync: Annotated[Text, From(registry.BATCHNORM), LOCALSGD] = "average"
    """Running statistics of BN: averaged, those of the first worker averaged (the paper's code), pooled with the
    variance of the means, local to each client (tested with the first worker's), or re-estimated before each test."""
    compress: Annotated[Text, From(registry.CODECS), LOCALSGD] = "none"
    """How clients compress the updates of parameters that they send."""
    compress_down: Annotated[Text, From(registry.CODECS), LOCALSGD] = "none"
    """How the server compresses the change of the parameters for clients that took part in the last round."""
    error_feedback: Annotated[Bool, LOCALSGD] = True
    """With compress: add what a message left out to the client's next update."""
    test_model: Annotated[Text, From(registry.TEST_MODELS), LOCALSGD] = "none"
    """What is tested in place of the model of the run, and saved beside it: a moving average of the models."""
    shuffle_every: Annotated[Literal["epoch", "round"], LOCALSGD] = "epoch"
    """Shuffle a client's shard after each pass over it, or every round (the paper's code)."""

    # The run
    seed: Annotated[Integer, Field(ge=0, le=10**18)] = 2025
    """Seed of shards, initial weights, shuffling, augmentation and dropout."""
    device: Annotated[Text, AfterValidator(check_device)] = "auto"
    """Where to train: auto, cpu, cuda or cuda:N; auto: cuda if there is one, else cpu."""
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"
    """Precision of convolutions and matrix products; everything else is fp32 (with fp64: fp64)."""
    threads: Annotated[Integer, Field(ge=0, le=MAX_THREADS)] = 0
    """CPU threads of a training step; 0: one for each client; every core for one client and in centralized mode."""
    record_by: Annotated[Literal["round", "epoch"], LOCALSGD] = "round"
    """Unit of rows, evaluate-every and checkpoint-every: a round, or an epoch of all clients."""
    metrics: Annotated[Text, From(registry.METRICS)] = "none"
    """What models are tested by besides the metric of their task; a function of your own gets outputs and targets."""
    evaluate_every: Count = 1
    """Rounds or epochs between evaluations (see record-by)."""
    evaluate_clients_every: Annotated[CountOrZero, LOCALSGD] = 0
    """Rounds or epochs between evaluations on each client's share of the test data, of the global model and of the
    client's own after its local steps; also at the end; 0: never."""
    checkpoint_every: Annotated[Count, OPERATIONAL] = 10
    """Rounds or epochs between checkpoints; the last one always has one."""
    stop_after_epochs: Annotated[EpochsOrZero, OPERATIONAL] = 0.0
    """Stop after this many epochs; run the same command without it to resume; 0: off."""
    stop_after_rounds: Annotated[CountOrZero, LOCALSGD, OPERATIONAL] = 0
    """Stop after this many rounds; run the same command without it to resume; 0: off."""
    results_dir: Annotated[Folder, AfterValidator(not_empty), OPERATIONAL] = "results"
    """Folder of the runs' folders."""
    resume: Annotated[Name, LOCALSGD, OPERATIONAL] = ""
    """Name of a run in results-dir to resume; its configuration is read from its folder."""
    accept_changed_code: Annotated[Bool, OPERATIONAL] = False
    """Resume a run although the code of its own model, data set or strategy has changed since."""
    name: Annotated[Name, OPERATIONAL] = ""
    """Name of the run's folder; empty: made from the configuration."""

    @property
    def clients_per_round(self) -> int:
        """The clients sampled in each round: the nearest whole number to fraction * clients, at least one."""
        return max(1, round(self.fraction * self.clients))

    @property
    def failures_to_end(self) -> float:
        """How many failures of one client in a row end a run (see max-failures)."""
        return self.max_failures or (math.inf if self.min_clients else 3)

    def changed(self, changes: Mapping[str, Any]) -> Config:
        """This configuration with some keys (kebab-case) changed; unknown keys and bad values are a UserError.

        ``KEY.ARGUMENT`` changes one argument of what a key chooses.
        """
        plain = {name: value for name, value in changes.items() if "." not in name}
        try:
            changed = Config.model_validate({**self.as_keys(), **plain}, by_alias=True, by_name=False)
        except ValidationError as failure:
            raise user_error(failure, FIELDS) from None
        for name, value in changes.items():
            if "." in name:
                key, _, argument = name.partition(".")
                seam, text = seam_of(key, name), str(changed.as_keys()[key])
                try:
                    changed = changed.changed({key: seam.with_argument(text, argument, value)})
                except ValueError as error:
                    raise UserError(f"{name} = {value}: {error}") from error
        return changed

    def choices(self, name: str) -> list[Choice]:
        """What the field `name` chooses, with its arguments; none of ``none``, and several only of a chain.

        Raises UserError where it cannot be imported, or lacks an argument.
        """
        text = getattr(self, name)
        try:
            return seam_of(kebab(name)).read(text)
        except ValueError as error:
            raise UserError(error_at(kebab(name), text, str(error))) from error

    def choice(self, name: str) -> Choice:
        """The only one of `choices`."""
        [chosen] = self.choices(name)
        return chosen

    def made(self, name: str) -> Any:
        """What the field `name` chooses, made of its arguments alone; raises UserError where it refuses them."""
        choice = self.choice(name)
        try:
            return choice.make()
        except (ValueError, TypeError) as error:
            raise UserError(error_at(kebab(name), getattr(self, name), str(error))) from error

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

    def record(self, mode: Mode, own: bool = True) -> dict[str, Any]:
        """The contents of ``config.json``: the mode, `identity`, and every argument of each choice, also the defaults.

        With a constant J > 1 also how `epochs` are met. Without `own`, code of the user's is not imported for its
        arguments, which are left out.
        """
        keys: dict[str, Any] = {"mode": mode, **self.identity(mode)}
        return {**keys, **({BUDGET: "to a step"} if has_budget(keys) else {}), ARGUMENTS: self._arguments(mode, own)}

    def _arguments(self, mode: Mode, own: bool) -> dict[str, dict[str, Any]]:
        """Key -> name -> argument -> value, of all choices with arguments."""
        found = {}
        for name in CHOSEN:
            if has_key(mode, name) and (own or not registry.names_own(getattr(self, name))):
                of_each = {choice.name: _plain(choice.arguments) for choice in self.choices(name)}
                if any(of_each.values()):
                    found[kebab(name)] = of_each
        return found


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON has them."""
    return {kebab(name): list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


BUDGET = "budget"  # in a record: `epochs` are met to a step, or, in runs of earlier versions, to a round
ARGUMENTS = "arguments"  # in a record: those of each choice
OF_A_NODE = ("data-dir", "device", "threads")
OF_FLOWER = ("partition-id", "num-partitions")
FIELDS: Mapping[str, FieldInfo] = Config.model_fields
CHOSEN = tuple(name for name, field in FIELDS.items() if any(isinstance(each, From) for each in field.metadata))


def seam_of(key: str, shown: str = "") -> Seam:
    """What the key may choose from; raises UserError where it chooses nothing (`shown` is what the user gave)."""
    if key not in map(kebab, FIELDS):
        raise unknown(key, FIELDS)
    for each in FIELDS[key.replace("-", "_")].metadata:
        if isinstance(each, From):
            return each.seam
    raise UserError(f"{shown or key}: {key} has no arguments: give {key} itself")


def has_key(mode: Mode, name: str) -> bool:
    """Whether the field `name` is a key of runs in `mode`."""
    return mode == "localsgd" or LOCALSGD not in FIELDS[name].metadata


def has_budget(keys: Mapping[str, Any]) -> bool:
    """Whether the number of local steps depends on how `epochs` are met."""
    whole = keys["mode"] == "centralized" or keys["rounds"] or keys["local-epochs"] or keys["local-steps"] == 1
    return not whole and keys["local-steps-schedule"] == "constant"


def typed(name: str, value: Any) -> Any:
    """`value` (text of a flag, or a TOML value) as the type of the key `name`, within its range.

    That of one argument, ``KEY.ARGUMENT``, is checked where the choice is known.
    """
    if "." in name:
        seam_of(name.partition(".")[0], name)
        return value
    if name not in map(kebab, FIELDS):
        raise unknown(name, FIELDS)
    try:
        return _adapter(name).validate_python(value)
    except ValidationError as failure:
        raise user_error(failure, FIELDS, name) from None


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
