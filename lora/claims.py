"""What the adapters promise, each claim measured against dense formulas written out here.

    V = W + s·B A        g = m/‖V‖ (DoRA, held constant; 1 for LoRA and rsLoRA)        y = x (g ⊙ V)ᵀ + b

A measured error is max|got - want| / max|want|, the worst of values and gradients, with `want` in fp64 from
what the layer holds, or as the other form of a pair has it; of an exact claim, how many elements break it.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora import layers
from lora.functions import Merged, Split
from lora.methods import METHODS, merge

M, K, N, R = 13, 17, 29, 6  # r is no square and no power of two
ALPHA = 5.0
SCALING = {"lora": ALPHA / R, "rslora": ALPHA / math.sqrt(R), "dora": ALPHA / R}
ADAPTERS = tuple(name for name, method in METHODS.items() if method.layer)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
Measure = Callable[[str, torch.dtype], float]


class Claim(NamedTuple):
    text: str
    measure: Measure
    methods: tuple[str, ...]
    exact: bool

    def error(self, dtype: torch.dtype) -> float:
        return worst(self.measure(name, dtype) for name in self.methods)

    def tolerance(self, dtype: torch.dtype) -> float:
        return 0.0 if self.exact else TOLERANCE[dtype]


CLAIMS: list[Claim] = []


def claim(text: str, *methods: str, exact: bool = False) -> Callable[[Measure], Measure]:
    """Of all methods with adapters if none is named; the error of an exact one is to be 0."""

    def register(measure: Measure) -> Measure:
        CLAIMS.append(Claim(text, measure, methods or ADAPTERS, exact))
        return measure

    return register


class Case(NamedTuple):
    layer: layers.LoRALinear
    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    W: Tensor  # [N, K], the base's, in fp64
    b: Tensor  # [N]

    def tensors(self) -> dict[str, Tensor]:
        """What trains, copied in fp64, by name."""
        return {name: one.detach().double().clone() for name, one in trained(self.layer).items()}


def make(name: str, dtype: torch.dtype, fresh: bool = False, alpha: float = ALPHA) -> Case:
    """An adapter on a random base, the same numbers for every method; moved off its start unless `fresh`."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    base = nn.Linear(K, N, device="meta")
    base.weight = nn.Parameter((draw(N, K) / math.sqrt(K)).to(dtype))
    base.bias = nn.Parameter(draw(N).to(dtype))
    x, dy = draw(M, K).to(dtype), draw(M, N).to(dtype)
    W, b = (one.detach().to(torch.float64, copy=True) for one in (base.weight, base.bias))
    method = METHODS[name]
    case = Case(getattr(layers, method.layer)(base, R, method.scaling(alpha, R)), x, dy, W, b)
    case.layer.reset_parameters(generator)
    if not fresh:
        case.layer(x)  # used before it moves: a merged weight that is kept from here would be seen
        case.layer.merged()
        for _, tensor in sorted(trained(case.layer).items()):  # m last: A and B are the same for every method
            tensor.data += (draw(*tensor.shape) / math.sqrt(tensor.shape[-1])).to(tensor.dtype)
    return case


def trained(layer: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in layer.named_parameters() if one.requires_grad}


