"""Compare the results of two commits bit for bit, on this machine: a change that should change no number is held to it.

    python tests/bits.py main HEAD            every method by local and stacked, a few by flwr run
    python tests/bits.py main . --quick       in minutes; a folder is taken as it is, with what is not committed
    python tests/bits.py main . -k scaffold   the cases with such names (a regular expression), also those by flwr run

A case is ENGINE/SCENARIO/METHOD. Compared are the model, the rows, the summary (all without times and origin) and the
checkpoint with the workers' memories; each case that differs is printed with the first difference in each of them.
With ``--unnamed`` the tensors of each worker in a checkpoint are compared without their names. With ``--parts model``
the model alone is compared, where a change renames what stands in the others.

A method is an entry of `METHODS`, or any other choice of a key of `Config`, which needs no line here. A case that only
the new commit has is no difference. The exit code is 1 if any case differs.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import inspect
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

FAULTS = "FEDSIM_BITS_FAULTS"  # see bits_client.py
Outcome = dict[str, Any]  # PART/NAME -> a value as text
PARTS = "model,rows,summary,checkpoint"
TINY = (
    "dataset=synthetic:images=96 augment=crop:size=12,padding=0+mirror model=bits_client:network batch-size=4 lr=0.02 "
    "threads=1 device=cpu checkpoint-every=2 "
)
LOCALSGD, CENTRALIZED = TINY + "clients=6 local-steps=2 rounds=5 ", TINY + "epochs=3 "
COMBINED = """
local-rule=scaffold momentum-at-sync=reset outer=slowmo compress-down=powersgd
local-rule=fedprox:mu=0.5 mean=trimmed:trim=0.34 compress=fp16
local-rule=scaffold-inferred momentum=0 weight-decay=0 outer=fedavgm
optimizer=lars batchnorm-at-sync=first-worker compress=sign
optimizer=lamb lr=0.001 mean=clipped compress=int4
outer=fedyogi batchnorm-at-sync=local compress=randomk:ratio=0.3
optimizer=adam momentum-at-sync=average batchnorm-at-sync=pooled compress=topk:ratio=0.1
"""
METHODS = """
clients=6; clients=1; workers=uneven:speed=0.5/1,away=0.3; momentum=0; layer=delay; compress=qsgd:levels=40
compress=powersgd:rank=1
local-rule=scaffold-inferred momentum=0 weight-decay=0; min-clients=6 local-rule=scaffold
layer=delay local-rule=fedprox outer=slowmo compress=topk:ratio=0.1
optimizer=lars:backend=torch-optimizer; optimizer=lars:lr-in-momentum=true
optimizer=lars:adapt-undecayed=true decay-biases-and-norms=false; optimizer=lamb:bias-correction=step-size
optimizer=lamb:adapt-undecayed=false decay-biases-and-norms=false; optimizer=lamb:bias-correction=moments
optimizer=adamw:betas=0.8/0.9 momentum-at-sync=average; mean=trimmed:trim=0.34
batchnorm-at-sync=re-estimated:images=20; compress-down=sign compress=topk:ratio=0.1
compress=topk:ratio=0.1; compress-down=topk:ratio=0.1; compress=randomk:ratio=0.3
compress-down=randomk:ratio=0.3; error-feedback=false compress=topk:ratio=0.1
outer=sgd:lr=0.5,momentum=0.5,nesterov=true; local-epochs=1 partition=linear:small-shards=true
local-steps-schedule=post-local:switch-epoch=0.5 record-by=epoch rounds=6
local-steps-schedule=qsr:alpha=0.05 record-by=epoch rounds=6
local-steps-schedule=linear:max=3 record-by=epoch rounds=0 epochs=3
local-steps-schedule=doubling:max=4 record-by=epoch rounds=0 epochs=4
local-steps-schedule=table:epochs=0.5/1,steps=3/1 record-by=epoch rounds=6
local-steps-schedule=adacomm:every=0.5,shrink=0.6 record-by=epoch rounds=0 epochs=4 local-steps=4
schedule=multistep:milestones=1/2; schedule-unit=epoch schedule=cosine warmup-epochs=1
lr-scaling=sqrt:batch=8; partition=iid:small-shards=true clients=40; validation=8 evaluate-every=2
partition=dirichlet:alpha=5,min-partition-size=1,small-shards=true
partition=inner-dirichlet:alpha=1,partition-sizes=16/16/16/16/16/16
partition=pathological:num-classes-per-partition=4,small-shards=true
partition=shard:num-shards-per-partition=2,shard-size=8
partition=size:partition-sizes=8/8/20/20/20/20
mean=exact:weights=shard-size partition=square:small-shards=true
model=resnet20:norm=gn clients=2 rounds=3; augment=crop+mirror model=lenet5 clients=2 rounds=3
augment=crop+mirror model=lenet-bn clients=2 rounds=3; augment=crop+mirror model=vit-tiny clients=2 rounds=3
augment=crop:size=8+mirror model=resnet18 clients=2 rounds=3
augment=crop:size=8+mirror model=resnet18-v2 clients=2 rounds=3
outer=flwr.serverapp.strategy:FedAdam; outer=flwr.serverapp.strategy:FedMedian
outer=flwr.serverapp.strategy:FedYogi; outer=flwr.serverapp.strategy:Krum
"""
NAMED = {  # methods that have their defaults
    "local-rule": "fedprox scaffold",
    "compress": "fp16 bf16 int8 int4 sign topk randomk qsgd powersgd",
    "compress-down": "fp16 bf16 int8 int4 sign topk randomk qsgd powersgd",
    "outer": "fedavgm slowmo diloco fedadam fedyogi fedadagrad adadelta adafactor adagrad adam adamax adamw asgd nadam "
    "radam rmsprop rprop sgd yogi",
    "mean": "median clipped",
}
LATE, LEFT_OUT, LOST = "late-2-1", "left-out-3-2", "lost-4-0"  # in which round, to which worker
SCENARIOS: dict[str, tuple[str, list[str]]] = {  # keys, and faults
    "whole": ("", []),
    "cut": ("", []),
    "late": ("round-timeout=0.01", [LATE]),
    "left-out": ("", [LEFT_OUT]),
    "lost": ("", [LOST]),
    "sampled": ("fraction=0.5", []),
    "all": ("round-timeout=0.01", [LATE, LEFT_OUT, LOST]),  # and cut
}
# As each Python process starts: the server and the clients of a simulation of Flower import the faults
AT_START = """import sys
if any(name in word for word in sys.orig_argv for name in ("flwr-simulation", "default_worker")):
    import bits_client
    bits_client.install()
