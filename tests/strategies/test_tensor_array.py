from __future__ import annotations

import gc
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flwr.app import Array, ArrayRecord

from strategies.tensor_array import TensorArray, tensor_of, tensor_record, tensors_of

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3).T,
    "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "count": torch.tensor(7),
    "double": torch.randn(3).double(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_it_is_the_plain_array_of_its_tensor(name: str) -> None:
    tensor = TENSORS[name]
    lazy, plain = TensorArray(tensor), Array(tensor.contiguous().numpy())
    assert (lazy.dtype, lazy.shape, lazy.stype, lazy.data) == (plain.dtype, plain.shape, plain.stype, plain.data)
    assert (lazy.numpy() == plain.numpy()).all()
    assert lazy.numpy().shape == tuple(tensor.shape)
    assert lazy.object_id == plain.object_id  # what Flower would send is the same object


def test_a_record_hands_its_tensors_over_without_a_copy() -> None:
    tensors = tensors_of(tensor_record(TENSORS))
    assert all(tensors[name].data_ptr() == TENSORS[name].data_ptr() for name in TENSORS)
    plain = tensors_of(ArrayRecord({name: Array(tensor.contiguous().numpy()) for name, tensor in TENSORS.items()}))
    assert all(torch.equal(plain[name], TENSORS[name]) for name in TENSORS)


def test_it_leaves_the_process_as_a_plain_array() -> None:
    record = pickle.loads(pickle.dumps(tensor_record(TENSORS)))
    assert {type(array) for array in record.values()} == {Array}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in tensors_of(record).items())


def test_arrays_are_decoded_in_several_threads() -> None:
    """Before 3.11.8 CPython fails to parse NumPy's header where the garbage collector hands over to another thread."""

    def hand_over(phase: str, info: object) -> None:
        time.sleep(0)

    arrays = [Array(tensor.contiguous().numpy()) for tensor in TENSORS.values()] * 100
    threshold = gc.get_threshold()
    gc.callbacks.append(hand_over)
    gc.set_threshold(10, *threshold[1:])
    try:
        with ThreadPoolExecutor(4) as threads:
            decoded = list(threads.map(tensor_of, arrays))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(hand_over)
    assert all(map(torch.equal, decoded, list(TENSORS.values()) * 100))
