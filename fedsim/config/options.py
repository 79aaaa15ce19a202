"""What each command takes: options that say how its runs are made, and the keys of the runs.

A field of these classes is a flag of the command line and, unless it is marked `COMMAND_LINE`, an argument of the
function of the same name in Python; its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo

from fedsim.config import FIELDS, Declared, Engine, Mode, has_key
from fedsim.config.messages import user_error
from fedsim.config.types import Bool, Count, Folder, Integer, Number, Text, not_empty
from fedsim.errors import UserError
from strategies.arguments import kebab

Link = Literal["worker", "server", "all-reduce"]  # whose bandwidth limits a sync
COMMAND_LINE = "it is no argument in Python"
POSITIONAL = "it stands on the command line without a flag"
LIST = "its values are written with commas"


@dataclass(frozen=True)
class Flags:
    """In the metadata of an option: what else it is called on the command line, and what stands for its value."""

    others: tuple[str, ...] = ()
    value: str = ""


@dataclass(frozen=True)
class Keys:
    """The keys of a command's runs: those of `mode`, or only some of them.

    The command line also leaves out those in `without`; with `lists`, each may have several values there. `default`:
    what the defaults are where they are not those of `Config`, in words.
    """

    mode: Mode
    without: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    lists: bool = False
    default: str = ""

    def __contains__(self, name: str) -> bool:
        """Whether the field `name` of `Config` is one of them."""
        return has_key(self.mode, name) and (self.only is None or kebab(name) in self.only)


def _integers(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return _items(value)
    try:
        return tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        raise ValueError(f"is not a list of whole numbers: for instance --{kebab(str(info.field_name))} 4,12") from None


def _items(value: Any) -> Any:
    """The items of a list, which Python gives, as a tuple; a single value is a list of one."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def _names(value: Any) -> Any:
    return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else _items(value)


Integers = Annotated[tuple[int, ...], BeforeValidator(_integers), LIST]
Names = Annotated[tuple[Text, ...], BeforeValidator(_names), LIST]
OutFile = Annotated[Folder, Flags(("-o",), "FILE")]
OutFolder = Annotated[Folder, Flags(("-o",), "FOLDER")]

# Options of several commands
Rerun = Annotated[Bool, Field(description="Start over, even if a run is finished or interrupted.")]
DryRun = Annotated[Bool, COMMAND_LINE, Field(description="List the runs with their costs; write nothing.")]
Track = Annotated[
    Text, Flags((), "NAME"), Field(description="Also send the rows to: tensorboard, or package.module:Class.")
]
ResultsDir = Annotated[Folder, AfterValidator(not_empty), Field(description="Folder in which each study has its own.")]
Preset = Annotated[
    Text,
    Flags(("--config",), "NAME"),
    Field(
        description="Use the [set] and [[case]] of this study, a name or TOML file, not its [grid] or [tune]; keys "
        "override them."
    ),
]
EngineName = Annotated[
    Engine,
    Field(
        description="Where clients train: in this process (local, or stacked, equal to rounding), or on Ray (flower)."
    ),
]
Results = Annotated[Folder, POSITIONAL, Field(description="Folder of results, or of one study.")]