"""


class Case(NamedTuple):
    engine: str  # or centralized
    scenario: str
    method: str


def cases(quick: bool, pattern: str) -> Iterator[Case]:
    """The cases of the commit of this process that are asked for."""
    import fedsim

    combined = COMBINED.strip().splitlines()
    every = [*choices(), *entries(METHODS), *combined]
    known = set(inspect.signature(fedsim.centralized).parameters)
    of_quick = (("local", "all"), ("stacked", "whole"), ("centralized", "cut"))
    for engine, scenario in itertools.product(("local", "stacked", "centralized", "flower"), SCENARIOS):
        for number, method in enumerate(combined if engine == "flower" else every):
            case = Case(engine, scenario, method)
            usual = scenario == list(SCENARIOS)[number % 6] if engine == "flower" else scenario != "all"
            chosen = re.search(pattern, "/".join(case)) if pattern else case[:2] in of_quick if quick else usual
            exists = engine != "centralized" or (
                scenario in ("whole", "cut") and spelled(keys_of(method)).keys() <= known
            )
            if chosen and exists:
                yield case


def entries(text: str) -> list[str]:
    return re.split("; |\n", text.strip())


def keys_of(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def choices() -> Iterator[str]:
    """`NAMED`, and each value but the default of each key of a few names, or of true and false, unless in `METHODS`."""
    from fedsim.config import Config

    named = [f"{key}={name}" for key, names in NAMED.items() for name in names.split()]
    yield from named
    explained = [*named, *(method.split()[0] for method in entries(METHODS))]
    for field, info in Config.model_fields.items():
        seams = [each.seam.names for each in info.metadata if hasattr(each, "seam")]
        names = seams[0] if seams else get_args(info.annotation)
        for value in (True, False) if info.annotation is bool else names:
            choice = f"{field.replace('_', '-')}={str(value).lower()}"
            if value != info.default and choice not in explained:
                yield choice


def outcome(case: Case, folder: Path) -> Outcome:
    """What a case leaves in `folder`, or the error that it ends with."""
    import fedsim

    keys, faults = SCENARIOS[case.scenario]
    os.environ[FAULTS] = str(folder / "faults")
    (folder / "faults").mkdir()
    for fault in faults:
        (folder / "faults" / fault).touch()
    run, shape, stop = fedsim.localsgd, LOCALSGD + f"engine={case.engine} ", "stop-after-rounds=3"
    if case.engine == "centralized":
        run, shape, stop = fedsim.centralized, CENTRALIZED, "stop-after-epochs=1"
    asked = keys_of(f"{shape} {case.method} {keys} results-dir={folder} name=run")
    try:
        for part in [stop, ""] if case.scenario in ("cut", "all") else [""]:
            run(**spelled({**asked, **keys_of(part)}), progress=False)
        result = dict(contents(folder / "run"))
    except Exception as error:
        result = {"error/": f"{type(error).__name__}: {error}".replace(str(folder), "")}
    return result | {f"faults/{fault.name}": "it did not happen" for fault in (folder / "faults").iterdir()}


def spelled(keys: dict[str, str]) -> dict[str, Any]:
    """`keys` as the commit of this process spells them: where a later commit spells them differently, say it here."""
    from fedsim.config import Engine

    if keys.get("engine") == "local" and "local" not in get_args(Engine):
        keys = {**keys, "engine": "threads"}
    return {key.replace("-", "_"): value for key, value in keys.items()}


def contents(folder: Path) -> Iterator[tuple[str, str]]:
    """All values in a run's folder, without times and origin."""
    import torch

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts: dict[str, Any] = {
        "model": torch.load(folder / "model.pt", weights_only=True),
        "rows": [{**row, "seconds": 0} for row in rows],
        "summary": json.loads((folder / "summary.json").read_text()),
        "checkpoint": {},
    }
    if (folder / "checkpoint.pt").exists():
        parts["checkpoint"] = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name in (
        "seconds",
        "date",
        "host",
        "commit",
        "command",
        "versions",
        "sha256",
        "engine",
        "groups",
    ):  # the case names its engine
        parts["summary"].pop(name, None)
    for name in ("seconds", "version", "config", "rows_bytes", "rows_sha256", "groups"):
        parts["checkpoint"].pop(name, None)
    yield from flat("", parts)


def flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """The leaves of `value` with their paths, tensors as their type, shape and digest."""
    import torch

    if isinstance(value, list | tuple):
        value = {"length": len(value), **{str(index): held for index, held in enumerate(value)}}
    if isinstance(value, Mapping):
        for name, held in value.items():
            yield from flat(f"{path}/{name}" if path else name, held)
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield path, f"{value.dtype} {list(value.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
    else:
        yield path, repr(value)


def worker(checkout: str, out: str, quick: bool, pattern: str) -> None:
    """Run the cases of the commit in `checkout`, and write what they led to as JSON to `out`."""
    import fedsim.api

    if not Path(fedsim.api.__file__).is_relative_to(checkout):
        sys.exit(f"fedsim is imported from {fedsim.api.__file__}, not from {checkout}")
    importlib.import_module("bits_client").install()
    outcomes = {}
    for case in cases(quick, pattern):
        with tempfile.TemporaryDirectory(prefix="bits-") as folder, open(Path(out).with_name("lock"), "w") as lock:
            if case.engine == "flower":  # one Ray cluster at a time
                fcntl.flock(lock, fcntl.LOCK_EX)
            outcomes["/".join(case)] = outcome(case, Path(folder))
    Path(out).write_text(json.dumps(outcomes))


def difference(old: Outcome, new: Outcome) -> str:
    """The first difference in each part; empty if there is none."""
    first: dict[str, str] = {}
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            first.setdefault(key.partition("/")[0], f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}")
    return "; ".join(first.values())


