"""What a run in this process survives: clients that fail, lie, or forget; who is averaged and who begins anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import RunFailed, UserError
from fedsim.federation import client_app
from fedsim.federation.client_state import MemoryLost, keep_memory, memory_after, restore_memory
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.protocol import MEMORY_LOST
from fedsim.federation.server_app import train_localsgd
from fedsim.records import Run
from tests.conftest import Execute, assert_same_bits, final_model, rows_of

Fault = Callable[[Message, Context], Message | None]  # a reply in place of the client's own, or None


def answer(message: Message, context: Context) -> Message:
    return client_app.train(message, context)


def faulty(fault: Fault, state: Callable[[Message, Context], Message] = client_app.memory) -> ClientApp:
    """fedsim's client, but for the replies that `fault` makes, and for `state`."""
    app = ClientApp()
    app.query("partition")(client_app.partition)
    app.query("memory")(state)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return fault(message, context) or answer(message, context)

    return app


def run_with(fault: Fault, config: Config) -> Run:
    config = resolve(config, "localsgd")
    run = Run(config, "localsgd")
    with InProcessGrid(faulty(fault), config) as grid:
        train_localsgd(grid, config, run)
    return run


def place(message: Message, context: Context) -> tuple[int, int]:
    """The round of a message, and the worker that it is for."""
    return int(message.content.config_records["config"]["server-round"]), int(context.node_config["partition-id"])  # type: ignore[arg-type]


def once(round: int, worker: int, what: Callable[[Message, Context], Message | None]) -> Fault:
    """`what` happens to one worker in one round, the first time that it is asked."""
    happened: list[bool] = []

    def fault(message: Message, context: Context) -> Message | None:
        if place(message, context) != (round, worker) or happened:
            return None
        happened.append(True)
        return what(message, context)

    return fault


def fail(message: Message, context: Context) -> Message:
    raise OSError("no space left on device")


def forget(message: Message, context: Context) -> None:
    """As a node does that is started again."""
    context.state.clear()


def test_a_client_that_fails_is_left_out_and_named_in_the_row(small: Config, caplog: pytest.LogCaptureFixture) -> None:
    def fault(message: Message, context: Context) -> Message | None:
        worker = place(message, context)[1]
        if worker == 2:
            fail(message, context)
        reply = answer(message, context)
        if worker == 1:
            state = reply.content.array_records["arrays"].to_torch_state_dict()
            state["fc3.bias"][0] = torch.nan
            reply.content["arrays"] = ArrayRecord(state)
        return reply

    run = run_with(fault, small.changed({"name": "hostile"}))
    for row in rows_of(run):
        assert row["left_out"] == {
            "1": "fc3.bias is not finite",
            "2": "its client failed (OSError: no space left on device)",
        }
        assert row["bytes_up"] == row["bytes_down"] // 2
    assert all(value.isfinite().all() for value in final_model(run).values())
    assert "round 3: worker 1 is left out of the average: fc3.bias is not finite" in caplog.text


