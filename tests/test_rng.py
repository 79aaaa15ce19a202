from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import torch

from fedsim.rng import Purpose, generator, random_words, random_words_on_device, step_keys

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The output function of SplitMix64, as its paper prints it, in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_every_generator_is_another_and_can_be_drawn_again() -> None:
    keys = list(itertools.product((0, 2025), (0, 1), (0, 1), get_args(Purpose)))
    drawn = [int(generator(*key).integers(2**62)) for key in keys]
    assert len(set(drawn)) == len(keys)
    assert drawn == [int(generator(*key).integers(2**62)) for key in keys]


def test_every_step_has_a_key_of_its_own_wherever_a_round_begins() -> None:
    keys = {p: step_keys(1, worker, 0, 20, "augment") for p, worker in enumerate((0, 1))} | {
        2: step_keys(1, 0, 0, 20, "dropout")
    }
    assert len(set(np.concatenate(list(keys.values())).tolist())) == 60
    assert np.array_equal(step_keys(1, 0, 7, 5, "augment"), keys[0][7:12])


def test_words_are_splitmix64_of_the_key_and_the_number() -> None:
    keys = step_keys(3, 2, 0, 4, "dropout")
    expected = [
        [splitmix64((splitmix64(i * 0x9E3779B97F4A7C15 & MASK) + int(key)) & MASK) for i in (1, 2, 3)] for key in keys
    ]
    assert random_words(keys, 3).tolist() == expected


def test_words_on_a_device_have_the_same_bits() -> None:
    keys = step_keys(3, 2, 0, 4, "dropout")
    on_device = random_words_on_device(torch.from_numpy(keys.view(np.int64)), 100, first=20)
    assert np.array_equal(on_device.numpy().view(np.uint64), random_words(keys, 120)[:, 20:])


def test_words_are_uniform_and_independent() -> None:
    words = random_words(step_keys(0, 0, 0, 200, "dropout"), 1000)
    for shift in (0, 24, 40):
        uniform = ((words >> np.uint64(shift)) & np.uint64(2**24 - 1)) / 2**24
        assert abs(uniform.mean() - 0.5) < 0.003  # 4.6 standard deviations
        assert abs(uniform.std() - 12**-0.5) < 0.002
        neighbours = [
            np.corrcoef(uniform[:, :-1].ravel(), uniform[:, 1:].ravel()),
            np.corrcoef(uniform[:-1].ravel(), uniform[1:].ravel()),
        ]
        assert all(abs(matrix[0, 1]) < 0.012 for matrix in neighbours)


def test_the_global_stream_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    random_words_on_device(torch.zeros(1, dtype=torch.int64), 10)
    generator(1, 2, 3, "shuffle").permutation(5)
    assert torch.equal(torch.get_rng_state(), before)