class Options(Declared, frozen=True):
    """The options of a command."""

    keys: ClassVar[Keys] = Keys("localsgd", only=())

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options with the values `given`, by name with underscores; raises UserError."""
        try:
            return cls.model_validate({kebab(name): value for name, value in given.items()})
        except ValidationError as failure:
            missing = [f"--{error['loc'][0]}" for error in failure.errors() if error["type"] == "missing"]
            if missing:
                raise UserError(f"{', '.join(missing)} must be given: see --help") from None
            raise user_error(failure, cls.model_fields) from None

    @classmethod
    def in_python(cls) -> dict[str, FieldInfo]:
        """The options that are arguments of the function in Python."""
        return {name: field for name, field in cls.model_fields.items() if COMMAND_LINE not in field.metadata}

    @classmethod
    def keys_in_python(cls) -> dict[str, FieldInfo]:
        """The keys that are arguments of the function in Python."""
        return {name: field for name, field in FIELDS.items() if name in cls.keys and name not in cls.in_python()}

    @classmethod
    def key_flags(cls) -> list[str]:
        """The keys that are flags of the command."""
        own = {kebab(name) for name in cls.model_fields}.union(cls.keys.without)
        return [name for name in FIELDS if name in cls.keys and kebab(name) not in own]


class CentralizedOptions(Options, frozen=True):
    """Those of one run."""

    keys = Keys("centralized")

    preset: Preset = ""
    rerun: Rerun = False
    dry_run: DryRun = False
    track: Track = ""


class LocalSGDOptions(CentralizedOptions, frozen=True):
    """Those of one run of LocalSGD."""

    keys = Keys("localsgd")

    engine: EngineName = "local"


class DemoOptions(Options, frozen=True):
    """Those of the demo."""

    results_dir: ResultsDir = "demo-results"  # apart from results that are kept
    rerun: Rerun = False


class SweepOptions(Options, frozen=True):
    """Those of several runs."""

    results_dir: ResultsDir = "results"
    rerun: Rerun = False
    engine: EngineName = "local"
    ray: Annotated[Text | None, Flags((), "[ADDRESS]")] = None
    """Run the cells in parallel on the Ray cluster at ADDRESS (host:port, or auto); without ADDRESS, on that of
    RAY_ADDRESS or on a Ray started on this machine. For GPUs that this machine lacks, give --device cuda."""
    cpus_per_cell: Annotated[Number | None, Flags((), "NUMBER")] = None
    """With --ray: CPU cores per cell (default: --threads)."""
    gpus_per_cell: Annotated[Number | None, Flags((), "NUMBER")] = None
    """With --ray: share of a GPU per cell, e.g. 0.25 (default: 1)."""
    dry_run: DryRun = False
    track: Track = ""


class GridOptions(SweepOptions, frozen=True):
    """Those of a grid. In Python its lists are keys."""

    keys = Keys("localsgd", without=("seed", "resume"), lists=True)

    clients: Annotated[Integers, COMMAND_LINE] = (4, 12)
    """The values of K, with commas."""
    local_steps: Annotated[Integers | None, LIST, COMMAND_LINE] = None
    """The values of J, with commas (default: 10,20,30; with --local-epochs: none)."""
    seeds: Annotated[Integers, COMMAND_LINE] = (2025,)
    """The seeds of each cell, with commas."""
    preset: Preset = ""


class StudyOptions(SweepOptions, frozen=True):
    """Those of studies."""

    keys = Keys(
        "localsgd",
        only=("data-dir", "device", "threads", "stop-after-epochs", "accept-changed-code"),
        default="the study's",
    )

    studies: Annotated[tuple[Text, ...], POSITIONAL, COMMAND_LINE] = ()
    """Names of studies in fedsim/studies/, or TOML files."""
    seeds: Integers = ()
    """Seeds of every cell, with commas (default: the study's)."""
    cells: Names = ()
    """Run only these cells, with commas: 'k12-j20,k4-*' (default: all)."""
    also: Annotated[tuple[Text, ...], BeforeValidator(_items), Flags((), "KEY=VALUE")] = ()
    """Every cell of the studies once more, with this key changed, or these: 'outer=diloco momentum=0'; may be given
    several times."""
    precision: Text = ""
    """Run each study in this precision, as STUDY-PRECISION."""


class BenchOptions(Options, frozen=True):
    """Those of the bench."""

    keys = Keys("localsgd", without=("dataset", "results-dir", "name", "resume"))

    clients: Integers = (1, 4, 12, 64)
    """The K to measure, with commas."""
    variants: Names = ()
    """What to measure, with commas (default: all for the device)."""
    timed: Count = 3
    """Timed rounds in each pass."""
    passes: Count = 2
    """How often each variant is measured."""
    time_limit: Annotated[Number, Field(ge=1)] = 900.0
    """Seconds after which a measurement is stopped."""
    grow: Bool = True
    """Also measure how the time of a round grows with K (to 1,000) and J."""
    out: OutFile = "results/bench.json"
    """The file to write."""


SHARD_KEYS = Keys("localsgd", only=("dataset", "data-dir", "validation", "clients", "seed", "partition"))
# on which alone the images of the clients depend


class ExportOptions(Options, frozen=True):
    """Those of export-shards."""

    keys = SHARD_KEYS

    out: OutFolder
    """The folder to create; it will hold a folder for each client."""


class PartitionOptions(Options, frozen=True):
    """Those of partition."""

    keys = SHARD_KEYS

    out: OutFile = ""
    """Also plot it to this file, .png, .pdf or .svg."""


class ResultsOptions(Options, frozen=True):
    """The folder that a command reads."""

    results: Results = "results"


class ReportOptions(ResultsOptions, frozen=True):
    """Those of the report."""

    out: OutFolder = "report"
    """Folder to write to."""
    figure: Text = ""
    """Make only this figure and its CSV."""


class CompareOptions(Options, frozen=True):
    """Those of compare."""

    folders: Annotated[tuple[Folder, ...], POSITIONAL] = ()
    """Two folders of results or more, or of studies."""
    out: OutFolder = "comparison"
    """Folder to write to."""


class DiffOptions(Options, frozen=True):
    """Those of diff."""

    one: Annotated[Folder, POSITIONAL] = ""
    """Folder of one run."""
    other: Annotated[Folder, POSITIONAL] = ""
    """Folder of the other."""


class ListOptions(Options, frozen=True):
    """Those of list."""

    key: Annotated[Text, POSITIONAL] = ""
    """A key, for instance compress."""
    name: Annotated[Text, POSITIONAL] = ""
    """One of its names, or code of your own as package.module:Class (default: all names)."""


class TimeOptions(ResultsOptions, frozen=True):
    """Those of time-to-accuracy."""

    bandwidth: Text
    """Of each link, per second: e.g. 100Mbit or 12.5MB."""
    latency: Text
    """Of a message, one way: e.g. 20ms."""
    target: Number
    """The accuracy to reach, from 0 to 1."""
    upload: Text = ""
    """Bandwidth to the server (default: that of --bandwidth)."""
    link: Link = "worker"
    """worker: a server, each worker has its own link; server: all share the server's; all-reduce: no server."""
    compute: Text = ""
    """Time of a worker's local step, e.g. 10ms (default: measured)."""
    jitter: Text = ""
    """How step times vary: lognormal:SIGMA or exponential (default: not at all)."""
    slow: Text = ""
    """Slow workers, as COUNT:FACTOR; 1:2.5 is one that takes 2.5 times as long (default: none)."""
    out: OutFolder = "report"
    """Folder to write to."""


class DeployOptions(Options, frozen=True):
    """Those of deploy."""

    nodes: Integer
    """Number of SuperNodes, one for each client."""
    out: OutFolder = "federation"
    """The folder to create."""
    host: Names = ("127.0.0.1",)
    """The SuperLink's DNS names and IP addresses, with commas; nodes use the first."""
    port: Integer = 8000
    """Port of the SuperLink; node I has port + 1 + I on its own machine."""
    name: Text = "federation"
    """Name of the connection: flwr run . NAME."""
    ca: Folder = ""
    """ca/ of an earlier deployment, to sign with (default: create a new certificate authority)."""
    insecure: Bool = False
    """Use neither TLS nor authentication of nodes."""
