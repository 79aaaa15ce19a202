"""What may be chosen by name, and code of one's own as ``package.module:Class`` or ``package.module:function``."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fedsim.errors import UserError
from fedsim.system.interrupts import interruption
from strategies.arguments import CHAIN, Choice, arguments_of, kebab, nearest, read_choice, spelled, split_name, written

FUNCTION = "function"
MOST_NAMES, FIRST_NAMES = 14, 8  # in an error
NEAR = 0.8  # a name of one's own that is so like one of ours is taken for a slip


@dataclass(frozen=True)
class Seam:
    """What a key may choose: names with the place of what they stand for, or one's own.

    A place is ``module:Class``, ``module:function`` or ``module:TABLE``, of a dict with an entry of the name. `own` is
    the class that one's own must be a subclass of, by its place, or ``function``; empty: there is no own one. The run
    gives the first `leading` parameters and those that are `implied`.
    """

    places: Mapping[str, str] = field(default_factory=dict)
    own: str = ""
    leading: int = 0
    implied: tuple[str, ...] = ()
    chain: bool = False  # whether several may be given, with a + between
    none: bool = False  # whether none may be chosen
    files: tuple[str, ...] = ()  # how names of files end that may be chosen

    @property
    def names(self) -> tuple[str, ...]:
        """All names, for help and completion."""
        return (*(("none",) if self.none else ()), *self.places)

    @property
    def others(self) -> str:
        """What may stand in place of a name, in words; empty if nothing may."""
        own = f"package.module:{'function' if self.own == FUNCTION else 'Class'}" if self.own else ""
        files = " or ".join(f"a file NAME{ending}" for ending in self.files)
        several = "several with a + between" if self.chain else ""
        return " or ".join(filter(None, [files, own, several]))

    def canonical(self, text: str) -> str:
        """The canonical text of what `text` chooses; raises ValueError with one line on what is wrong.

        A name without arguments is not imported for this. Nor is one's own code: its arguments stay as they are given.
        """
        if (text == "none" and self.none) or text.endswith(self.files):
            return text
        return "+".join(map(self._canonical_part, self.parts(text)))

    def _canonical_part(self, part: str) -> str:
        if part in self.places:
            return part
        self._check_value(part)
        if self.own and is_own(part):
            name, pairs = split_name(part)
            return f"{name}:{spelled(pairs)}" if pairs else name
        return str(read_choice(part, self.kind, self.implied, self.leading))

    def read(self, text: str) -> list[Choice]:
        """What `text` chooses, more than one only of a chain; raises ValueError with one line on what is wrong."""
        if (text == "none" and self.none) or text.endswith(self.files):
            return []
        return [read_choice(part, self.kind, self.implied, self.leading) for part in self.parts(text)]

    def _check_value(self, part: str) -> None:
        """Raise ValueError where an argument of a known name has no value, and so looks like code of one's own."""
        name, _, argument = split_name(part)[0].partition(":")
        if argument and name in self.places:
            raise ValueError(f"{name}: {argument} has no value: give {name}:{argument}=...")

    def with_argument(self, text: str, argument: str, value: Any) -> str:
        """`text` with one argument given, or replaced, of the part that has it; raises ValueError."""
        if text == "none":
            raise ValueError(f"none has no argument {argument}")
        parts = [split_name(part) for part in self.parts(text)]
        of_each = [arguments_of(self.kind(name), self.implied, self.leading) for name, _ in parts]
        having = [number for number, known in enumerate(of_each) if argument.replace("-", "_") in known]
        if len(having) != 1:
            raise ValueError(f"{text} has {'more than one' if len(having) > 1 else 'no'} argument {argument}")
        name, pairs = parts[having[0]]
        given = dict(pair.partition("=")[::2] for pair in pairs.split(",") if pair)
        given = {key: held for key, held in given.items() if kebab(key) != kebab(argument)}
        given[argument] = written(value)
        parts[having[0]] = name, ",".join(f"{key}={held}" for key, held in given.items())
        return "+".join(f"{name}:{pairs}" if pairs else name for name, pairs in parts)

    def kind(self, name: str) -> Callable[..., Any]:
        """The class or function of a name; raises ValueError."""
        if place := self.places.get(name):
            found = imported(place)
            found = found[name] if isinstance(found, Mapping) else found
            return found if callable(found) else lambda: found
        if name == "none" and self.none:
            raise ValueError("none has no arguments: give a name that has")
        if not self.own or not is_function(name):
            other = f", or {self.others}" if self.others else ""
            shown = (
                self.names if len(self.names) <= MOST_NAMES else (*self.names[:FIRST_NAMES], "... (see fedsim list)")
            )
            near = nearest(name, self.names) or (
                f" (did you mean {':'.join(name.rsplit('.', 1))}?)" if "." in name else ""
            )
            raise ValueError(f"{name} is unknown: it must be one of {', '.join(shown)}{other}{near}")
        kind: Callable[..., Any] = own_code_at(name)
        if self.own == FUNCTION:
            return kind
        bases = self.own.split()
        if not (isinstance(kind, type) and issubclass(kind, tuple(map(imported, bases)))):
            raise ValueError(f"{name} is no subclass of {' or '.join(base.replace(':', '.') for base in bases)}")
        ours = [imported(base) for base in bases if base.startswith(("strategies", "fedsim"))]
        if issubclass(kind, tuple(ours)):
            _check_class(name, kind)
        return kind

    def name_of(self, kind: type) -> str:
        """The name of a class, or where it stands."""
        for name in self.places:
            if self.kind(name) is kind:
                return name
        return f"{kind.__module__}:{kind.__qualname__}"

    def parts(self, text: str) -> list[str]:
        """The choices in a text: more than one only of a chain."""
        return CHAIN.split(text) if self.chain else [text]


