"""The low-rank operations as python -m kernels.bench times them: by the kernels, and without."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.costs import DROPOUT, Layer, Pass
from kernels.philox import Mask

SCALING = 2.0
Call = Callable[[], object]


class Case(NamedTuple):
    """One thing computed in several ways, and the passes that ours is made of."""

    name: str
    ways: Mapping[str, Call]
    passes: Sequence[Pass]


class Tensors(NamedTuple):
    """What a layer has: activations in half precision, all else fp32."""

    x: Tensor  # [M, K]
    dx: Tensor  # [M, K]
    y: Tensor  # [M, N], also as z
    dy: Tensor  # [M, N]
    h: Tensor  # [M, r]
    A: Tensor  # [r, K]
    Bt: Tensor  # [r, N]
    W: Tensor  # [N, K]
    vectors: Tensor  # [3, N], none near zero: m, ‖V‖ and m / ‖V‖


def tensors(one: Layer, dtype: torch.dtype, device: torch.device) -> Tensors:
    M, K, N, r, _ = one
    shapes = ((M, K), (M, K), (M, N), (M, N), (M, r), (r, K), (r, N), (N, K), (3, N))
    drawn = [torch.randn(shape, device=device) for shape in shapes]
    return Tensors(*(tensor.to(dtype) for tensor in drawn[:4]), *drawn[4:-1], drawn[-1].abs() + 1)


def operations(one: Layer, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Each operation that a layer calls, and the fused backward pass over dy that it could."""
    t, s = tensors(one, dtype, device), SCALING
    m, norm, gain = t.vectors
    B = t.Bt.mT
    calls: dict[str, tuple[Call, Pass]] = {
        "down": (lambda: dispatch.lora_down(t.x, t.A), one.down(one.K)),
        "up": (lambda: dispatch.lora_up(t.y, t.h, t.Bt), one.up()),
        "outer": (lambda: dispatch.lora_outer(t.h, t.dy, s), one.outer(one.N)),
        "outer and dot": (lambda: dispatch.lora_outer_dot(t.h, t.dy, t.y, s, gain, norm), one.outer_dot()),
        "backward y": (lambda: dispatch.lora_backward_y(t.dy, t.h, t.Bt, s), one.backward_y()),
        "merge": (lambda: dispatch.lora_merge(t.W, t.A, B, s, None, dtype), one.merge()),
        "merge and gain": (lambda: dispatch.lora_merge(t.W, t.A, B, s, m, dtype), one.merge(gains=True)),
        "gain": (lambda: dispatch.dora_gain(t.W, t.A, B, s, m), one.gain()),
    }
    for name, (call, passed) in calls.items():
        yield Case(name, {"ours": call, "unfused": unfused(call)}, [passed])
    yield from masked_operations(one, t)


def masked_operations(one: Layer, t: Tensors) -> Iterator[Case]:
    """With dropout: the kernels draw the mask, and without them it has been drawn and kept by PyTorch."""
    drawn = Mask(DROPOUT, seed=0, step=0, site=0)
    kept = F.dropout(torch.ones_like(t.x), DROPOUT).mul
    calls: dict[str, tuple[Callable[[object], object], Pass]] = {
        "down, dropout": (lambda mask: dispatch.lora_down(t.x, t.A, mask=mask), one.down(one.K)),
        "backward x, dropout": (
            lambda mask: dispatch.lora_backward_x(t.x, t.dx, t.h, t.A, mask),
            one.backward_x(),
        ),
    }
    for name, (call, passed) in calls.items():
        ours, theirs = (lambda call=call: call(drawn)), unfused(lambda call=call: call(kept))
        yield Case(name, {"ours": ours, "unfused": theirs}, [passed])


def unfused(call: Call) -> Call:
    """The call made of PyTorch's own operations; a backward pass within it too."""

    def within() -> object:
        with dispatch.without_kernels():
            return call()

    return within
