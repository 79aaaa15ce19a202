"""Keys of earlier versions, and how they are written now: for ``fedsim migrate``, and for the error of an old key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from strategies.arguments import CHAIN, split_name, written

RENAMED = {  # former name of a key -> its present one
    "reference-batch": "lr-scaling-batch",
    "scaling": "lr-scaling",
    "decay-on": "decay-biases-and-norms",
    "reshuffle": "shuffle-every",
}
RENAMED_VALUES: dict[tuple[str, Any], Any] = {  # former name of a key and a former value -> its present value
    ("decay-on", "all"): True,
    ("decay-on", "matrices"): False,
    ("batchnorm-at-sync", "worker-0"): "first-worker",
}
MOVED: dict[str, tuple[str, str, tuple[str, ...]]] = {  # former key -> key, argument, names that have it (none: all)
    "crop-size": ("augment", "size", ("crop", "center")),
    "crop-padding": ("augment", "padding", ("crop", "center")),
    "crop-padding-mode": ("augment", "mode", ("crop", "center")),
    "synthetic-classes": ("dataset", "classes", ("synthetic",)),
    "synthetic-images": ("dataset", "images", ("synthetic",)),
    "small-shards": ("partition", "small-shards", ()),
    "client-weights": ("mean", "weights", ("exact", "clipped")),
    "norm": ("model", "norm", ("resnet20", "resnet18", "resnet18-v2")),
    "optimizer-backend": ("optimizer", "backend", ("lars", "lamb")),
    "nesterov": ("optimizer", "nesterov", ("sgdm", "lars")),
    "trust-coefficient": ("optimizer", "trust", ("lars",)),
    "lars-lr-in-momentum": ("optimizer", "lr-in-momentum", ("lars",)),
    "lars-adapt-undecayed": ("optimizer", "adapt-undecayed", ("lars",)),
    "beta1": ("optimizer", "betas", ("lamb",)),
    "beta2": ("optimizer", "betas", ("lamb",)),
    "lamb-bias-correction": ("optimizer", "bias-correction", ("lamb",)),
    "lamb-clamp": ("optimizer", "clamp", ("lamb",)),
    "lamb-adapt-undecayed": ("optimizer", "adapt-undecayed", ("lamb",)),
    "milestones": ("schedule", "milestones", ("multistep",)),
    "gamma": ("schedule", "gamma", ("multistep",)),
    "local-steps-max": ("local-steps-schedule", "max", ("linear", "doubling")),
    "qsr-alpha": ("local-steps-schedule", "alpha", ("qsr",)),
    "switch-epoch": ("local-steps-schedule", "switch-epoch", ("post-local",)),
    "trim": ("mean", "trim", ("trimmed",)),
    "prox-mu": ("local-rule", "mu", ("fedprox",)),
    "batchnorm-images": ("batchnorm-at-sync", "images", ("re-estimated",)),
    "compress-ratio": ("compress", "ratio", ("topk", "randomk")),
    "compress-levels": ("compress", "levels", ("qsgd",)),
    "compress-rank": ("compress", "rank", ("powersgd",)),
}
OTHERS = {  # further former keys -> the key that they belong to now, and an example of its value
    "partition-args": ("partition", "NAME:ARGUMENT=VALUE"),
    "optimizer-args": ("optimizer", "NAME:ARGUMENT=VALUE"),
    "outer-args": ("outer", "NAME:ARGUMENT=VALUE"),
    "strategy": ("outer", "module:Class"),
    "strategy-args": ("outer", "module:Class:ARGUMENT=VALUE"),
    "lr-scaling-batch": ("lr-scaling", "linear:batch=N"),
    "local-steps-table": ("local-steps-schedule", "table:epochs=10/50,steps=1/16"),
    "delay": ("layer", "delay"),
}


def now(key: str) -> str:
    """How a key of an earlier version is written now; empty if it is none."""
    renamed = RENAMED.get(key, key)
    if renamed in MOVED:
        chooser, argument, names = MOVED[renamed]
        return f"--{chooser} {names[0] if names else 'NAME'}:{argument}=VALUE"
    if renamed in OTHERS:
        return "--{} {}".format(*OTHERS[renamed])
    return f"--{renamed}" if renamed != key else ""


def present(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`keys` (of a record, or a part of a study) of any version as they are written now.

    An argument whose method is not chosen among the keys becomes ``KEY.ARGUMENT``; one that the chosen method does not
    have had no effect, and is left out.
    """
    held = {RENAMED.get(key, key): _value(key, value) for key, value in keys.items()}
    _split_arguments(held)
    _combine(held)
    for key, (chooser, argument, names) in MOVED.items():
        if key not in held:
            continue
        value = held.pop(key)
        for each in ("compress", "compress-down") if chooser == "compress" else (chooser,):
            if each in held:
                held[each] = _with(held[each], argument, value, names)
            elif each == chooser:
                held[f"{each}.{argument}"] = value
    order = [_key_now(key) for key in keys]
    return dict(sorted(held.items(), key=lambda item: order.index(item[0].partition(".")[0])))