def differentiate(forward: Callable, x: Tensor, dy: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y = forward(x), and the gradients of Σ dy ⊙ y in x and the leaves."""
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    # A leaf that y does not depend on is a fault to be shown, so its gradient is zeros, no exception.
    gradients = torch.autograd.grad(y, [x, *leaves.values()], dy, materialize_grads=True)
    return dict(zip(("y", "x", *leaves), (y.detach(), *gradients), strict=True))


def computed(case: Case) -> dict[str, Tensor]:
    return differentiate(case.layer, case.x, case.dy, trained(case.layer))


def dense(case: Case, s: float) -> dict[str, Tensor]:
    """The formula at the top in fp64, with the gradients autograd finds."""
    leaves = {name: one.requires_grad_() for name, one in case.tensors().items()}

    def forward(x: Tensor) -> Tensor:
        V = case.W + s * leaves[B] @ leaves[A]  # [N, K]
        norm = V.detach().square().sum(1).sqrt()  # [N]
        gain = leaves[MAGNITUDE] / norm if MAGNITUDE in leaves else torch.ones_like(norm)  # [N]
        return x @ (gain[:, None] * V).T + case.b

    return differentiate(forward, case.x.double(), case.dy.double(), leaves)


def relative(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """max|got - want| / max|want|, the worst of all that is wanted; NaN stays NaN, and is within nothing."""
    return worst((got[k].double() - one.double()).abs().max() / one.abs().max() for k, one in want.items())


def worst(errors: Iterable[float | Tensor]) -> float:
    return torch.tensor(list(map(float, errors)), dtype=torch.float64).max().item()  # max() loses NaN


def different_bits(got: Tensor, want: Tensor) -> int:
    """The number of elements that are not the same bits, so that -0 is not 0, and NaN is itself."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return max(got.numel(), 1)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return int((got.detach().view(integers) != want.detach().view(integers)).sum())


def export(layer: layers.LoRALinear) -> nn.Linear:
    return merge(nn.Sequential(layer))[0]


def forms_error(layer: layers.LoRALinear, exported: nn.Linear, x: Tensor, dy: Tensor) -> float:
    """How far the layer, its merged form and the exported plain layer are from its split form."""
    parameters = (layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, layer.magnitude)
    leaves, s = trained(layer), layer.scaling
    split = differentiate(
        lambda x: Split.apply(x, None, layer.weight.to(x.dtype), *parameters, s), x, dy, leaves
    )
    merged = differentiate(lambda x: Merged.apply(x, s, *parameters)[0], x, dy, leaves)
    own, plain = differentiate(layer, x, dy, leaves), differentiate(exported, x, dy, {})
    of_plain = {name: split[name] for name in plain}  # y and dx
    return worst((relative(merged, split), relative(own, split), relative(plain, of_plain)))


@claim("a fresh adapter == base")
def fresh_is_base(name: str, dtype: torch.dtype) -> float:
    """y = x Wᵀ + b and dx = dy W, for B = 0 and m = ‖W‖"""
    case = make(name, dtype, fresh=True)
    x, dy = case.x.double(), case.dy.double()
    return relative(computed(case), {"y": x @ case.W.T + case.b, "x": dy @ case.W})


@claim("DoRA == dense m/‖V‖ ⊙ V with ‖V‖ constant, values and gradients", "dora")
@claim("LoRA, rsLoRA == dense W + s·B A, values and gradients", "lora", "rslora")
def adapter_is_dense(name: str, dtype: torch.dtype) -> float:
    case = make(name, dtype)
    return relative(computed(case), dense(case, SCALING[name]))


@claim("rsLoRA(alpha) == LoRA(alpha·√r)", "rslora")
def rslora_is_lora(name: str, dtype: torch.dtype) -> float:
    return relative(computed(make(name, dtype)), computed(make("lora", dtype, alpha=ALPHA * math.sqrt(R))))


@claim("DoRA starts at m = ‖W‖, so at base", "dora")
def dora_starts_at_base(name: str, dtype: torch.dtype) -> float:
    case = make(name, dtype, fresh=True)
    got = {"m": case.tensors()[MAGNITUDE], "y": case.layer(case.x).detach()}
    return relative(got, {"m": case.W.square().sum(1).sqrt(), "y": case.x.double() @ case.W.T + case.b})


@claim("DoRA with m = ‖V‖ == LoRA", "dora")
def dora_is_lora(name: str, dtype: torch.dtype) -> float:
    case = make(name, dtype)
    now = case.tensors()
    V = case.W + SCALING[name] * now[B] @ now[A]  # [N, K]
    trained(case.layer)[MAGNITUDE].data.copy_(V.square().sum(1).sqrt())
    return relative(computed(case), computed(make("lora", dtype)))


@claim("DoRA's bias is not rescaled as m moves", "dora", exact=True)
def bias_is_not_rescaled(name: str, dtype: torch.dtype) -> float:
    """y(0) = b, whatever m"""
    case = make(name, dtype)
    trained(case.layer)[MAGNITUDE].data *= 3
    return different_bits(case.layer(torch.zeros_like(case.x)), case.b.to(dtype).expand(M, N))


@claim("gradients == projections of the dense dW", *SCALING)
def gradients_are_projections(name: str, dtype: torch.dtype) -> float:
    """dA = s·Bᵀ (g ⊙ dW)    dB = s·(g ⊙ dW) Aᵀ    dm = Σ_K dW ⊙ V/‖V‖"""
    case, s = make(name, dtype), SCALING[name]
    now = case.tensors()
    V = case.W + s * now[B] @ now[A]  # [N, K]
    norm = V.square().sum(1, keepdim=True).sqrt()  # [N, 1]
    gain = now[MAGNITUDE][:, None] / norm if MAGNITUDE in now else torch.ones_like(norm)
    W = (gain * V).requires_grad_()
    (dW,) = torch.autograd.grad(case.x.double() @ W.T + case.b, W, case.dy.double())
    want = {A: s * now[B].T @ (gain * dW), B: s * (gain * dW) @ now[A].T, MAGNITUDE: (dW * V / norm).sum(1)}
    return relative(computed(case), {one: want[one] for one in now})


@claim("merged == split == exported, values and gradients")
def forms_agree(name: str, dtype: torch.dtype) -> float:
    case = make(name, dtype)
    return forms_error(case.layer, export(case.layer), case.x, case.dy)


@claim("training and merging leave the base's bits", exact=True)
def base_is_untouched(name: str, dtype: torch.dtype) -> float:
    case = make(name, dtype)
    optimizer = torch.optim.AdamW(case.layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(5):
        case.layer(case.x).backward(case.dy)
        optimizer.step()
        for tensor in export(case.layer).parameters():
            tensor.data += 1  # what happens to the export does not reach the base
    W, b = case.layer.weight, case.layer.bias
    return different_bits(W, case.W.to(dtype)) + different_bits(b, case.b.to(dtype))


@claim("100 merges give the same bits, there is no drift", exact=True)
def merging_does_not_drift(name: str, dtype: torch.dtype) -> float:
    case = make(name, dtype)
    first, y = export(case.layer).weight.clone(), case.layer(case.x)
    for _ in range(100):
        last = export(case.layer).weight
    return different_bits(last, first) + different_bits(case.layer(case.x), y)


@claim("one step moves every B and m, the next every A", exact=True)
def steps_move_everything(name: str, dtype: torch.dtype) -> float:
    """dA = s·Bᵀ dW is 0 as long as B is."""
    case, still = make(name, dtype, fresh=True), 0
    optimizer = torch.optim.SGD(case.layer.parameters(), lr=0.1)
    for moving in ({B, MAGNITUDE}, {A, B, MAGNITUDE}):
        before = case.tensors()
        case.layer(case.x).backward(case.dy)
        optimizer.step()
        after = case.tensors()
        still += sum(int((after[one] == before[one]).sum()) for one in moving & before.keys())
    return still