# Each model is a function of the number of classes, or of what else it gives. If it has a parameter `image` or `shape`,
# it is given the shape of its input: (C, H, W) of an image.
MODELS = Seam(
    {
        "lenet-bn": "fedsim.models.lenet:LeNetBN",
        "lenet5": "fedsim.models.lenet:LeNet5",
        "resnet20": "fedsim.models.resnet:resnet20",
        "resnet18": "fedsim.models.resnet:resnet18",
        "resnet18-v2": "fedsim.models.resnet:resnet18_v2",
        "vit-tiny": "fedsim.models.vit:vit_tiny",
        "gpt-tiny": "fedsim.models.gpt:GPT",
    },
    FUNCTION,
    leading=1,
    implied=("image", "shape"),
)
# What a data set may be of, unless it is a task itself: the first that takes what a function returns, or of all others
TASKS = {
    "classification": "fedsim.tasks.classification:Classification",
    "own-loss": "fedsim.tasks.own_loss:OwnLoss",
}
DATASETS = Seam(
    dict.fromkeys(("cifar100", "cifar10", "fashion-mnist"), "fedsim.data.official:OFFICIAL")
    | {"synthetic": "fedsim.data.image_sets:Synthetic", "text": "fedsim.tasks.text:Text"},
    FUNCTION,
    files=(".npz",),
)
AUGMENTATIONS = Seam(
    {
        "crop": "fedsim.data.augment:Crop",
        "center": "fedsim.data.augment:Center",
        "mirror": "fedsim.data.augment:Mirror",
    },
    FUNCTION,
    leading=2,
    chain=True,
    none=True,
)
PARTITIONS = Seam(
    dict.fromkeys(
        [
            *("iid", "dirichlet", "inner-dirichlet", "pathological", "shard", "size", "linear", "square"),
            *("exponential", "continuous", "natural-id", "grouped-natural-id", "pachinko"),
        ],
        "fedsim.data.uneven:PARTITIONS",
    ),
    "fedsim.data.uneven:Partition",
)
OPTIMIZERS = Seam(
    dict.fromkeys(("sgdm", "lars", "lamb", "muon"), "fedsim.optim.named:OPTIMIZERS")
    | dict.fromkeys(
        ("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "sgd"),
        "fedsim.optim.torch_optimizers:TORCH_OPTIMIZERS",
    ),
    "torch.optim:Optimizer",
    leading=1,
    implied=(  # and those with which a new state is not all zero
        *("lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"),
        *("initial_accumulator_value", "dampening"),
    ),
)
RATE_SCALINGS = Seam(dict.fromkeys(("linear", "sqrt"), "fedsim.optim.lr_schedule:SCALINGS"), leading=1, none=True)
SCHEDULES = Seam(
    dict.fromkeys(("constant", "cosine", "multistep"), "fedsim.optim.lr_schedule:SCHEDULES"),
    "fedsim.optim.lr_schedule:Shape",
)
LOCAL_STEPS_SCHEDULES = Seam(
    dict.fromkeys(
        ("constant", "post-local", "qsr", "linear", "doubling", "table", "adacomm", "network"),
        "fedsim.training.local_steps:SCHEDULES",
    ),
    "fedsim.training.local_steps:LocalStepsSchedule",
)
WORKERS = Seam(dict.fromkeys(("even", "uneven"), "fedsim.training.workers:WORKERS"), "fedsim.training.workers:Workers")

# Methods (`strategies.method`), codecs, means
METHOD = "strategies.method:Method"
LOCAL_RULES = Seam(
    {
        "fedprox": "strategies.fedprox:FedProx",
        "scaffold": "strategies.scaffold:Scaffold",
        "scaffold-inferred": "strategies.scaffold:ScaffoldInferred",
        "feddyn": "strategies.feddyn:FedDyn",
        "fednova": "strategies.fednova:FedNova",
    },
    METHOD,
    none=True,
)
OUTER_STEPS = Seam(
    dict.fromkeys(
        [
            *("fedavgm", "slowmo", "diloco", "noloco", "fedadam", "fedyogi", "fedadagrad"),
            *("adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "asgd", "nadam", "radam", "rmsprop"),
            *("rprop", "sgd", "yogi"),
        ],
        "strategies.outer:STEPS",
    )
    | {"fedexp": "strategies.fedexp:FedExP", "streaming": "strategies.streaming:Streaming"},
    f"{METHOD} flwr.serverapp.strategy:Strategy",
    implied=(  # by the run, of Flower's strategies
        *("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes"),
        *("arrayrecord_key", "configrecord_key", "weighted_by_key", "train_loss_key"),
        *("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"),
    ),
    none=True,
)
OTHER_LAYERS = Seam({"delay": "strategies.delay:Delay"}, METHOD, chain=True, none=True)
MOMENTUM = Seam(dict.fromkeys(("keep", "reset", "average"), "strategies.momentum:MOMENTUM"), METHOD)
BATCHNORM = Seam(
    dict.fromkeys(("average", "first-worker", "pooled", "local", "re-estimated"), "strategies.batchnorm:BATCHNORM"),
    "strategies.batchnorm:Statistics",
)
TEST_MODELS = Seam({"ema": "strategies.ema:Ema", "lawa": "strategies.lawa:Lawa"}, METHOD, none=True)
MEANS = Seam(
    {
        "exact": "strategies.mean:Exact",
        "trimmed": "strategies.robust:Trimmed",
        "median": "strategies.robust:Median",
        "clipped": "strategies.robust:Clipped",
        "edit": "strategies.edit:Edit",
    },
    "strategies.mean:Mean",
)
TOPOLOGIES = Seam(
    dict.fromkeys(("all", "groups", "pairs", "ring", "exponential"), "strategies.topology:TOPOLOGIES"),
    "strategies.topology:Topology",
)
CODECS = Seam(
    {
        "fp16": "strategies.compression:Fp16",
        "bf16": "strategies.compression:Bf16",
        "int8": "strategies.compression:Int8",
        "int4": "strategies.compression:Int4",
        "int2": "strategies.sparseloco:Int2",
        "sign": "strategies.compression:Sign",
        "topk": "strategies.compression:TopK",
        "chunked-topk": "strategies.sparseloco:ChunkedTopK",
        "randomk": "strategies.compression:RandomK",
        "qsgd": "strategies.compression:QSGD",
        "powersgd": "strategies.compression:PowerSGD",
    },
    "strategies.compression:Codec",
    chain=True,
    none=True,
)
METRICS = Seam(
    {
        "top5-accuracy": "fedsim.training.metrics:top5_accuracy",
        "per-class-accuracy": "fedsim.training.metrics:per_class_accuracy",
    },
    FUNCTION,
    leading=2,
    chain=True,
    none=True,
)
TRACKERS = Seam({"tensorboard": "fedsim.experiments.track:TensorBoard"}, FUNCTION, leading=2)


def _check_class(name: str, kind: type) -> None:
    """Raise ValueError where one's own class is no frozen dataclass, or misspells an attribute of what it extends."""
    parameters = vars(kind).get("__dataclass_params__")
    if not (parameters and parameters.frozen):
        raise ValueError(f"{name} is no frozen dataclass: write @dataclass(frozen=True) above it")
    known = {attribute for parent in kind.__bases__ for attribute in dir(parent)}
    own = {attribute for attribute in vars(kind) if not attribute.startswith("_")}
    for attribute in sorted(own - known - {each.name for each in fields(kind)}):
        if near := nearest(attribute, known, NEAR):
            raise ValueError(f"{name} has {attribute}, which nothing calls{near}: correct it, or begin it with _")


def imported(place: str) -> Any:
    """What stands at a place of fedsim's own, ``module:name``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def is_function(value: str) -> bool:
    """Whether `value` has the form ``package.module:name``."""
    return bool(re.fullmatch(r"([^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*", value))


def is_own(text: str) -> bool:
    """Whether `text` chooses code of one's own, with or without arguments."""
    return is_function(split_name(text)[0])


def names_own(text: str) -> bool:
    """Whether any part of a chain chooses code of one's own."""
    return any(map(is_own, CHAIN.split(text)))


def own_code_at(name: str) -> Callable[..., Any]:
    """The function or class ``package.module:name``, imported; raises ValueError where it cannot be."""
    module, _, attribute = name.partition(":")
    if module == "__main__":  # it is another module in every other process, and has no source in a notebook
        raise ValueError("it cannot be imported by name: define it in a file NAME.py of its own")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"no module {error.name} on this machine: install it, or put its folder on PYTHONPATH"
        ) from error
    except SystemExit as error:
        if type(error) is not SystemExit:  # a signal's
            raise
        raise ValueError(
            f'{module} exits where it is imported: let only a script do so, below if __name__ == "__main__":'
        ) from error
    except Exception as error:  # the module's own code may raise anything
        raise ValueError(f"{module} cannot be imported ({describe(error)})") from error
    if not callable(found):
        raise ValueError(f"{module} has no function or class {attribute}")
    return found  # type: ignore[no-any-return]


def function_of(key: str, value: str) -> Callable[..., Any]:
    """The function that `value` names, imported; raises UserError, which names `key`, where it cannot be."""
    try:
        return own_code_at(value)
    except ValueError as error:
        raise UserError(f"{key} = {value}: {error}") from error


@contextlib.contextmanager
def failures_of(what: str, remedy: str = "") -> Iterator[None]:
    """Context manager around code that is not fedsim's: what it raises is a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # it may raise anything, and exit
        if interruption(error):
            raise
        raise UserError(f"{what} ({describe(error)})" + (f": {remedy}" if remedy else "")) from error


def describe(error: BaseException) -> str:
    """An error of code that is not fedsim's, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
