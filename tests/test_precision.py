from __future__ import annotations

import pytest
import torch

from fedsim.config import Config
from fedsim.device import prepare, products_in, resolve
from fedsim.errors import UserError
from tests.conftest import Execute, final_model, rows_of


def test_each_precision_rounds_products_and_nothing_else() -> None:
    x = torch.randn(64, 64)
    with products_in("fp32", x.device):
        assert (x @ x).dtype == torch.float32
    with products_in("bf16", x.device):
        assert (x @ x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32


def test_tf32_is_off_unless_asked() -> None:
    prepare(Config(threads=1))
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.skipif(torch.cuda.is_available(), reason="tf32 is known to this machine")
def test_tf32_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="precision = tf32 needs a CUDA device, not cpu: give --precision fp32"):
        resolve(Config(precision="tf32"), "localsgd")


def test_precisions_train_alike_and_keep_float32_parameters(run: Execute) -> None:
    losses = {}
    for precision in ("fp64", "fp32", "bf16"):
        result = run(
            name=precision, precision=precision, model="tests.own_code:batchnorm", **{"augment.size": 12}, epochs=1.0
        )
        losses[precision] = rows_of(result)[-1]["test_loss"]
        expected = torch.float64 if precision == "fp64" else torch.float32
        assert final_model(result)["0.weight"].dtype == expected
    assert losses["fp64"] != losses["fp32"] != losses["bf16"]
    assert losses["fp32"] == pytest.approx(losses["fp64"], abs=1e-4)
    assert losses["bf16"] == pytest.approx(losses["fp64"], abs=3e-2)
