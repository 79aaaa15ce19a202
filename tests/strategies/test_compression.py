"""Codecs: what they must equal, their bytes, and that error feedback loses nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsim.registry import CODECS
from strategies.arguments import arguments_of
from strategies.compression import Chain, Codec, PowerSGD, RandomK, TopK
from strategies.wire import broadcast, decode, encode, receive
from tests.conftest import NEEDS_GPU, assert_same_bits

SHAPES = {"conv.weight": (6, 3, 5, 5), "fc.weight": (20, 31), "fc.bias": (31,), "scalar": ()}
COUNT = sum(math.prod(shape) for shape in SHAPES.values())
NAMES = list(CODECS.places)


def update(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def codec_of(name: str, **keys: float) -> Codec:
    own = {key: value for key, value in keys.items() if key in arguments_of(CODECS.kind(name))}
    text = f"{name}:{','.join(f'{key}={value}' for key, value in own.items())}" if own else name
    codec: Codec = CODECS.read(text)[0].make()
    return codec


def sent(codec: Codec, values: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    """What arrives of `values`."""
    return decode(codec, encode(codec, values, {}, seed)[0], values, seed)


def error(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", NAMES)
def test_error_feedback_conserves_what_is_sent(name: str) -> None:
    """All that arrived and the last residual are all that was to be sent."""
    codec, memory = codec_of(name, ratio=0.1, decay=1.0), dict[str, Tensor]()
    arrived = {n: torch.zeros(shape) for n, shape in SHAPES.items()}
    for seed in range(6):
        message, memory = encode(codec, update(seed), memory, seed)
        arrived = {n: arrived[n] + v for n, v in decode(codec, message, update(seed), seed).items()}
    wanted = {n: sum(update(seed)[n] for seed in range(6)) for n in SHAPES}
    assert error({n: arrived[n] + memory[f"residual/{n}"] for n in SHAPES}, wanted) < 2e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_feedback_off_remembers_no_residual_and_nothing_is_changed(name: str) -> None:
    codec, values = codec_of(name), update(0)
    _, memory = encode(codec, values, {}, 0, feedback=False)
    assert not [key for key in memory if key.startswith("residual/")]
    assert all(torch.equal(values[n], v) for n, v in update(0).items())


@pytest.mark.parametrize("name", ["topk", "chunked-topk", "randomk"])
def test_with_every_value_sent_it_is_exact(name: str) -> None:
    assert error(sent(codec_of(name, ratio=1.0), update(1)), update(1)) == 0
    _, memory = encode(codec_of(name, ratio=1.0), update(1), {}, 0)
    residuals = [value for key, value in memory.items() if key.startswith("residual/")]
    assert len(residuals) == len(SHAPES)
    assert not any(map(torch.any, residuals))


def test_the_sign_of_one_value_is_the_value() -> None:
    for number in (0.1, -2.0, 3e-8):
        one = {"w": torch.tensor([number])}
        assert error(sent(codec_of("sign"), one), one) == 0


def test_powersgd_is_exact_where_the_rank_suffices() -> None:
    low_rank = {"w": torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 40, dtype=torch.float64)}
    assert error(sent(PowerSGD(3), low_rank), low_rank) < 1e-12
    assert error(sent(PowerSGD(2), low_rank), low_rank) > 1e-3


@pytest.mark.parametrize("zeros", [slice(None), slice(1)])
def test_powersgd_draws_columns_of_its_warm_start_that_are_zero(zeros: slice) -> None:
    """They stay zero otherwise, where the first rows of a matrix are: it would never arrive."""
    matrix = torch.cat([torch.zeros(2, 9), torch.randn(10, 9, generator=torch.Generator().manual_seed(0))])
    codec, value, memory = PowerSGD(2), {"w": matrix}, {"warm-start/w": torch.randn(9, 2)}
    memory["warm-start/w"][:, zeros] = 0
    message, memory = encode(codec, value, memory, 5)
    factor, drawn = memory["warm-start/w"], torch.randn(9, 2, generator=torch.Generator().manual_seed(5))
    assert torch.all(factor.norm(dim=0) > 0)
    if zeros == slice(None):
        assert_same_bits(message, encode(codec, value, {"warm-start/w": drawn}, 6)[0])


def test_powersgd_moves_after_an_update_of_zero() -> None:
    value = {"w": torch.zeros(12, 9)}
    _, memory = encode(PowerSGD(2), value, {}, 0)
    value["w"][2:] = torch.randn(10, 9)
    message, _ = encode(PowerSGD(2), value, memory, 1)
    assert float(decode(PowerSGD(2), message, value, 1)["w"].norm()) > 1


def test_constants_are_exact() -> None:
    constant = {"w": torch.full((5, 7), -0.5)}
    for name in ("fp16", "bf16", "int8", "int4", "sign"):
        assert error(sent(codec_of(name), constant), constant) == 0, name
    zero = {"w": torch.zeros(5, 7)}
    for name in NAMES:
        assert error(sent(codec_of(name), zero), zero) == 0, name


def test_quantization_errs_by_half_a_step() -> None:
    for name, largest in (("int8", 127), ("int4", 7)):
        arrived = sent(codec_of(name), update(2))
        for n, value in update(2).items():
            step = float(value.abs().max()) / largest
            assert float((arrived[n] - value).abs().max()) <= step / 2 * 1.0001
    assert (
        error(sent(codec_of("fp16"), {"w": torch.tensor([1e9, -1e9])}), {"w": torch.tensor([65504.0, -65504.0])}) == 0
    )


def test_qsgd_is_right_in_the_mean() -> None:
    codec, value = codec_of("qsgd", levels=4), {"w": torch.randn(100)}
    mean = torch.stack([sent(codec, value, seed)["w"] for seed in range(3000)]).mean(0)
    norm = float(value["w"].norm())
    assert float((mean - value["w"]).abs().max()) < 5 * norm / 4 / 2 / 3000**0.5  # five standard errors at most


def test_the_residual_of_qsgd_stays_bounded_from_six_levels_on() -> None:
    def residual(levels: int) -> float:
        codec, memory = codec_of("qsgd", levels=levels), dict[str, Tensor]()
        for seed in range(60):
            _, memory = encode(codec, {"w": torch.ones(1280)}, memory, seed)
        return float(memory["residual/w"].norm())

    assert residual(6) < 20 * 1280**0.5
    assert residual(3) > 1000 * 1280**0.5


def test_the_ratio_is_the_decimal_number_that_was_given() -> None:
    """The float 0.29 is a little below 29 of 100."""
    message, _ = encode(codec_of("topk", ratio=0.29), {"w": torch.arange(100.0)}, {}, 0)
    assert sorted({value.numel() for value in message.values()}) == [29]


def test_the_largest_values_are_sent() -> None:
    value = {"w": torch.tensor([[0.1, -5.0, 0.3], [4.0, 0.2, 0.0]])}
    assert sent(codec_of("topk", ratio=0.34), value)["w"].tolist() == [[0, -5.0, 0], [4.0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp16", 2 * COUNT),
        ("bf16", 2 * COUNT),
        ("int8", COUNT + 4 * 4),
        ("int4", sum(-(-math.prod(s) // 2) for s in SHAPES.values()) + 4 * 4),
        ("sign", sum(-(-math.prod(s) // 8) for s in SHAPES.values()) + 4 * 4),
        ("topk", 8 * sum(max(1, math.prod(s) // 10) for s in SHAPES.values())),
        ("randomk", 4 * sum(max(1, math.prod(s) // 10) for s in SHAPES.values())),
        ("qsgd", sum(-(-math.prod(s) // 128) * (64 + 4) for s in SHAPES.values())),
        ("powersgd", 4 * (2 * (6 + 75) + 2 * (20 + 31) + 31 + 1)),
    ],
)
def test_bytes_are_those_of_the_formula(name: str, expected: int) -> None:
    message, _ = encode(codec_of(name, ratio=0.1, rank=2), update(0), {}, 0)
    assert sum(tensor.nbytes for tensor in message.values()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bits_and_other_seeds_others(name: str) -> None:
    codec = codec_of(name)
    messages = [encode(codec, update(0), {}, seed)[0] for seed in (1, 1, 2)]
    same = [all(torch.equal(messages[0][key], other[key]) for key in messages[0]) for other in messages[1:]]
    assert same == [True, name not in ("randomk", "qsgd", "powersgd")]


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_layout_changes_no_bit_of_a_message(name: str) -> None:
    """Where messages leave the process, and in it, the same update has different layouts."""
    codec, value = codec_of(name), torch.randn(32, 24, 5, 5, generator=torch.Generator().manual_seed(0))
    plain, _ = encode(codec, {"w": value}, {}, 0)
    last, _ = encode(codec, {"w": value.to(memory_format=torch.channels_last)}, {}, 0)
    assert all(torch.equal(plain[part], last[part]) for part in plain)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_decodes_to_the_same_bits(name: str) -> None:
    codec, values = codec_of(name, ratio=0.1), update(0)
    message, _ = encode(codec, values, {}, 0)
    on_cpu = decode(codec, message, values, 0)
    on_gpu = decode(codec, {n: v.cuda() for n, v in message.items()}, {n: v.cuda() for n, v in values.items()}, 0)
    assert all(torch.equal(on_gpu[n].cpu(), value) for n, value in on_cpu.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_broadcast_sends_later_what_it_leaves_out(name: str) -> None:
    """What workers hold comes near a model that stays as it is; the server's state has the same bits."""
    codec, x, after = codec_of(name, ratio=0.3), update(0), update(1)
    held, message, state = broadcast(codec, x, {}, 0)
    assert not message
    for seed in range(12):
        sent = broadcast(codec, after, state, seed)
        assert sent.message is not None
        held, state = receive(codec, held, sent.message, seed), sent.state
        assert all(torch.equal(value, sent.parameters[n]) for n, value in held.items())
        assert all(torch.equal(value, state[f"held/{n}"]) for n, value in held.items())
    left = sum(float((held[n] - after[n]).norm()) for n in SHAPES)
    assert left < 0.25 * sum(float((x[n] - after[n]).norm()) for n in SHAPES)


