"""What a run in this process survives: clients that fail, lie, or forget; who is averaged and who starts again."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.config import Config
from fedsim.device import resolve
from fedsim.errors import RunFailed, RunInProgress, UserError
from fedsim.experiments.execute import execute
from fedsim.federation import client_app, lengthen, resources, server_app
from fedsim.federation.client_state import MemoryLost, keep_memory, memory_after, restore_memory
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.protocol import MEMORY, MEMORY_LOST
from fedsim.federation.resources import check_memory
from fedsim.federation.server_app import train_localsgd
from fedsim.runs.records import read_rows, read_summary
from fedsim.runs.run import Run
from fedsim.runs.shown import outcome_line
from fedsim.training.stacked import StackedWorkers
from strategies.method import Method, ServerRound, State, Tensors
from tests.conftest import SMALL_BATCHNORM, Execute, assert_same_bits, final_model, rows_of

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


def run_with(fault: Fault, config: Config, grid_type: type[InProcessGrid] = InProcessGrid) -> Run:
    config = resolve(config, "localsgd")
    run = Run(config, "localsgd")
    with grid_type(faulty(fault), config) as grid:
        train_localsgd(grid, config, run)
    return run


def round_of(message: Message) -> int:
    return int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]


def place(message: Message, context: Context) -> tuple[int, int]:
    """The round of a message, and the worker that it is for."""
    return round_of(message), int(context.node_config["partition-id"])


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

    run = run_with(fault, small.changed({"name": "hostile", "min-clients": 1}))
    for row in rows_of(run):
        assert row["left_out"] == {
            "1": "fc3.bias is not finite",
            "2": "its client failed (OSError: no space left on device)",
        }
        assert row["bytes_up"] == row["bytes_down"] // 2
        assert row["updates_left_out"] == 2 * row["round"]
    summary = read_summary(run.folder)
    assert summary
    assert outcome_line(summary).endswith("; 16 updates left out, see left_out in metrics.jsonl")
    assert all(value.isfinite().all() for value in final_model(run).values())
    assert "round 3: worker 1 is left out of the average: fc3.bias is not finite" in caplog.text


@pytest.mark.parametrize(("keys", "ends"), [({}, 6), ({"max-failures": 2}, 2), ({"min-clients": 3}, 0)])
def test_a_client_that_fails_too_often_in_a_row_ends_the_run(small: Config, keys: dict[str, Any], ends: int) -> None:
    """Worker 1 fails in each round but the third. A run that is cut counts on when it is resumed."""

    def fault(message: Message, context: Context) -> Message | None:
        round, worker = place(message, context)
        return fail(message, context) if worker == 1 and round != 3 else None

    config = small.changed({"name": "ends", **keys})
    run_with(fault, config.changed({"stop-after-rounds": max(1, ends - 1)}))
    if not ends:
        assert rows_of(run_with(fault, config))[-1]["updates_left_out"] == 7
        return
    with pytest.raises(
        RunFailed, match=rf"^round {ends}: worker 1 has failed {config.failures_to_end} times in a row: its client"
    ):
        run_with(fault, config)
    assert len(read_rows(Path(config.results_dir) / "ends")) == ends - 1


def test_a_client_with_absurd_examples_or_no_loss_does_not_move_the_model(small: Config) -> None:
    def absurd(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        round, worker = place(message, context)
        if worker == 3:
            examples = [-1, 0, float("nan"), 1e30, 9, 7, 8, 8, 8][round - 1]
            loss = {7: {"train-loss": float("inf")}, 8: {}, 9: {"train-loss": -0.1}}.get(round, {"train-loss": 1.0})
            reply.content["metrics"] = MetricRecord({"num-examples": examples, **loss})
        return reply

    lying = run_with(absurd, small.changed({"name": "lying", "rounds": 9}))
    away = run_with(
        lambda message, context: fail(message, context) if place(message, context)[1] == 3 else None,
        small.changed({"name": "away", "rounds": 9, "min-clients": 1}),
    )
    assert_same_bits(final_model(lying), final_model(away))
    assert [row["left_out"]["3"] for row in rows_of(lying)] == [
        "num-examples is -1",
        "num-examples is 0",
        "num-examples is nan",
        "num-examples is 1e+30",
        "num-examples is 9",
        "num-examples is 7",
        "train-loss is inf",
        "train-loss is None",
        "train-loss is -0.1",
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


def test_a_client_that_loses_its_momentum_twice_a_round_costs_three_times_the_rounds(
    run: Execute, small: Config
) -> None:
    """Not all rounds since the last checkpoint, each time."""
    keys = {"rounds": 7, "min-clients": 4}
    whole = run(name="whole", **keys)
    lost, trained = Counter[int](), Counter[int]()

    def forgetful(message: Message, context: Context) -> None:
        round, worker = place(message, context)
        trained[worker] += 1
        if worker == 1 and round > 1 and lost[round] < 2:
            lost[round] += 1
            forget(message, context)

    often = run_with(forgetful, small.changed({"name": "often", **keys}))
    assert_same_bits(final_model(often), final_model(whole))
    assert rows_of(often) == rows_of(whole)
    assert trained == dict.fromkeys(range(4), 3 * 7)  # round 1 is repeated for round 2, which is then saved


class Claimed(InProcessGrid):
    """From the second round on, a node that claims the shard of worker 1 is connected too."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        assert all(message.metadata.message_type != "train" for message in messages if self.claims(message))
        assert not any(MEMORY in message.content for message in messages if self.claims(message))
        ids = super().push_messages(messages)
        if messages and messages[0].metadata.message_type == "train":
            own = self._contexts[3]
            assert own.node_config["partition-id"] == 1
            self._contexts.setdefault(1, Context(1, 1, own.node_config, RecordDict(), own.run_config))
        return ids

    def claims(self, message: Message) -> bool:
        return message.metadata.dst_node_id == 1