def _key_now(key: str) -> str:
    """The key that a former one belongs to now."""
    key = RENAMED.get(key, key).partition(".")[0]
    return MOVED[key][0] if key in MOVED else OTHERS.get(key, (key, ""))[0]


def _value(key: str, value: Any) -> Any:
    return _each(value, lambda each: RENAMED_VALUES.get((key, each), each))


def _split_arguments(held: dict[str, Any]) -> None:
    """Move the texts of arguments, such as ``lr=0.7, betas=0.9:0.99``, to what they are arguments of."""
    for key in ("partition", "optimizer", "outer", "strategy"):
        given = held.pop(f"{key}-args", "")
        chooser = "outer" if key == "strategy" else key
        for argument, value in _pairs(given):
            if key in held:
                held[key] = _with(held[key], argument, value, ())
            else:
                held[f"{chooser}.{argument}"] = value


def _pairs(given: Any) -> list[tuple[str, Any]]:
    """The arguments in a text; of a list of texts with one and the same argument, that with a list of values."""
    if isinstance(given, list):
        pairs = [pair for each in given for pair in _pairs(each)]
        return [(pairs[0][0], [_number(value) for _, value in pairs])]
    texts = filter(None, str(given).replace(" ", "").replace(":", "/").split(","))
    return [(name.replace("_", "-"), value) for name, _, value in (text.partition("=") for text in texts)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _combine(held: dict[str, Any]) -> None:
    """Write what several former keys said together, or what was another kind of value."""
    if (strategy := held.pop("strategy", "localsgd")) != "localsgd":
        held["outer"] = strategy
    if "delay" in held:
        held["layer"] = _each(held.pop("delay"), lambda delay: "delay" if delay else "none")
    _combine_scaling(held)
    if "beta1" in held or "beta2" in held:
        held["beta1"] = f"{written(held.pop('beta1', 0.9))}/{written(held.pop('beta2', 0.999))}"
    if "milestones" in held:
        held["milestones"] = _each(held["milestones"], lambda text: str(text).replace(",", "/"))
    if table := held.pop("local-steps-table", ""):
        epochs, steps = zip(*(part.split(":") for part in table.split(",")), strict=True)
        held["local-steps-schedule"] = f"table:epochs={'/'.join(epochs)},steps={'/'.join(steps)}"
    for key in ("milestones", "switch-epoch", "local-steps-max", "qsr-alpha", "crop-size"):
        if held.get(key) in ("", 0):  # it was not given
            del held[key]
    if held.get("augment") == "none" and "crop-size" in held:
        held["augment"] = "center"


def _combine_scaling(held: dict[str, Any]) -> None:
    if "lr-scaling-batch" not in held:
        if held.get("lr-scaling") in ("linear", "sqrt"):  # it had no effect
            held["lr-scaling"] = "none"
        return
    batch, rule = held.pop("lr-scaling-batch"), held.pop("lr-scaling", "linear")
    if isinstance(rule, list):
        held["lr-scaling"] = [f"{each}:batch={batch}" for each in rule]
    else:
        held["lr-scaling"] = _each(batch, lambda number: f"{rule}:batch={number}" if number else "none")


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of a value, or of each in a list."""
    return [change(each) for each in value] if isinstance(value, list) else change(value)


def _with(text: Any, argument: str, value: Any, names: tuple[str, ...]) -> Any:
    """A text of choices with an argument for those of `names`; none: for all."""
    if isinstance(text, list):
        return [_with(each, argument, value, names) for each in text]
    parts = []
    for part in CHAIN.split(text):
        name, pairs = split_name(part)
        if not names or name in names:
            pair = f"{argument}={written(value)}"
            part = f"{name}:{pairs},{pair}" if pairs else f"{name}:{pair}"
        parts.append(part)
    return "+".join(parts)
