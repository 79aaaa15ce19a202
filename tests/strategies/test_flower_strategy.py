"""Flower's strategies in LocalSGD's round: the same as outer optimizers, whatever the order; what can be resumed."""

from __future__ import annotations

import io
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.federation.flower_internals import let_messages_be_made, set_message_id
from strategies.by_name import strategy_factory
from strategies.errors import StrategyFailed
from strategies.flower_strategy import FlowerStrategy, check_state
from strategies.layers import Layers
from strategies.local_sgd import LocalSGD
from strategies.method import Method, ServerRound, State, Tensors
from strategies.object_state import NotPlain, set_state, state_of
from strategies.outer import outer_step
from strategies.sections import split
from strategies.tensor_array import tensor_record, tensors_of

OF_FLOWER, OF_USER = "flwr.serverapp.strategy:", "tests.strategies.user_strategies:"
NODES = {102: 0, 101: 1, 103: 2}  # node -> worker
ROUNDS = 4


@pytest.fixture(autouse=True)
def _identity() -> None:
    let_messages_be_made()


def arrays(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters, a buffer and a counter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (3, 2, 2), "fc.bias": (5,), "scale": (), "buffers/bn.running_var": (3,)}
    values = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    values["buffers/bn.running_var"] = values["buffers/bn.running_var"].abs()
    return {**values, "buffers/bn.num_batches_tracked": torch.tensor(seed)}


def run(strategy: LocalSGD, dtype: torch.dtype = torch.float64, orders: int = 0) -> dict[str, Tensor]:
    """The arrays after some rounds; replies come in an order of the seed `orders`."""
    x, state = tensor_record(arrays(0, dtype)), State()
    for round_ in range(1, ROUNDS + 1):
        request = strategy.request(round_, x, ConfigRecord(), NODES)
        replies = []
        for number, message in enumerate(request.messages):
            set_message_id(message, str(number))
            worker = request.workers[message.metadata.dst_node_id]
            metrics = MetricRecord({"num-examples": 10 + worker, "train-loss": 1.0})
            record = tensor_record(arrays(10 * round_ + worker, dtype))
            replies.append(Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message))
        random.Random(orders).shuffle(replies)
        result = strategy.aggregate(round_, request, replies, state)
        assert result.arrays is not None
        x, state = result.arrays, result.state
    return tensors_of(x)


def of_flower(name: str, **arguments: Any) -> LocalSGD:
    return LocalSGD(workers=NODES, layers=Layers({"outer": FlowerStrategy(strategy_factory(name, **arguments))}))


@pytest.mark.parametrize(
    ("flower", "arguments", "outer", "outer_arguments"),
    [
        ("FedAvg", {}, "none", {}),
        (
            "FedAvgM",
            {"server_learning_rate": 0.8, "server_momentum": 0.6},
            "fedavgm",
            {"lr": 0.8, "momentum": 0.6},
        ),
        ("FedAdagrad", {"eta": 0.2, "tau": 0.01}, "fedadagrad", {"lr": 0.2, "eps": 0.01}),
        ("FedYogi", {"eta": 0.2, "beta_2": 0.9}, "fedyogi", {"lr": 0.2, "betas": (0.9, 0.9)}),
    ],
)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_an_outer_optimizer_is_flowers_strategy(
    flower: str,
    arguments: dict[str, Any],
    outer: str,
    outer_arguments: dict[str, Any],
    dtype: torch.dtype,
    rounding: float,
) -> None:
    theirs = run(of_flower(OF_FLOWER + flower, **arguments), dtype)
    ours = run(LocalSGD(workers=NODES, layers=Layers({"outer": outer_step(outer, **outer_arguments)})), dtype)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=rounding)
        assert torch.equal(theirs[name], value) or not name.startswith("buffers/")


def test_flowers_fedadam_corrects_by_one_round_too_many() -> None:
    """Its factor in round t is Kingma's of t + 1, which makes the first step 0.742 eta long instead of eta."""
    eta, betas = 0.1, (0.9, 0.99)

    class OffByOne(Method):
        def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
            lr = eta * (1 - betas[1] ** (r.round + 1)) ** 0.5 / (1 - betas[0] ** (r.round + 1))
            return outer_step("fedadam", lr=lr).update(r, state, mean)

    theirs = split(run(of_flower(OF_FLOWER + "FedAdam", eta=eta))).parameters
    for name, value in split(run(LocalSGD(workers=NODES, layers=Layers({"outer": OffByOne()})))).parameters.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-14)

    one = {"x": torch.zeros(3, dtype=torch.float64)}
    mean = {"x": torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)}
    corrected, _ = outer_step("fedadam", lr=eta, eps=1e-12, bias_correction=True)(one, mean, {}, 0.0)
    torch.testing.assert_close(corrected["x"].abs(), torch.full_like(one["x"], eta))
    off_by_one = eta * (1 - betas[1] ** 2) ** 0.5 / (1 - betas[0] ** 2)
    plain, _ = outer_step("fedadam", lr=off_by_one, eps=1e-12)(one, mean, {}, 0.0)
    torch.testing.assert_close(plain["x"].abs(), torch.full_like(one["x"], 0.742 * eta), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [OF_FLOWER + "FedAdam", OF_FLOWER + "FedMedian", OF_USER + "SlowMo"])
def test_replies_in_another_order_are_the_same_bits(name: str) -> None:
    one, other = run(of_flower(name)), run(of_flower(name), orders=2)
    assert all(torch.equal(value, other[n]) for n, value in one.items())


