"""Models by ``package.module:function``, and every model on images of other shapes."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from torch import Tensor, nn

from fedsim.config import Config, Engine, Mode
from fedsim.device import resolve
from fedsim.errors import UserError
from fedsim.experiments.execute import execute, resolve_run
from fedsim.federation import client_app
from fedsim.federation.in_process import InProcessGrid
from fedsim.federation.server_app import train_localsgd
from fedsim.models import build_model, check_model, initial_model
from fedsim.models.lenet import LeNet5
from fedsim.models.resnet import NORMS
from fedsim.records import Run
from tests.conftest import Execute, assert_same_bits, final_model, register, rows_of

OWN = "tests.own_code"
FEW: dict[str, Any] = {"synthetic_images": 64, "batch_size": 4}


@pytest.mark.parametrize(
    "keys", [{"model": f"{OWN}:vit"}, {"model": f"{OWN}:mlp"}, {"model": "resnet20", "norm": "gn"}]
)
def test_one_client_is_centralized_training_and_resumes_bitwise(run: Execute, keys: dict[str, Any]) -> None:
    """Also with dropout of torch's in a model of one's own."""
    keys = {**keys, **FEW, "synthetic_images": 16, "clients": 1}
    alone = run("centralized", **keys, name="alone")
    one = run(**keys, local_steps=2, record_by="epoch", name="one")
    assert_same_bits(final_model(alone), final_model(one))
    run(**keys, name="cut", stop_after_epochs=1.0, record_by="epoch")
    assert_same_bits(final_model(run(**keys, name="cut", record_by="epoch")), final_model(one))
    assert len(rows_of(one)) == 2


@pytest.mark.parametrize("model", ["lenet-bn", "lenet5", "resnet20", "resnet18", f"{OWN}:mlp"])
def test_models_take_grey_and_oblong_images(model: str) -> None:
    logits = build_model(model, 5, 0, image=(1, 28, 20)).eval()(torch.zeros(2, 1, 28, 20))
    assert logits.shape == (2, 5)


def test_the_key_norm_replaces_every_batchnorm() -> None:
    for name in ("resnet20", "resnet18"):
        model = build_model(name, 10, 0, norm="gn")
        kinds = [type(module).__name__ for module in model.modules()]
        assert "BatchNorm2d" not in kinds
        assert kinds.count("GroupNorm") > 15
    assert [NORMS["gn"](c).num_groups for c in (16, 32, 64, 512)] == [8, 16, 32, 32]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "no.such:build"}, "model = no.such:build: no module no on this machine: install it, or put its fol"),
        ({"model": f"{OWN}:nothing"}, f"model = {OWN}:nothing: {OWN} has no function nothing"),
        ({"model": f"{OWN}:not_a_function"}, f"{OWN} has no function not_a_function"),
        ({"model": "__main__:build"}, "model = __main__:build: it cannot be imported by name: define it in a file"),
        ({"model": f"{OWN}:Masked"}, f"model = {OWN}:Masked: mask is above 1e15 before training: in a mask, -1e9 does"),
        ({"model": f"{OWN}:none"}, f"model = {OWN}:none returns NoneType: it must return an nn.Module"),
        ({"model": f"{OWN}:fails"}, "cannot be built for 10 classes and images of 3 x 32 x 32 (RuntimeError: no weig"),
        ({"model": f"{OWN}:ten_classes"}, "on the images of synthetic: it gives 7 logits per image, but the data has"),
        ({"model": f"{OWN}:Frozen"}, "fc.weight, fc.bias gets no gradient: every parameter must. Frozen param"),
        ({"model": f"{OWN}:Tuple"}, "it gives tuple, not a tensor of 2 x 10 logits for two of them"),
        ({"model": f"{OWN}:Tied"}, "tests.own_code:Tied: other.weight is a parameter of another layer too: copy it"),
        ({"model": f"{OWN}:Unused"}, "extra.weight, extra.bias gets no gradient: every parameter must. Frozen par"),
        (
            {"model": f"{OWN}:Lazy"},
            f"{OWN}:Lazy: fc.weight, fc.bias has no shape yet: give its layer the number of i",
        ),
        ({"model": f"{OWN}:FunctionalDropout"}, "draws from torch's global generator: let all dropout be nn.Dropout"),
        ({"model": f"{OWN}:noisy_vit"}, "draws from torch's global generator: let all dropout be nn.Dropout"),
        ({"model": f"{OWN}:Net", "dataset": f"{OWN}:load"}, f"does not take the images of {OWN}:load, 1 x 12 x 10"),
        ({"model": "lenet5", "dataset": f"{OWN}:load"}, "for 3 classes and images of 1 x 12 x 10"),
        (
            {"model": "vit-tiny", "crop-size": 26},
            "for 10 classes and images of 3 x 26 x 26 (AssertionError: Inp",
        ),
        ({"norm": "gn"}, "norm is not used by model = lenet5: leave it out"),
    ],
)
def test_a_model_that_cannot_be_trained_is_told_in_a_line(small: Config, keys: dict[str, Any], message: str) -> None:
    config = small.changed({**keys, "name": "run"})
    for _ in range(2):  # whatever the first try has left imported
        with pytest.raises(UserError) as caught:
            start(config)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not any(Path(config.results_dir).iterdir())


@pytest.mark.parametrize(
    ("mode", "keys", "message"),
    [
        ("localsgd", {}, "batch-size = 1: model"),
        ("centralized", {}, "batch-size = 1: model"),
        (
            "centralized",
            {"synthetic-images": 65, "batch-size": 4},
            "batch-size = 4 leaves one of 65 images for the last batch: model",
        ),
    ],
)
def test_batchnorm_of_single_values_is_refused_a_batch_of_one_image(
    small: Config, mode: Mode, keys: dict[str, Any], message: str
) -> None:
    config = resolve(small.changed({"model": f"{OWN}:narrow", "batch-size": 1, **keys}), mode)
    with pytest.raises(UserError, match=f"^{message} = .* does not train on one image .*: give another batch-size$"):
        execute(config, mode)
    assert not any(Path(config.results_dir).iterdir())


@pytest.mark.parametrize("engine", ["local", "stacked"])
@pytest.mark.parametrize("model", ["Constant", "Item", "Pretrained", "WeightNorm", "SpectralNorm"])
def test_models_that_a_plain_build_can_make_are_trained(small: Config, model: str, engine: Engine) -> None:
    keys = {"model": f"{OWN}:{model}", "synthetic-images": 64, "batch-size": 4, "rounds": 2}
    config, chosen = resolve_run(small.changed(keys), "localsgd", engine)
    if engine == "stacked" and model not in ("Item", "Pretrained"):
        with pytest.raises(UserError, match=rf"model {OWN}:{model}: cannot stack .*: give --engine local"):
            execute(config, "localsgd", chosen)
        return
    assert rows_of(execute(config, "localsgd", chosen))[-1]["round"] == 2


def start(config: Config) -> None:
    """As the command line does."""
    resolved, engine = resolve_run(config, "localsgd", "local")
    execute(resolved, "localsgd", engine)


def test_a_node_without_the_models_module_says_what_to_install(small: Config) -> None:
    config = resolve(small.changed({"model": f"{OWN}:mlp", "clients": 1, "name": "run"}), "localsgd")

    def client(message: Message, context: Context) -> Message:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, OWN, None)
            return client_app.app(message, context)

    message = f"a node cannot take part: .*model = {OWN}:mlp: no module {OWN} on this machine: install it, or put"
    with InProcessGrid(client, config) as grid, pytest.raises(UserError, match=message):  # type: ignore[arg-type]
        train_localsgd(grid, config, Run(config, "localsgd"))


def test_the_check_of_a_model_draws_nothing_from_the_global_generator(small: Config) -> None:
    before = torch.get_rng_state()
    check_model(small.changed({"model": f"{OWN}:vit"}))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_of_a_model_does_not_see_what_another_thread_draws(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, over = threading.Event(), threading.Event()

    def drawn_meanwhile(classes: int) -> nn.Module:
        drawing.set()
        assert over.wait(60)
        return nn.Linear(2, classes)

    class Checked(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            pool.submit(build_model, f"{__name__}:meanwhile", 10, 0)
            drawing.wait(0.3)  # in vain: the other one waits for this check
            return super().forward(x)

    monkeypatch.setattr(sys.modules[__name__], "meanwhile", drawn_meanwhile, raising=False)
    register(monkeypatch, "lenet5", Checked)
    with ThreadPoolExecutor() as pool:
        try:
            check_model(small)
        finally:
            over.set()
    assert drawing.is_set()


def test_initial_weights_of_ones_own_model_are_the_seeds(small: Config) -> None:
    config = small.changed({"model": f"{OWN}:mlp"})
    one, same, other = (initial_model(config.changed({"seed": seed})).state_dict() for seed in (1, 1, 2))
    assert_same_bits(one, same)
    assert not torch.equal(one["2.weight"], other["2.weight"])


def test_an_engine_that_cannot_stack_a_model_names_its_layer(small: Config) -> None:
    with pytest.raises(UserError, match=r"cannot stack encoder\.layers\.encoder_layer_0\.self_attention \(Multihead"):
        execute(small.changed({"model": f"{OWN}:vit"}), "localsgd", "stacked")
