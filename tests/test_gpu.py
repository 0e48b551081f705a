"""Whole training steps by the kernels, on a GPU.

On a CPU the same steps check the tests themselves, and with TRITON_INTERPRET=1 the kernels, in fp32.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from small_runs import settings
from tolerances import TOLERANCE
from torch import Tensor, nn

from kernels import dropout as kernels_dropout
from kernels.dispatch import runs_kernels, without_kernels
from kernels.dropout import install_dropout
from lora.layers import DoRALinear, LoRALinear
from training.precision import DTYPES
from training.run import Run

ADAPTERS = {"lora": LoRALinear, "dora": DoRALinear}


def on_gpu(*values: object, needs_bf16: bool = False):
    there = torch.cuda.is_available()
    marks = [pytest.mark.gpu, pytest.mark.skipif(not there, reason="needs a CUDA device")]
    if needs_bf16 and there:
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        marks.append(pytest.mark.skipif(not fast, reason="needs a GPU that computes in bf16"))
    return pytest.param(*values, marks=marks)


devices = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])
precisions = pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "fp32"),
        on_gpu("cuda", "fp32"),
        on_gpu("cuda", "fp16"),
        on_gpu("cuda", "bf16", needs_bf16=True),
    ],
)
methods = pytest.mark.parametrize("method", ADAPTERS)
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["merged", "split"])


def started(tiny: Path, data: Path, device: str, **changes: object) -> Run:
    """A run about to train, its adapters off their start, where a fresh B would hide what A's gradient is."""
    torch.manual_seed(0)
    run = Run(settings(tiny, data, device=device, batch_size=4, **changes))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in run.trainer.model.named_parameters():
        if "lora_" in name:
            moved = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data += moved.to(parameter.device)
    # Of the loss scale fp16 starts with, the first steps would be left out.
    enabled = run.config.precision == "fp16"
    run.trainer.scaler = torch.amp.GradScaler(device, init_scale=64.0, enabled=enabled)
    run.trainer.model.train()
    return run


def step(run: Run) -> dict[str, Tensor]:
    """A training step: its loss, and by name the gradients that it moves the weights by."""
    told: dict[str, Tensor] = {}

    def keep(*_) -> None:
        for name, parameter in run.trainer.model.named_parameters():
            if parameter.grad is not None:
                told[name] = parameter.grad.detach().clone()

    handle = run.trainer.optimizer.register_step_pre_hook(keep)
    told["loss"] = torch.tensor(run.trainer.step()["loss"])
    handle.remove()
    return told


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that kernels can draw, also without them, where PyTorch would draw others."""
    monkeypatch.setattr(kernels_dropout, "runs_kernels", lambda x: True)


@precisions
@methods
@dropouts
@pytest.mark.usefixtures("same_masks")
def test_a_step_with_the_kernels_is_one_without(
    device: str, precision: str, method: str, dropout: float, tiny: Path, small_data: Path
) -> None:
    """Its loss and gradients are as near to fp32's as PyTorch's own operations are in the same precision."""
    still = {"encoder_dropout": 0.0, "dropout": 0.0, "max_grad_norm": 0.0}
    changes = {"method": method, "lora_dropout": dropout, **still}
    got = step(started(tiny, small_data, device, precision=precision, **changes))
    with without_kernels():
        exact = step(started(tiny, small_data, device, precision="fp32", **changes))
        plain = step(started(tiny, small_data, device, precision=precision, **changes))
    assert got.keys() == exact.keys()
    assert sum("lora_" in name for name in got) == 12 * (3 if method == "dora" else 2)
    within = TOLERANCE[DTYPES[precision], "layer"]
    for name, wanted in exact.items():
        error, usual = (((one[name] - wanted).norm() / wanted.norm()).item() for one in (got, plain))
        print(f"{name}: error {error:.1e}, without kernels {usual:.1e}")
        assert error <= max(within, 2 * usual), name


@precisions
@methods
@dropouts
def test_equal_runs_give_equal_bits(
    device: str, precision: str, method: str, dropout: float, tiny: Path, small_data: Path
) -> None:
    changes = {"precision": precision, "method": method, "lora_dropout": dropout}
    seen = []
    for number in range(2):
        run = started(tiny, small_data, device, **changes)
        torch.manual_seed(number)  # which masks are a run's own, whatever the generators were before
        losses = [run.trainer.step()["loss"] for _ in range(3)]
        seen.append((losses, [one.detach().clone() for one in run.trainer.model.parameters()]))
    (losses, weights), (again, weights_again) = seen
    assert losses == again
    assert all(map(torch.equal, weights, weights_again))


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """Within it PyTorch raises where the CPU waits for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def three_layers(layer: type[LoRALinear], dropout: float, device: str) -> nn.ModuleList:
    """As attention has them; one of DoRA's magnitudes is 0."""
    layers = [layer(nn.Linear(32, 48), 8, 2.0, dropout) for _ in range(3)]
    for one in layers:
        nn.init.normal_(one.lora_B.weight)
        if layer is DoRALinear:
            one.lora_magnitude_vector.data[5] = 0
    model = nn.ModuleList(layers).to(device)
    install_dropout(model, seed=0)
    return model


@devices
@methods
@dropouts
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
def test_a_layer_does_not_wait_for_the_gpu(device: str, method: str, dropout: float, kernels: bool) -> None:
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = three_layers(ADAPTERS[method], dropout, device)
    x = torch.randn(40, 32, device=device).to(dtype).requires_grad_()
    dy = torch.randn(40, 48, device=device).to(dtype)
    leaves = [x, *(one for one in model.parameters() if one.requires_grad)]

    def differentiate() -> tuple[Tensor, ...]:
        one, two, three = ADAPTERS[method].together(list(model), x)
        return torch.autograd.grad([one, two, three, model[0](x)], leaves, [dy] * 4)

    with nullcontext() if kernels else without_kernels():
        differentiate()  # the first call compiles the kernels
        with without_waiting(device):
            gradients = differentiate()
    assert all(one.isfinite().all() for one in gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_runs_the_kernels_and_waiting_for_it_is_noticed() -> None:
    x = torch.ones(1, device="cuda")
    assert runs_kernels(x)
    with pytest.raises(RuntimeError), without_waiting("cuda"):
        x.item()


def test_a_step_by_interpreted_kernels() -> None:
    """The first test above, of DoRA on a CPU, in a process where a CPU runs the kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "one_without and cpu and dora",
    ]
    run = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