def test_counters_stay_counters_and_the_precision_is_the_models() -> None:
    """Flower's own FedAdam returns float64 for float32, and averages counters."""
    after = run(of_flower(OF_FLOWER + "FedAdam"), torch.float32)
    assert after["fc.bias"].dtype == torch.float32
    assert after["buffers/bn.num_batches_tracked"].equal(torch.tensor(10 * ROUNDS + 2))


def test_random_numbers_are_those_of_the_seed_and_the_round() -> None:
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    one, other = run(of_flower(OF_USER + "GlobalNoise")), run(of_flower(OF_USER + "GlobalNoise"))
    assert all(torch.equal(value, other[n]) for n, value in one.items())
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((OF_FLOWER + n, {}) for n in ("FedAvg", "FedAdam", "FedYogi", "FedAdagrad", "FedMedian", "Krum", "Bulyan")),
        (OF_FLOWER + "FedAvgM", {"server_momentum": 0.9}),
        (OF_FLOWER + "QFedAvg", {"client_learning_rate": 0.1}),
        (OF_USER + "SlowMo", {"beta": 0.7}),
        (OF_USER + "GlobalNoise", {}),
        (OF_USER + "OwnGenerator", {}),
    ],
)
def test_a_strategy_with_its_state_in_its_attributes_can_be_resumed(name: str, arguments: dict[str, Any]) -> None:
    parameters = split(arrays(0, torch.float32)).parameters
    check_state(strategy_factory(name, **arguments), parameters, workers=4, seed=0)


@pytest.mark.parametrize(
    ("name", "workers", "words"),
    [
        (OF_FLOWER + "FedProx", 4, "it sets proximal-mu for the clients, which follow the keys of the run alone"),
        (OF_FLOWER + "FedXgbCyclic", 4, "it sends to other clients than those of the round"),
        (OF_FLOWER + "FedXgbBagging", 4, "it failed .InconsistentMessageReplies: Expected exactly one Array"),
        (OF_FLOWER + "Bulyan", 2, "it made no model of 2 updates"),
        (OF_USER + "SetsTheRate", 4, "it sets lr for the clients"),
        (OF_USER + "SendsOtherArrays", 4, "it sends other arrays than the model"),
        (OF_USER + "Waits", 1, "it waits for more clients than a round has"),
        (OF_USER + "Wrapper", 4, "it cannot be saved: its attribute inner holds a FedAdam: keep arrays and numbers"),
        (OF_USER + "InModule", 4, "a resumed run would differ: it depends on more than its attributes"),
    ],
)
def test_what_does_not_fit_the_round_fails_in_one_line(
    name: str, workers: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda seconds: None)
    parameters = split(arrays(0, torch.float32)).parameters
    with pytest.raises(StrategyFailed, match=f"^round 1: {words}") as caught:
        check_state(strategy_factory(name), parameters, workers, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        (OF_FLOWER + "FedAdm", {}, "has no FedAdm .did you mean FedAdam"),
        ("flwr.serverapp.stategy:FedAdam", {}, r"there is no module flwr.serverapp.stategy \(did you mean strategy"),
        ("no_such_module:A", {}, "there is no module no_such_module: install it where the server runs"),
        ("flwr.server.strategy:FedAdam", {}, "it is not a strategy of flwr.serverapp.strategy"),
        (OF_USER + "OwnLoop", {}, "it overrides the method start"),
        (OF_FLOWER + "FedAdam", {"etta": 1.0}, "it cannot be made .TypeError: .* argument 'etta'"),
        (OF_FLOWER + "FedTrimmedAvg", {"beta": 0.9}, "it cannot be made .ValueError: `beta` must be in"),
        (OF_FLOWER + "QFedAvg", {}, "it cannot be made .TypeError: .* argument: 'client_learning_rate'"),
    ],
)
def test_a_name_or_an_argument_that_is_wrong_is_a_line_with_the_nearest_right_one(
    name: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        strategy_factory(name, **arguments)
    assert "\n" not in str(caught.value)


class Anything:
    array: Any
    record: Any
    ordered: Any
    rng: Any

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def test_attributes_come_back_from_a_checkpoint_as_they_were_and_share_nothing() -> None:
    held: dict[str, Any] = {
        "numbers": [1, 2.5, True, None, "text", b"bytes", (3, {4})],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "point": np.array(2, np.int64),
        "scalar": np.float64(0.1),
        "ordered": OrderedDict([(1, torch.ones(2)), ("b", {"c": np.bool_(True)})]),
        "record": ArrayRecord([np.eye(2)]),
        "metrics": MetricRecord({"loss": 0.5, "each": [1, 2]}),
    }
    generator = np.random.default_rng(5)
    generator.random()
    one = Anything(**held, rng=generator, function=len, method=Anything.__init__)
    file = io.BytesIO()
    torch.save(state_of(one, vars(one)), file)
    file.seek(0)
    state, other = torch.load(file, weights_only=True), Anything()
    set_state(other, state)
    for name, value in held.items():
        back = getattr(other, name)
        assert type(back) is type(value)
        assert repr(back) == repr(value) or name == "record"
    assert other.record["0"].numpy().tolist() == [[1, 0], [0, 1]]
    assert other.rng.random() == generator.random()
    other.array += 1
    other.record["0"].numpy()[:] = 7
    other.ordered[1].zero_()
    again = Anything()
    set_state(again, state)
    assert again.array.tolist() == held["array"].tolist()
    assert again.record["0"].numpy().tolist() == [[1, 0], [0, 1]]
    assert again.ordered[1].tolist() == [1, 1]


@pytest.mark.parametrize("value", [object(), np.array([object()]), np.array(["text"]), [random.Random(0)], print])
def test_what_is_not_plain_is_named(value: object) -> None:
    with pytest.raises(NotPlain, match="its attribute spam holds a "):
        state_of(Anything(spam=value), {})
