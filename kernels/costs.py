"""What an adapted layer launches, moves and keeps at least, from the formulas in each kernel's docstring.

In half precision; A, B, m and what passes between the kernels are fp32. W is kept in fp32 by the merged form,
which reads it, and as a copy in half precision by the split one, which multiplies by it.

Letters: M tokens, K input features, N output features, r rank.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

HALF, FULL = 2, 4  # bytes of an activation, and of a parameter or low-rank value
DROPOUT = 0.1  # where there is any
LAYERS = {
    "BERT-base": ((768, 768), (768, 3072), (3072, 768)),
    "MiniLM": ((384, 384), (384, 1536), (1536, 384)),
}


class Limits(NamedTuple):
    """What a device can do in a second."""

    bandwidth: float  # bytes
    products: float  # FLOPs of matrix products in half precision


class Device(NamedTuple):
    architecture: int
    limits: Limits


DEVICES = {
    "t4": Device(75, Limits(320e9, 65e12)),
    "a100": Device(80, Limits(1555e9, 312e12)),
    "h100": Device(90, Limits(3350e9, 989e12)),
}


class Pass(NamedTuple):
    """Something launched once, in PyTorch's own operations perhaps more often.

    FLOPs are those of matrix products by cuBLAS; the kernels' own hide behind their bytes at the ranks that
    they are launched for.
    """

    bytes: int
    launches: int = 1
    flops: int = 0

    def seconds(self, limits: Limits) -> float:
        """The time below which no implementation goes that reads its operands from DRAM."""
        return max(self.bytes / limits.bandwidth, self.flops / limits.products)


class Layer(NamedTuple):
    """The passes that the forms of a layer are made of, each with its bytes."""

    M: int
    K: int
    N: int
    r: int
    splits: int  # of the rows, into partial sums

    def gemm(self) -> Pass:
        """x Wᵀ, and dy W alike"""
        moved = HALF * (self.M * self.K + self.K * self.N + self.M * self.N)
        return Pass(moved, flops=2 * self.M * self.K * self.N)

    def down(self, width: int) -> Pass:
        return Pass(HALF * self.M * width + FULL * (self.M * self.r + self.r * width))

    def up(self) -> Pass:
        return Pass(2 * HALF * self.M * self.N + FULL * (self.M * self.r + self.r * self.N))

    def gained(self) -> Pass:
        """y = g ⊙ z + b, where z is kept for the gradient of m"""
        return Pass(2 * HALF * self.M * self.N + 2 * FULL * self.N)

    def outer(self, width: int, extra_rows: int = 0) -> Pass:
        partial = 2 * FULL * self.splits * (self.r + extra_rows) * width
        result = FULL * (self.r + extra_rows) * width
        return Pass(HALF * self.M * width + FULL * self.M * self.r + partial + result)

    def outer_dot(self) -> Pass:
        one = self.outer(self.N, extra_rows=1)
        return one._replace(bytes=one.bytes + HALF * self.M * self.N + 2 * FULL * self.N)

    def backward_x(self) -> Pass:
        one = self.outer(self.K)
        return one._replace(bytes=one.bytes + 2 * HALF * self.M * self.K + FULL * self.r * self.K)

    def backward_y(self) -> Pass:
        """Without the partial sums, which depend on the launch"""
        read = HALF * self.M * self.N + FULL * self.r * (self.M + self.N)
        return Pass(read + FULL * self.r * (self.M + self.N))

    def merge(self, gains: bool = False) -> Pass:
        """V; with gains also m in, ‖V‖, m / ‖V‖ and g ⊙ V out"""
        more = 3 * FULL * self.N + HALF * self.N * self.K if gains else 0
        return Pass((FULL + HALF) * self.N * self.K + FULL * self.r * (self.K + self.N) + more)

    def gain(self) -> Pass:
        """‖V‖ and m / ‖V‖ alone"""
        return Pass(FULL * (self.N * self.K + self.r * (self.K + self.N) + 3 * self.N))

    def gained_weight(self) -> Pass:
        """g ⊙ W, for dx = dy (g ⊙ W) + ..."""
        return Pass(2 * HALF * self.N * self.K + FULL * self.N)

    def x(self) -> int:
        return HALF * self.M * self.K

    def y(self) -> int:
        return HALF * self.M * self.N

    def h(self) -> int:
        return FULL * self.M * self.r


class Path(NamedTuple):
    forward: tuple[Pass, ...]
    backward: tuple[Pass, ...]
    saved: int  # bytes of activations kept between the two; weights are none, W' neither

    def moved(self) -> int:
        """Bytes to and from DRAM"""
        return sum(one.bytes for one in (*self.forward, *self.backward))

    def seconds(self, limits: Limits) -> float:
        return seconds((*self.forward, *self.backward), limits)


def frozen(one: Layer) -> Path:
    return Path((one.gemm(),), (one.gemm(),), 0)


def lora_split(one: Layer) -> Path:
    """With dropout: y = x Wᵀ + b + s · x̃ Aᵀ Bᵀ"""
    backward = (one.gemm(), one.down(one.N), one.outer(one.N), one.backward_x())
    return Path((one.gemm(), one.down(one.K), one.up()), backward, one.x() + one.h())


def lora_merged(one: Layer) -> Path:
    """Without: y = x W'ᵀ + b"""
    low_rank = (one.down(one.N), one.down(one.K), one.outer(one.K), one.outer(one.N))
    return Path((one.merge(), one.gemm()), (one.gemm(), *low_rank), one.x())


def dora_split(one: Layer) -> Path:
    forward = (one.gain(), one.gemm(), one.down(one.K), one.up(), one.gained())
    low_rank = (one.down(one.N), one.outer_dot(), one.backward_x())
    return Path(forward, (one.gained_weight(), one.gemm(), *low_rank), one.x() + one.h() + one.y())


def dora_merged(one: Layer) -> Path:
    """As LoRA, with z = x Vᵀ and y = g ⊙ z + b"""
    forward = (one.merge(gains=True), one.gemm(), one.gained())
    low_rank = (one.down(one.N), one.down(one.K), one.outer(one.K), one.outer_dot())
    return Path(forward, (one.gemm(), *low_rank), one.x() + one.y())


PATHS: dict[str, Callable[[Layer], Path]] = {
    "frozen": frozen,
    "LoRA, dropout": lora_split,
    "LoRA": lora_merged,
    "DoRA, dropout": dora_split,
    "DoRA": dora_merged,
}


def launches(passes: Iterable[Pass]) -> int:
    return sum(one.launches for one in passes)


def seconds(passes: Iterable[Pass], limits: Limits) -> float:
    """One pass after another, none at once with the next"""
    return sum(one.seconds(limits) for one in passes)


def layer(M: int, K: int, N: int, rank: int, architecture: int) -> Layer:
    """With the splits that the launch table has; the defaults where it leaves a rank to cuBLAS."""
    import torch

    from kernels.launch import find

    found = find("outer", architecture, torch.float16, min(rank, 16))
    return Layer(M, K, N, rank, found.splits)
