"""Models by ``package.module:function``, and every model on images of other shapes."""

from __future__ import annotations

import re
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
from fedsim.models.layout import layout_of
from fedsim.models.lenet import LeNet5
from fedsim.models.resnet import NORMS
from fedsim.runs.run import Run
from tests.conftest import Call, Execute, assert_same_bits, final_model, register, rows_of
from tests.own_code import Tutorial, Views

OWN = "tests.own_code"
FEW: dict[str, Any] = {"dataset": "synthetic:images=64", "batch_size": 4}
TINY = "--dataset synthetic:images=32 --batch-size 4 --device cpu --threads 1 --epochs 1".split()


@pytest.mark.parametrize(
    "keys",
    [
        {"model": f"{OWN}:vit"},
        {"model": f"{OWN}:mlp"},
        {"model": "resnet20:norm=gn"},
        {"model": f"{OWN}:Views", "dataset": f"{OWN}:load"},
    ],
)
def test_one_client_is_centralized_training_and_resumes_bitwise(run: Execute, keys: dict[str, Any]) -> None:
    """Also with dropout of torch's in a model of one's own."""
    keys = {**FEW, "dataset": "synthetic:images=16", **keys, "clients": 1}
    alone = run("centralized", **keys, name="alone")
    one = run(**keys, local_steps=2, record_by="epoch", name="one")
    assert_same_bits(final_model(alone), final_model(one))
    run(**keys, name="cut", stop_after_epochs=1.0, record_by="epoch")
    assert_same_bits(final_model(run(**keys, name="cut", record_by="epoch")), final_model(one))
    assert len(rows_of(one)) == 2


@pytest.mark.parametrize("model", ["lenet-bn", "lenet5", "resnet20", "resnet18", f"{OWN}:mlp"])
def test_models_take_grey_and_oblong_images(model: str) -> None:
    logits = build_model(model, 5, 0, shape=(1, 28, 20)).eval()(torch.zeros(2, 1, 28, 20))
    assert logits.shape == (2, 5)


def test_the_argument_norm_replaces_every_batchnorm() -> None:
    for name in ("resnet20", "resnet18"):
        model = build_model(f"{name}:norm=gn", 10, 0)
        kinds = [type(module).__name__ for module in model.modules()]
        assert "BatchNorm2d" not in kinds
        assert kinds.count("GroupNorm") > 15
    assert [NORMS["gn"](c).num_groups for c in (16, 32, 64, 512)] == [8, 16, 32, 32]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "no.such:build"}, "model = no.such:build: no module no on this machine: install it, or put its fol"),
        ({"model": f"{OWN}:nothing"}, f"model = {OWN}:nothing: {OWN} has no function or class nothing"),
        ({"model": f"{OWN}:not_a_function"}, f"{OWN} has no function or class not_a_function"),
        ({"model": "__main__:build"}, "model = __main__:build: it cannot be imported by name: define it in a file"),
        ({"model": f"{OWN}:Masked"}, f"model = {OWN}:Masked: mask is above 1e15 before training: in a mask, -1e9 does"),
        ({"model": f"{OWN}:none"}, f"model = {OWN}:none returns NoneType: it must return an nn.Module"),
        ({"model": f"{OWN}:fails"}, "cannot be built for 10 classes and images of 3 x 32 x 32 (RuntimeError: no weig"),
        (
            {"model": f"{OWN}:ten_classes"},
            "synthetic:images=128: it gives 7 logits per image, but the data has",
        ),
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
            {"model": f"{OWN}:Complex"},
            "phase is complex, and all that is averaged is real: keep its real and imaginary",
        ),
        ({"model": f"{OWN}:ComplexBuffer"}, f"model = {OWN}:ComplexBuffer: phase is complex, and all that is averaged"),
        ({"model": f"{OWN}:Empty"}, f"model = {OWN}:Empty: extra has no values: leave it out of the model"),
        ({"model": f"{OWN}:NoParameters"}, f"model = {OWN}:NoParameters has no parameters to train: give one with a"),
        ({"model": f"{OWN}:Sparse"}, "embedding.weight gets a sparse gradient, which no optimizer here takes: give nn"),
        (
            {"model": f"{OWN}:ExitsAtOnce"},
            "the images of synthetic:images=128, 3 x 32 x 32 (SystemExit: 3)",
        ),
        (
            {"model": f"{OWN}:ExitsInEval"},
            "the images of synthetic:images=128, 3 x 32 x 32, in eval mode (SystemE",
        ),
        (
            {"model": "vit-tiny", "augment.size": 26},
            "for 10 classes and images of 3 x 26 x 26 (AssertionError: Inp",
        ),
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
            {"dataset.images": 65, "batch-size": 4},
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
    keys = {"model": f"{OWN}:{model}", "dataset.images": 64, "batch-size": 4, "rounds": 2}
    config, chosen = resolve_run(small.changed(keys), "localsgd", engine)
    if engine == "stacked" and model not in ("Item", "Pretrained"):
        with pytest.raises(UserError, match=rf"model {OWN}:{model}: cannot stack .*: give --engine local"):
            execute(config, "localsgd", chosen)
        return
    assert rows_of(execute(config, "localsgd", chosen))[-1]["round"] == 2