def test_a_node_that_claims_the_shard_of_another_gets_neither_its_rounds_nor_its_memory(
    run: Execute, small: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where memories are handed back either."""
    whole = run(name="whole")
    config = small.changed({"name": "claimed", "min-clients": 4})
    claimed = run_with(once(6, 2, forget), config, Claimed)
    assert_same_bits(final_model(claimed), final_model(whole))
    assert rows_of(claimed) == rows_of(whole)
    assert "node 1 is left out: its partition-id 1 is that of another node" in capsys.readouterr().out


def test_where_others_are_enough_it_is_left_out_and_begins_anew(run: Execute, small: Config) -> None:
    whole = run(name="whole")
    lost = run_with(once(6, 2, forget), small.changed({"name": "lost"}))
    rows = rows_of(lost)
    assert [row["left_out"] for row in rows] == [{}] * 5 + [{"2": MEMORY_LOST}] + [{}] * 2
    assert rows[:5] == rows_of(whole)[:5]


def test_a_worker_that_was_left_out_goes_on_from_its_last_update_that_counted(small: Config) -> None:
    """Its update of round 3 never counts, whether it is refused or not made: the momentum is that after round 2."""
    runs = [run_with(once(3, 1, what), small.changed({"name": name})) for name, what in (("r", refused), ("f", fail))]
    assert_same_bits(*map(final_model, runs))


def test_too_few_clients_end_the_run_as_failed_and_keep_its_checkpoint(run: Execute, small: Config) -> None:
    keys = {"name": "few", "min-clients": 3, "checkpoint-every": 2}

    def fault(message: Message, context: Context) -> Message | None:
        round, worker = place(message, context)
        return fail(message, context) if round >= 4 and worker >= 2 else None

    with pytest.raises(
        RunFailed, match=r"round 4: too few usable updates: worker 2: .*; tried 3 times; the same command resumes"
    ):
        run_with(fault, small.changed(keys))
    few = run(**keys)
    assert_same_bits(final_model(few), final_model(run(name="whole")))
    row = read_rows(few.folder)[-1]  # it counts what was sent before it failed
    assert row["bytes_down"] / UPDATE == 8 * 4
    # Round 3, which was repeated, and the momentum of round 2 handed back
    assert row["overhead_bytes_down"] / UPDATE == 2 * 4


def test_all_clients_failing_ends_the_run_as_failed(small: Config) -> None:
    with pytest.raises(RunFailed, match=r"round 1: too few usable updates: worker 0: its client failed .*; and 1 more"):
        run_with(fail, small.changed({"name": "hopeless"}))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_state_that_is_no_state_is_not_saved(small: Config, run: Execute, fraction: float) -> None:
    """Worker 1 sends nonsense for the checkpoint, with its update or when asked; on resume it has no memory."""
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


UPDATE = 62_006 * 4  # bytes of a model of lenet5 for ten classes, and of its momentum


def nothing(message: Message, context: Context) -> None:
    """No fault."""


def refused(message: Message, context: Context) -> Message:
    reply = answer(message, context)
    reply.content["metrics"] = MetricRecord({"num-examples": -1})
    return reply


@pytest.mark.parametrize(
    ("fault", "keys", "up", "down", "overhead_up", "overhead_down"),
    [
        # 8 rounds of 4 clients; the last one has a checkpoint, with the momentum of each
        (nothing, {}, 32, 32, 4, 0),
        (nothing, {"momentum-at-sync": "reset"}, 32, 32, 0, 0),
        (nothing, {"checkpoint-every": 2}, 32, 32, 16, 0),
        (once(3, 1, refused), {}, 31, 32, 5, 0),
        (once(3, 1, fail), {}, 31, 32, 4, 0),
        # the round is repeated: 3 updates and 4 messages more
        (once(3, 1, fail), {"min-clients": 4}, 32, 32, 7, 4),
        # Round 6 has 3 updates, each with its momentum; all go back to round 4, with their momentum of then
        (once(6, 2, forget), {"min-clients": 4, "checkpoint-every": 2}, 32, 32, 26, 12),
    ],
)
def test_every_array_that_is_sent_is_counted_as_the_method_s_or_besides(
    small: Config, fault: Fault, keys: dict[str, Any], up: int, down: int, overhead_up: int, overhead_down: int
) -> None:
    run = run_with(fault, small.changed({"name": "counted", **keys}))
    row = read_rows(run.folder)[-1]
    names = ("bytes_up", "bytes_down", "overhead_bytes_up", "overhead_bytes_down")
    assert [row[name] / UPDATE for name in names] == [up, down, overhead_up, overhead_down]


def test_a_late_update_is_fetched_counted_and_changes_nothing(small: Config, run: Execute) -> None:
    class Late(InProcessGrid):
        """The first reply of each round but the last comes after its round."""

        held: tuple[str, ...] = ()

        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            messages = list(messages)
            ids = list(super().push_messages(messages))
            if messages and messages[0].metadata.message_type == "train" and round_of(messages[0]) < 8:
                self.held = (ids[0],)
            else:
                self.held = ()
            return ids

        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return list(super().pull_messages(set(message_ids) - set(self.held)))

    late = run_with(nothing, small.changed({"name": "late", "round-timeout": 0.01}), Late)
    away = run_with(
        lambda message, context: (
            fail(message, context) if place(message, context) < (8, 0) and not place(message, context)[1] else None
        ),
        small.changed({"name": "away", "min-clients": 1}),
    )
    assert_same_bits(final_model(late), final_model(away))
    row = read_rows(late.folder)[-1]
    assert row["left_out"] == {}
    assert (row["bytes_up"] / UPDATE, row["overhead_bytes_up"] / UPDATE) == (25, 7 + 4)


def test_the_loss_of_a_row_is_over_the_samples_of_its_rounds(small: Config) -> None:
    """Three rounds of 4, 3 and 4 clients."""
    by_round, by_epoch = (
        run_with(once(2, 1, refused), small.changed({"name": unit, "local-steps": 3, "record-by": unit}))
        for unit in ("round", "epoch")
    )
    losses = [row["train_loss"] for row in rows_of(by_round)]
    expected = (4 * losses[0] + 3 * losses[1] + 4 * losses[2]) / 11
    assert rows_of(by_epoch)[0]["train_loss"] == pytest.approx(expected, rel=1e-12)
    assert rows_of(by_epoch)[0]["train_loss"] != pytest.approx(sum(losses[:3]) / 3, rel=1e-7)


def test_a_server_step_out_of_the_domain_ends_the_run_as_failed(small: Config) -> None:
    def far(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        state = reply.content.array_records["arrays"].to_torch_state_dict()
        state["fc3.bias"][0] = 1e14
        reply.content["arrays"] = ArrayRecord(state)
        return reply

    with pytest.raises(RunFailed, match=r"round 1: the average of fc3\.bias is above 1e15"):
        run_with(far, small.changed({"name": "far", "outer": "sgd:lr=100"}))


def test_a_negative_variance_never_reaches_the_model(small: Config) -> None:
    def negative(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        state = reply.content.array_records["arrays"].to_torch_state_dict()
        state["buffers/bn1.running_var"] -= 1e6
        reply.content["arrays"] = ArrayRecord(state)
        return reply

    run = run_with(once(2, 1, negative), small.changed({"name": "negative", "model": SMALL_BATCHNORM, "rounds": 3}))
    assert [row["left_out"] for row in rows_of(run)] == [{}, {"1": "buffers/bn1.running_var is negative"}, {}]
    assert all(row["test_loss"] is not None for row in rows_of(run))


def test_values_outside_their_domains_never_reach_the_model(small: Config, run: Execute) -> None:
    """One in each round, from worker 1; its honest self then resumes the run."""
    tampered: list[tuple[str, float, str]] = [
        ("extras/momentum/fc3.bias/exp_avg_sq", -1e-9, "negative"),
        ("extras/momentum/fc3.bias/step", -1e9, "not between 0 and 4"),
        ("extras/momentum/fc3.bias/step", 7, "not between 0 and 6"),
        ("buffers/bn1.num_batches_tracked", 2**63 - 1, "above 1e15"),
        ("buffers/bn1.num_batches_tracked", 10**12, "not between 0 and 10000"),
        ("buffers/bn1.running_mean", 3e38, "above 1e15"),
        ("fc3.weight", -2e15, "above 1e15"),
    ]

    def fault(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        round_, worker = place(message, context)
        if worker == 1:
            name, value, _ = tampered[round_ - 1]
            state = reply.content.array_records["arrays"].to_torch_state_dict()
            state[name].fill_(value)
            reply.content["arrays"] = ArrayRecord(state)
        return reply

    keys = {
        "model": SMALL_BATCHNORM,
        "optimizer": "adam",
        "momentum-at-sync": "average",
        "rounds": 9,
        "checkpoint-every": 1,
    }
    keys |= {"dataset.images": 64, "batch-size": 4, "evaluate-every": 9}
    run_with(fault, small.changed({"name": "domains", "stop-after-rounds": len(tampered), **keys}))
    rows = rows_of(run(name="domains", **keys))
    reasons = [{"1": f"{name} is {what}"} for name, _, what in tampered]
    assert [row["left_out"] for row in rows] == [*reasons, {}, {}]
    assert rows[-1]["test_loss"] is not None


def test_where_no_client_can_train_from_the_last_checkpoint_the_one_before_is_used(small: Config, run: Execute) -> None:
    """Weights of 1e14 from one client are in their domain, but every step from their mean is not finite."""

    def fault(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        if place(message, context) == (4, 1):
            state = reply.content.array_records["arrays"].to_torch_state_dict()
            reply.content["arrays"] = ArrayRecord({name: value.fill_(1e14) for name, value in state.items()})
        return reply

    keys = {"checkpoint-every": 2, "rounds": 6, "evaluate-every": 6}  # a test would end it before round 5
    with pytest.raises(
        RunFailed, match=r"^round 5: too few usable updates: .*; tried 3 times; the same command resumes from the"
    ):
        run_with(fault, small.changed({"name": "back", **keys}))
    assert_same_bits(final_model(run(name="back", **keys)), final_model(run(name="whole", **keys)))


def test_a_run_whose_checkpoints_both_lead_to_no_update_starts_again(small: Config, run: Execute) -> None:
    """BatchNorm still takes the weights that momentum of 9e14 makes in round 3, which is saved; round 4 does not."""

    def fault(message: Message, context: Context) -> Message:
        reply = answer(message, context)
        if place(message, context) == (2, 1):
            state = reply.content.array_records["arrays"].to_torch_state_dict()
            far = {name: value.fill_(9e14) for name, value in state.items() if name.endswith("exp_avg")}
            reply.content["arrays"] = ArrayRecord({**state, **far})
        return reply

    keys = {"optimizer": "adam", "momentum-at-sync": "average", "rounds": 5, "checkpoint-every": 1, "local-steps": 1}
    keys |= {"model": SMALL_BATCHNORM, "dataset.images": 32, "optimizer.eps": "1.0", "batch-size": 4}
    keys |= {"evaluate-every": 5}  # a test would end it before the checkpoint of round 3
    with pytest.raises(RunFailed, match=r"^round 4: too few usable updates"):
        run_with(fault, small.changed({"name": "back", **keys}))
    with pytest.raises(RunFailed, match=r"^round 4: too few usable updates"):
        run(name="back", **keys)
    assert_same_bits(final_model(run(name="back", **keys)), final_model(run(name="whole", **keys)))


def test_the_order_of_replies_changes_nothing_that_is_written(small: Config) -> None:
    class Reversed(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return list(super().pull_messages(sorted(message_ids, key=int, reverse=True)))

    class Forward(InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            return list(super().pull_messages(sorted(message_ids, key=int)))

    def fault(message: Message, context: Context) -> Message | None:
        return fail(message, context) if place(message, context)[1] in (1, 2) else None

    config = small.changed({"clients": 8, "min-clients": 1})
    one, other = (run_with(fault, config.changed({"name": g.__name__}), g) for g in (Forward, Reversed))
    assert [list(row.items()) for row in rows_of(one)] == [list(row.items()) for row in rows_of(other)]
    assert [list(row["left_out"]) for row in rows_of(other)] == [["1", "2"]] * len(rows_of(other))
    checkpoints = [torch.load(run.folder / "checkpoint.pt", weights_only=True) for run in (one, other)]
    assert list(checkpoints[0]["memories"]) == list(checkpoints[1]["memories"]) == list(range(8))
    assert_same_bits(final_model(one), final_model(other))


@dataclass(frozen=True)
class OuterMomentum(Method):
    """Outer SGD with momentum on the pseudo-gradient, as FedAvgM does."""

    def update(self, r: ServerRound, state: State, mean: Tensors) -> State:
        assert state.get("rounds", 0) == r.round - 1
        assert not any("num_batches_tracked" in name or name.startswith(("buffers/", "extras/")) for name in r.x)
        velocity = {name: 0.5 * state.get(f"velocity/{name}", 0) + (x - r.next_x[name]) for name, x in r.x.items()}
        r.next_x = {name: x - velocity[name] for name, x in r.x.items()}
        return {"rounds": r.round, **{f"velocity/{name}": value for name, value in velocity.items()}}


def test_the_servers_state_is_resumed_and_rolled_back_bitwise(small: Config, run: Execute) -> None:
    keys: dict[str, Any] = {"model": SMALL_BATCHNORM, "dataset.images": 64, "batch-size": 2, "rounds": 6}
    keys |= {"min-clients": 4, "checkpoint-every": 2, "evaluate-every": 6}
    plain = run(name="plain", **keys)
    keys["outer"] = f"{__name__}:OuterMomentum"
    whole = run(name="whole", **keys)
    assert not torch.equal(final_model(whole)["fc1.weight"], final_model(plain)["fc1.weight"])
    run(name="parts", stop_after_rounds=3, **keys)
    back = run_with(once(5, 2, forget), small.changed({"name": "back", **keys}))
    for other in (run(name="parts", **keys), back):
        assert_same_bits(final_model(other), final_model(whole))
        assert rows_of(other) == rows_of(whole)


def test_clients_that_train_together_fail_as_one_that_fails(small: Config) -> None:
    config = resolve(small.changed({"name": "together"}), "localsgd")

    def broken(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        raise KeyError("lost")

    with (
        InProcessGrid(client_app.app, config, [broken]) as grid,
        pytest.raises(RunFailed, match=r"round 1: .*worker 0: its client failed \(KeyError: 'lost'\)"),
    ):
        train_localsgd(grid, config, Run(config, "localsgd"))


@pytest.mark.parametrize(("model", "rows"), [("Huge", 0), ("HugeInEval", 2)])
def test_the_server_app_ends_in_one_line_where_memory_lacks(
    small: Config, monkeypatch: pytest.MonkeyPatch, model: str, rows: int
) -> None:
    """In a client, and in a test of the server's after round 3."""
    monkeypatch.setattr(server_app, "log_errors_in_one_line", lambda: None)
    config = small.changed({"model": f"tests.own_code:{model}", "name": "huge", "rounds": 4, "evaluate-every": 3})
    with (
        InProcessGrid(client_app.app, resolve(config, "localsgd")) as grid,
        pytest.raises(RunFailed, match=f"^out of memory: batch-size = 4 and model = tests.own_code:{model} on cpu"),
    ):
        server_app.main(grid, Context(1, 1, {}, RecordDict(), dict(config.as_keys())))
    assert len(read_rows(Path(config.results_dir) / "huge")) == rows


def test_one_of_those_that_train_together_that_lost_its_momentum_is_left_out(small: Config) -> None:
    config = resolve(small.changed({"name": "together", "rounds": 4}), "localsgd")
    workers = StackedWorkers()

    def forgetful(messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        if place(messages[2], contexts[2]) == (3, 2):
            forget(messages[2], contexts[2])
        return client_app.train_together(workers.take_rounds, messages, contexts)

    run = Run(config, "localsgd")
    with InProcessGrid(client_app.app, config, [forgetful]) as grid:
        train_localsgd(grid, config, run)
    assert [row["left_out"] for row in rows_of(run)] == [{}, {}, {"2": MEMORY_LOST}, {}]


def test_a_client_at_rest_keeps_one_state(small: Config) -> None:
    config = resolve(small.changed({"name": "sampled", "clients": 8, "fraction": 0.25, "rounds": 12}), "localsgd")
    with InProcessGrid(client_app.app, config) as grid:
        train_localsgd(grid, config, Run(config, "localsgd"))
        states = [
            len(context.state.array_records.get(name, {}))
            for context in grid._contexts.values()
            for name in ("memory", "memory-previous")
        ]
    current, previous = states[::2], states[1::2]
    assert sum(map(bool, current)) > 4
    assert sum(map(bool, previous)) <= 2  # those of the last round


def test_more_clients_than_there_is_memory_for_are_refused(small: Config, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"clients = 10000000: .* need \d+\.\d GiB of memory, but .* --momentum-at-sync"
    ):
        check_memory(small.changed({"clients": 10**7, "fraction": 1e-6}))
    check_memory(small.changed({"clients": 10**7, "fraction": 1e-6, "momentum-at-sync": "reset"}))
    assert capsys.readouterr().out == ""
    check_memory(small.changed({"clients": 1700, "fraction": 0.1}))
    assert "memory: the optimizer states and updates of 1700 clients take up to 1.3 GiB" in capsys.readouterr().out


def test_where_memory_lacks_nothing_is_written(small: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_bytes", lambda device: 2**20)
    with pytest.raises(UserError, match=r"clients = 4: .* of memory"):
        execute(resolve(small, "localsgd"), "localsgd")
    assert not any(Path(small.results_dir).iterdir())


def test_a_run_that_another_process_began_at_the_same_time_is_let_be(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.changed({"name": "both"})

    class Overtaken(Run):
        """Another process locks the folder as soon as it is there."""

        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            others.enter_context(Run(resolve(config, "localsgd"), "localsgd").lock())

    monkeypatch.setattr(lengthen, "Run", Overtaken)
    monkeypatch.setattr(server_app, "log_errors_in_one_line", lambda: None)
    context = Context(1, 1, {}, RecordDict(), dict(config.as_keys()))
    with contextlib.ExitStack() as others, InProcessGrid(client_app.app, resolve(config, "localsgd")) as grid:
        with pytest.raises(RunInProgress):
            server_app.main(grid, context)
        assert (Path(config.results_dir) / "both" / "config.json").exists()
