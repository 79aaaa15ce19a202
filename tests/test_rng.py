from __future__ import annotations

import itertools
from typing import Any, get_args

import torch

from fedsim.rng import Purpose, begin_stream, numpy_stream


def first_drawn(generator: torch.Generator, *key: Any) -> float:
    begin_stream(generator, *key)
    return float(torch.rand((), generator=generator))


def test_every_stream_is_its_own_and_can_be_drawn_again() -> None:
    keys = list(itertools.product((0, 2025), (0, 1), (0, 1), get_args(Purpose)))
    drawn = [int(numpy_stream(*key).integers(2**62)) for key in keys]
    generator = torch.Generator()
    masks = [first_drawn(generator, *key) for key in keys]
    assert len(set(drawn)) == len(set(masks)) == len(keys)
    assert drawn == [int(numpy_stream(*key).integers(2**62)) for key in keys]
    assert masks == [first_drawn(torch.Generator(), *key) for key in keys]  # whatever a generator drew before


def test_the_global_stream_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first_drawn(torch.Generator(), 1, 2, 3, "dropout")
    assert torch.equal(torch.get_rng_state(), before)