def test_a_model_that_needs_contiguous_tensors_gets_them(run: Execute) -> None:
    """PyTorch's own network computes bit for bit what it computes by itself; one that does not need them, does not."""
    model = build_model(f"{OWN}:Tutorial", 10, 1)
    plain = Tutorial(10)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(4, 32, 32, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    assert torch.equal(model(images), plain(images.contiguous()))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        plain(images)
    assert rows_of(run(model=f"{OWN}:Tutorial", **FEW, clients=2, rounds=2))[-1]["round"] == 2
    run(model=f"{OWN}:Views", **FEW, clients=2, rounds=1, batchnorm_at_sync="re-estimated")  # by copies of the model
    usual = build_model(f"{OWN}:small_batchnorm", 10, 1).get_parameter("conv1.weight")
    assert usual.is_contiguous(memory_format=torch.channels_last)
    assert layout_of(Views(10, (1, 28, 28)), (1, 28, 28)) == "contiguous"


def test_a_convolution_over_three_dimensions_is_trained(run: Execute) -> None:
    before = build_model(f"{OWN}:Volumes", 10, 2025).state_dict()["conv.weight"]
    after = final_model(run(model=f"{OWN}:Volumes", **FEW, clients=2, rounds=1))["conv.weight"]
    assert before.shape == after.shape
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("TrainedOnMany", r"fails in training \(ValueError: too many images, own_code.py line \d+\)"),
        ("Exits", r"fails in training \(SystemExit: 3, own_code.py line \d+\)"),
    ],
)
def test_a_model_that_fails_in_training_is_told_in_a_line(call: Call, model: str, words: str) -> None:
    code, _, err = call("centralized", *TINY, "--model", f"{OWN}:{model}")
    assert code == 1
    assert re.fullmatch(rf"error: model = {OWN}:{model} {words}\n", err)


def test_a_model_that_exits_fails_as_a_client_in_localsgd(call: Call) -> None:
    code, _, err = call("localsgd", *TINY, "--model", f"{OWN}:Exits", "--clients", "2", "--local-steps", "2")
    assert code == 1
    assert "worker 0: its client failed (SystemExit: 3)" in err.splitlines()[-1]
    assert re.search(r"^a client failed \(SystemExit: 3, own_code.py line \d+\)$", err, re.MULTILINE)
    assert "Traceback" not in err


@pytest.mark.parametrize("mode", ["localsgd", "centralized"])
def test_memory_that_is_not_there_ends_a_run_with_what_to_make_smaller(call: Call, mode: Mode) -> None:
    code, _, err = call(mode, *TINY, "--model", f"{OWN}:Huge", *["--clients", "2"] * (mode == "localsgd"))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(
        f"error: out of memory: batch-size = 4 and model = {OWN}:Huge on cpu: give a smaller --batch-"
    )


@pytest.mark.parametrize("mode", ["localsgd", "centralized"])
def test_a_model_whose_tests_are_not_finite_ends_its_run(call: Call, mode: Mode) -> None:
    code, _, err = call(mode, *TINY, "--model", f"{OWN}:NanInEval", *["--clients", "2"] * (mode == "localsgd"))
    assert (code, err) == (
        1,
        "error: the loss of the model in a test is nan: a lower --lr may help, if its eval mode is right\n",
    )


def test_rates_that_diverge_are_told_at_once(call: Call) -> None:
    code, _, err = call("localsgd", *TINY, "--model", f"{OWN}:Net", "--clients", "2", "--lr", "1e30")
    assert (code, err.count("error: "), err.count("round 1: too few")) == (1, 1, 1)
    assert err.endswith(": a lower --lr may help\n")


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

    message = f"Left out: it cannot take part: .*model = {OWN}:mlp: no module {OWN} on this machine: install it, or put"
    with InProcessGrid(client, config) as grid, pytest.raises(UserError, match=message):  # type: ignore[arg-type]
        train_localsgd(grid, config, Run(config, "localsgd"))


def test_the_check_of_a_model_draws_nothing_from_the_global_generator(small: Config) -> None:
    before = torch.get_rng_state()
    check_model(small.changed({"model": f"{OWN}:vit"}))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_check_of_a_model_does_not_see_what_another_thread_draws(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    checking, drawing, over = threading.Event(), threading.Event(), threading.Event()

    def drawn_meanwhile(classes: int) -> nn.Module:
        drawing.set()
        assert over.wait(60)
        return nn.Linear(2, classes)

    class Checked(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            if checking.is_set() and self.training:
                pool.submit(build_model, f"{__name__}:meanwhile", 10, 0)
                drawing.wait(0.3)  # in vain: the other one waits for this check
            return super().forward(x)

    monkeypatch.setattr(sys.modules[__name__], "meanwhile", drawn_meanwhile, raising=False)
    register(monkeypatch, "lenet5", Checked)
    initial_model(resolve(small, "localsgd"))  # its layout is tried once, by forward passes
    checking.set()
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