def test_a_client_with_absurd_examples_or_no_loss_does_not_move_the_model(small: Config) -> None:
    def absurd(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        round, worker = place(message, context)
        if worker == 3:
            examples = [-1, 0, float("nan"), 1e30, 33, 32, 1, 1][round - 1]
            loss = {"train-loss": 1.0} if round not in (6, 7) else {"train-loss": float("inf")} if round == 6 else {}
            reply.content["metrics"] = MetricRecord({"num-examples": examples, **loss})
        return reply

    lying = run_with(absurd, small.changed({"name": "lying", "rounds": 7}))
    away = run_with(
        lambda message, context: fail(message, context) if place(message, context)[1] == 3 else None,
        small.changed({"name": "away", "rounds": 7}),
    )
    assert_same_bits(final_model(lying), final_model(away))
    assert [row["left_out"]["3"] for row in rows_of(lying)] == [
        "num-examples is -1",
        "num-examples is 0",
        "num-examples is nan",
        "num-examples is 1e+30",
        "num-examples is 33",
        "train-loss is inf",
        "train-loss is None",
    ]


def test_a_round_that_too_few_answer_is_taken_again_bitwise(run: Execute, small: Config) -> None:
    """The clients that did answer begin it a second time from the momentum before it."""
    whole = run(name="whole")
    again = run_with(once(3, 1, fail), small.changed({"name": "again", "min-clients": 4}))
    assert_same_bits(final_model(again), final_model(whole))
    assert rows_of(again) == rows_of(whole)


@pytest.mark.parametrize("checkpoint_every", [2, 10])
def test_a_client_that_lost_its_momentum_sends_all_back_to_the_checkpoint(
    run: Execute, small: Config, checkpoint_every: int
) -> None:
    whole = run(name="whole")
    keys = {"name": "lost", "min-clients": 4, "checkpoint-every": checkpoint_every}
    lost = run_with(once(6, 2, forget), small.changed(keys))
    assert_same_bits(final_model(lost), final_model(whole))
    assert rows_of(lost) == rows_of(whole)


def test_where_others_are_enough_it_is_left_out_and_begins_anew(run: Execute, small: Config) -> None:
    whole = run(name="whole")
    lost = run_with(once(6, 2, forget), small.changed({"name": "lost"}))
    rows = rows_of(lost)
    assert [row["left_out"] for row in rows] == [{}] * 5 + [{"2": MEMORY_LOST}] + [{}] * 2
    assert rows[:5] == rows_of(whole)[:5]


def test_a_worker_that_was_left_out_goes_on_from_its_last_update_that_counted(small: Config) -> None:
    """Its update of round 3 never counts, whether it is refused or not made: the momentum is that after round 2."""

    def refused(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        reply.content["metrics"] = MetricRecord({"num-examples": -1})
        return reply

    runs = [run_with(once(3, 1, what), small.changed({"name": name})) for name, what in (("r", refused), ("f", fail))]
    assert_same_bits(*map(final_model, runs))


def test_too_few_clients_end_the_run_as_failed_and_keep_its_checkpoint(run: Execute, small: Config) -> None:
    keys = {"name": "few", "min-clients": 3, "checkpoint-every": 2}

    def fault(message: Message, context: Context) -> Message | None:
        round, worker = place(message, context)
        return fail(message, context) if round >= 4 and worker >= 2 else None

    with pytest.raises(RunFailed, match=r"round 4: too few usable updates: worker 2: .*; tried 3 times"):
        run_with(fault, small.changed(keys))
    few = run(name="few", min_clients=3)
    assert_same_bits(final_model(few), final_model(run(name="whole")))


def test_all_clients_failing_ends_the_run_as_failed(small: Config) -> None:
    with pytest.raises(RunFailed, match=r"round 1: too few usable updates: worker 0: its client failed .*; and 1 more"):
        run_with(fail, small.changed({"name": "hopeless"}))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_state_that_is_no_state_is_not_saved(small: Config, run: Execute, fraction: float) -> None:
    """Worker 1 hands out nonsense for the checkpoint, with its update or when asked; resumed, it begins anew."""
    keys = {"stop-after-rounds": 4, "fraction": fraction}
    config = resolve(small.changed({"name": "nonsense", **keys}), "localsgd")

    def nonsense(reply: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 1 and "memory" in reply.content:
            reply.content["memory"] = ArrayRecord({"spam": torch.zeros(3)})
        return reply

    app = faulty(
        lambda message, context: nonsense(answer(message, context), context),
        lambda message, context: nonsense(client_app.memory(message, context), context),
    )
    result = Run(config, "localsgd")
    with InProcessGrid(app, config) as grid:
        train_localsgd(grid, config, result)
    saved = torch.load(result.folder / "checkpoint.pt", weights_only=True)
    whole = torch.load(run(name="whole", **keys).folder / "checkpoint.pt", weights_only=True)
    assert whole["last_aggregated_round"][1] > 0
    assert saved["last_aggregated_round"] == [
        0 if worker == 1 else round for worker, round in enumerate(whole["last_aggregated_round"])
    ]
    assert sorted(saved["memories"]) == [0, 2, 3]
    assert run(name="nonsense", fraction=fraction).finished


def test_more_clients_asked_for_than_a_round_has_is_an_error(run: Execute) -> None:
    with pytest.raises(UserError, match="min-clients = 5 is more than the 4 clients of a round"):
        run(min_clients=5)
    with pytest.raises(UserError, match="min-clients = 3 is more than the 2 clients of a round"):
        run(min_clients=3, fraction=0.5)


def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def _state(value: float) -> ArrayRecord:
    return ArrayRecord({"m": torch.tensor([value])})


def _value(record: ArrayRecord) -> Any:
    return record["m"].numpy().tolist()[0]


def test_a_client_keeps_the_state_after_its_last_round_and_the_one_before() -> None:
    client = context()
    assert len(memory_after(client, 0)) == 0
    keep_memory(client, _state(1), 1, started_after=0)
    keep_memory(client, _state(2), 2, started_after=1)
    assert (_value(memory_after(client, 2)), _value(memory_after(client, 1))) == (2, 1)
    keep_memory(client, _state(2.5), 2, started_after=1)  # taken again
    assert (_value(memory_after(client, 2)), _value(memory_after(client, 1))) == (2.5, 1)
    keep_memory(client, _state(5), 5, started_after=2)  # not sampled in between
    with pytest.raises(MemoryLost, match="after round 1 is not kept"):
        memory_after(client, 1)
    restore_memory(client, _state(9), 3)
    assert _value(memory_after(client, 3)) == 9
    with pytest.raises(MemoryLost):
        memory_after(client, 5)