@pytest.mark.parametrize("second", ["fp16", "bf16", "int8", "int4", "int2", "sign", "qsgd"])
def test_a_chain_is_the_second_codec_on_what_the_first_selects(second: str) -> None:
    for first in (TopK(0.2), RandomK(0.2)):
        values = {"w": torch.randn(10, 20, generator=torch.Generator().manual_seed(0))}
        chain = Chain(first, codec_of(second))
        arrived = sent(chain, values)["w"].flatten()
        alone = sent(first, values)["w"].flatten()
        assert bool((arrived[alone == 0] == 0).all())
        selected = alone[alone != 0]
        error_of_chain = (arrived[alone != 0] - selected).norm()
        assert error_of_chain < selected.norm()
        if second in ("fp16", "bf16", "int8", "int4"):  # each value by itself, and the largest, whatever the order
            assert torch.equal(arrived[alone != 0], sent(codec_of(second), {"w": selected})["w"])
    with pytest.raises(ValueError, match="a chain is topk, chunked-topk or randomk, then a codec of each value"):
        Chain(codec_of("int8"), TopK())


def test_with_feedback_a_random_chain_loses_nothing_over_several_tensors() -> None:
    """Both ends draw the same places of each tensor, although the second codec draws only when it encodes."""
    chain = Chain(RandomK(0.3), codec_of("qsgd"))
    message, memory = encode(chain, update(0), {}, 5)
    arrived = decode(chain, message, update(0), 5)
    for name, value in update(0).items():
        torch.testing.assert_close(arrived[name] + memory[f"residual/{name}"], value)
