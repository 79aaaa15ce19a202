from __future__ import annotations

import itertools
from typing import get_args

import torch

from fedsim.streams import Purpose, numpy_stream, torch_stream

CPU = torch.device("cpu")


def test_every_stream_is_its_own_and_can_be_drawn_again() -> None:
    keys = list(itertools.product((0, 2025), (0, 1), (0, 1), get_args(Purpose)))
    drawn = [int(numpy_stream(*key).integers(2**62)) for key in keys]
    masks = [float(torch.rand((), generator=torch_stream(*key, device=CPU))) for key in keys]
    assert len(set(drawn)) == len(set(masks)) == len(keys)
    assert drawn == [int(numpy_stream(*key).integers(2**62)) for key in keys]
    assert masks == [float(torch.rand((), generator=torch_stream(*key, device=CPU))) for key in keys]


def test_the_global_stream_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    torch_stream(1, 2, 3, "dropout", CPU)
    assert torch.equal(torch.get_rng_state(), before)