def without_names(result: Outcome) -> Outcome:
    """`result` with the tensors of its checkpoint as a sorted list for each worker, and one for the server."""
    held: dict[str, list[str]] = {}
    for key, value in result.items():
        if key.startswith("checkpoint/") and value.startswith("torch."):
            held.setdefault(next(filter(str.isdigit, key.split("/")), "server"), []).append(value)
    rest = {key: value for key, value in result.items() if not key.startswith("checkpoint/")}
    return rest | {f"checkpoint/{owner}": sorted(tensors) for owner, tensors in held.items()}


def only(parts: Collection[str], result: Outcome) -> Outcome:
    return {key: value for key, value in result.items() if key.partition("/")[0] in parts}


def checkout_of(commit: str, folder: Path) -> Path:
    if Path(commit).is_dir():
        return Path(commit).resolve()
    root = str(Path(__file__).parents[1])
    digest = subprocess.check_output(["git", "-C", root, "rev-parse", "--verify", f"{commit}^{{commit}}"], text=True)
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", root, str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", "--detach", digest.strip()], check=True)
    return folder


def run_both(commits: list[str], quick: bool, pattern: str, folder: Path) -> list[dict[str, Outcome]]:
    """The outcomes of the cases of two commits, run at the same time in a process each."""
    own = folder / "own"
    own.mkdir()
    shutil.copy(Path(__file__).with_name("bits_client.py"), own)
    (own / "sitecustomize.py").write_text(AT_START)
    running = []
    for number, commit in enumerate(commits):
        checkout, out = checkout_of(commit, folder / str(number)), folder / f"{number}.json"
        env = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{own}", "XDG_CACHE_HOME": f"{out}.cache"}
        env.setdefault("MPLCONFIGDIR", str(Path("~/.cache/matplotlib").expanduser()))  # its list of fonts takes long
        what = json.dumps([str(checkout), str(out), quick, pattern])
        command = [sys.executable, "-P", __file__, "--worker", what]
        with out.with_suffix(".log").open("w") as log:
            running.append((subprocess.Popen(command, cwd=checkout, env=env, stdout=log, stderr=log), out))
    codes = [process.wait() for process, _ in running]
    for (_, out), code in zip(running, codes, strict=True):
        if code:
            sys.exit(out.with_suffix(".log").read_text()[-3000:])
    return [json.loads(out.read_text()) for _, out in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs=2, metavar="COMMIT", help="old and new: commits, or folders of checkouts")
    parser.add_argument("--quick", action="store_true", help="each method once by local and once stacked")
    parser.add_argument("-k", default="", metavar="PATTERN", help="the cases with such names")
    parser.add_argument("--unnamed", action="store_true", help="compare a checkpoint's tensors without their names")
    parser.add_argument("--parts", default=PARTS, metavar="LIST", help=f"what is compared, of {PARTS}")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bits-") as folder:
        old, new = run_both(asked.commits, asked.quick, asked.k, Path(folder))
    if asked.unnamed:
        old, new = ({name: without_names(result) for name, result in each.items()} for each in (old, new))
    compared = ("error", "faults", *asked.parts.split(","))
    old, new = ({name: only(compared, result) for name, result in each.items()} for each in (old, new))
    differ = 0
    for name in {**old, **new}:
        what = "only in OLD" if name not in new else difference(old.get(name, {}), new[name])
        differ += bool(what) and name in old
        print(f"{name}: {what if name in old else 'only in NEW'}\n" if what else "", end="")
    failed = [name for name in old if "error/" in old[name] and name in new]
    print(f"{len(failed)} end with an error: {'  '.join(failed)}")
    print(f"{len({**old, **new})} cases, {differ} differ")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    else:
        main()
