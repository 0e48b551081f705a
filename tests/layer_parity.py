"""Whole layers by the kernels: run by test_kernels_triton.py, in a process of its own, like kernel_parity.py.

A layer is compared with its equation in float64 and PyTorch's own gradients, and with itself without
kernels; masks are those that the layer's dropout says it drew.
"""

import os

import pytest
import torch
from tolerances import tolerance
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import lora_backward_x, lora_down, lora_merge, lora_outer, lora_up
from kernels.dispatch import without_kernels
from kernels.dropout import install_dropout
from kernels.launch import arrivals
from kernels.philox import Mask
from lora.layers import DoRALinear, LoRALinear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KERNELS = (lora_backward_x, lora_down, lora_merge, lora_outer, lora_up)
M, K, N, RANK, SCALING = 45, 40, 83, 3, 0.6
# Operations that compute nothing on a device, or that are made of those that do
FREE = {"view", "_unsafe_view", "t", "transpose", "detach", "alias", "empty", "new_empty", "empty_strided",
        "empty_like", "as_strided", "unbind", "slice", "select", "unsqueeze", "expand", "split",
        "split_with_sizes", "permute", "set_", "is_pinned"}  # fmt: skip


def adapted(layer: type[LoRALinear], dropout: float, dtype: torch.dtype) -> nn.Sequential:
    """One layer, trained tensors off their start; the bias, as in a run, in the activations' dtype."""
    torch.manual_seed(0)
    one = layer(nn.Linear(K, N), RANK, SCALING, dropout)
    for tensor in one.parameters():
        if tensor.requires_grad:
            tensor.data += 0.3 * torch.randn_like(tensor)
    if layer is DoRALinear:
        one.lora_magnitude_vector.data[5] = 0
    one.bias.data = one.bias.data.to(dtype)
    model = nn.Sequential(one).to(DEVICE)
    install_dropout(model, seed=7).step = 3
    return model


def differentiate(model: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of x, A, B and m."""
    leaves = {name: one for name, one in model.named_parameters() if one.requires_grad} | {"x": x}
    y = model(x)
    return {"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


class Dense(nn.Module):
    """g ⊙ (x Wᵀ + s · x̃ Aᵀ Bᵀ) + b in float64, with ‖V‖ held constant."""

    def __init__(self, layer: LoRALinear, mask: Mask | None):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        one = self.layer
        A, B = one.lora_A.weight, one.lora_B.weight
        dropped = x if self.mask is None else x * self.mask.keep(*x.shape, device=x.device) * self.mask.scale
        z = x @ one.weight.T + SCALING * dropped @ A.T @ B.T
        if one.magnitude is None:
            return z + one.bias
        norm = (one.weight + SCALING * B @ A).pow(2).sum(1).sqrt().detach()
        return one.magnitude / norm * z + one.bias


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given to do: PyTorch's operations but views, and Triton's kernels."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen: list[str] = []
        self.inside = False
        for module in KERNELS:
            monkeypatch.setattr(module, "kernel", Counted(module.kernel, module.__name__, self))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not self.inside and name not in FREE:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class Counted:
    """A kernel whose launches are counted; all else is asked of the kernel itself."""

    def __init__(self, kernel, name: str, launches: Launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getattr__(self, name: str):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launches.seen.append(self.name)
            self.launches.inside = True  # the interpreter copies its arguments with PyTorch
            try:
                self.kernel[grid](*args, **options)
            finally:
                self.launches.inside = False

        return launch


layers = pytest.mark.parametrize("layer", [LoRALinear, DoRALinear], ids=lambda one: one.__name__)
dropouts = pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["merged", "split"])


@layers
@dropouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_layer_by_the_kernels_is_its_equation(layer, dropout, dtype, monkeypatch):
    model = adapted(layer, dropout, dtype)
    x = torch.randn(M, K, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    launches = Launches(monkeypatch)
    with launches:
        got = differentiate(model, x, dy)
    assert sum(name.startswith("kernels.") for name in launches.seen) >= 5
    mask = Mask(dropout, seed=7, step=3, site=0) if dropout else None
    exact = Dense(adapted(layer, dropout, dtype).double()[0], mask)
    want = differentiate(exact, x.detach().double().requires_grad_(), dy.double())
    for name, value in zip(want, got.values(), strict=True):
        error = ((value.double() - want[name]).norm() / want[name].norm()).item()
        assert error <= {torch.float32: 5e-6, torch.float16: 2e-3}[dtype], (name, error)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_layer_computes_the_same_without_kernels(layer, dtype):
    x = torch.randn(M, K, device=DEVICE).to(dtype).requires_grad_()
    dy = torch.randn(M, N, device=DEVICE).to(dtype)
    fused = differentiate(adapted(layer, 0.0, dtype), x, dy)
    with without_kernels():
        plain = differentiate(adapted(layer, 0.0, dtype), x, dy)
    for name in fused:
        scale = plain[name].abs().max()
        torch.testing.assert_close(fused[name] / scale, plain[name] / scale, **tolerance(dtype))


@dropouts
@layers
def test_a_layer_launches_no_more_than_the_roofline_says(layer, dropout, monkeypatch):
    """At rank 3 on sm_75, where every operation has a kernel."""
    model = adapted(layer, dropout, torch.float16)
    x = torch.randn(M, K, dtype=torch.float16, device=DEVICE).requires_grad_()
    arrivals(x.device, 1)  # made once in a process
    launches = Launches(monkeypatch)
    with launches:
        y = model(x)
        forward = launches.seen[:]
    dy = torch.randn_like(y)
    launches.seen.clear()
    with launches:
        torch.autograd.grad(y, [x, *(one for one in model.parameters() if one.requires_grad)], dy)
    most = {("LoRALinear", 0.0): (2, 5), ("DoRALinear", 0.0): (3, 5),
            ("LoRALinear", 0.25): (4, 4), ("DoRALinear", 0.25): (6, 5)}[layer.__name__, dropout]  # fmt: skip
    assert (len(forward), len(launches.seen)) == most, (forward, launches.seen)
