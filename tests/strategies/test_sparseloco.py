"""SparseLoCo's codecs against its authors' code, and by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strategies.compression import Chain, Codec, TopK
from strategies.sparseloco import ChunkedTopK, Int2
from strategies.wire import decode, encode

STEPS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("ccloco.json").read_text())["steps"]


def test_with_feedback_they_are_the_authors() -> None:
    """In four steps, of which each takes on a decaying residual."""
    codec, memory = Chain(ChunkedTopK(ratio=0.25, chunk=16), Int2()), dict[str, Tensor]()
    for seed, step in enumerate(STEPS):
        update = {"w": torch.tensor(step["update"])}
        message, memory = encode(codec, update, memory, seed)
        assert sum(tensor.nbytes for tensor in message.values()) == 12 + 12 // 4 + 16
        sent = decode(codec, message, update, seed)["w"]
        torch.testing.assert_close(sent, torch.tensor(step["sent"]), rtol=0, atol=1e-6)
        torch.testing.assert_close(memory["residual/w"], torch.tensor(step["residual"]), rtol=0, atol=1e-6)


def test_the_largest_of_each_chunk_are_sent_and_of_the_rest_its_share() -> None:
    x = {"w": torch.tensor([1.0, -5.0, 2.0, 0.0, 9.0, 8.0, 7.0, 6.0, -1.0, 3.0])}
    message, _ = encode(ChunkedTopK(ratio=0.5, chunk=4), x, {}, 0)
    assert message["w/places"].tolist() == [1, 2, 0, 1, 1]
    assert message["w/places"].dtype == torch.uint8
    assert message["w/values"].tolist() == [-5.0, 2.0, 9.0, 8.0, 3.0]
    assert decode(ChunkedTopK(ratio=0.5, chunk=4), message, x, 0)["w"].tolist() == [0, -5, 2, 0, 9, 8, 0, 0, 0, 3]


def test_of_one_chunk_without_decay_it_is_topk_bitwise() -> None:
    memories: list[dict[str, Tensor]] = [{}, {}]
    for seed in range(4):
        x = {"w": torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))}
        codecs: tuple[Codec, ...] = (TopK(0.1), ChunkedTopK(ratio=0.1, chunk=100, decay=1.0))
        arrived = []
        for number, codec in enumerate(codecs):
            message, memories[number] = encode(codec, x, memories[number], seed)
            arrived.append(decode(codec, message, x, seed)["w"])
        assert torch.equal(*arrived)
        assert torch.equal(memories[0]["residual/w"], memories[1]["residual/w"])


def test_values_become_the_means_of_bins_of_one_and_a_half_standard_deviations() -> None:
    """These are 2.39, so that the bins are 3.59 wide, one of them around the mean, 0."""
    x = {"w": torch.tensor([-3.0, -1.0, 1.0, 3.0] * 2)}
    arrived = decode(Int2(), encode(Int2(), x, {}, 0)[0], x, 0)["w"]
    assert arrived.tolist() == [-3.0, 0.0, 0.0, 3.0] * 2
