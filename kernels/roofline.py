"""What an adapted layer costs beyond its two matrix products: `python -m kernels.roofline --device t4`.

Prints, for the layers of BERT-base and MiniLM, the launches of a forward and a backward pass, the bytes that
they move through DRAM, the activations kept for backward, and the time below which bandwidth lets no
implementation go. Counted from the formulas in each kernel's docstring, in fp16; nothing is measured here.

Letters: M tokens, K input features, N output features, r rank; W is kept in fp32, its copy made for a GEMM in
fp16.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from minibert.errors import InputError
from training.cli import Parser
from training.exit import run_command

HALF, FULL = 2, 4  # bytes of an activation, and of a parameter or low-rank value
DEVICES = {"t4": (75, 320e9), "a100": (80, 1555e9), "h100": (90, 3350e9)}  # architecture, bytes a second
LAYERS = {
    "BERT-base": ((768, 768), (768, 3072), (3072, 768)),
    "MiniLM": ((384, 384), (384, 1536), (1536, 384)),
}


class Pass(NamedTuple):
    """Something launched once or, with partial sums, twice."""

    bytes: int
    launches: int = 1


class Layer(NamedTuple):
    M: int
    K: int
    N: int
    r: int
    splits: int

    def gemm(self) -> Pass:
        """x Wᵀ, and dy W alike"""
        return Pass(HALF * (self.M * self.K + self.K * self.N + self.M * self.N))

    def down(self, width: int) -> Pass:
        return Pass(HALF * self.M * width + FULL * (self.M * self.r + self.r * width))

    def up(self) -> Pass:
        return Pass(2 * HALF * self.M * self.N + FULL * (self.M * self.r + self.r * self.N + self.N))

    def outer(self, width: int, extra_rows: int = 0) -> Pass:
        partial = 2 * FULL * self.splits * (self.r + extra_rows) * width
        result = FULL * (self.r + extra_rows) * width
        return Pass(HALF * self.M * width + FULL * self.M * self.r + partial + result, 2)

    def outer_dot(self) -> Pass:
        one = self.outer(self.N, extra_rows=1)
        return one._replace(bytes=one.bytes + HALF * self.M * self.N + FULL * self.N)

    def backward_x(self) -> Pass:
        one = self.outer(self.K)
        return one._replace(bytes=one.bytes + 2 * HALF * self.M * self.K + FULL * self.r * self.K)

    def merge(self) -> Pass:
        factors = FULL * self.r * (self.K + self.N)
        return Pass((FULL + HALF) * self.N * self.K + factors + 2 * FULL * self.N)

    def norm(self) -> Pass:
        return Pass(FULL * (self.N * self.K + self.r * (self.K + self.N) + self.N))

    def gained_weight(self) -> Pass:
        """g ⊙ W, for dx = dy (g ⊙ W)"""
        return Pass((FULL + HALF) * self.N * self.K + FULL * self.N)

    def vector(self) -> Pass:
        """m / ‖V‖, or dm = dots / m"""
        return Pass(3 * FULL * self.N)

    def x(self) -> int:
        return HALF * self.M * self.K

    def y(self) -> int:
        return HALF * self.M * self.N

    def h(self) -> int:
        return FULL * self.M * self.r


class Path(NamedTuple):
    forward: tuple[Pass, ...]
    backward: tuple[Pass, ...]
    saved: int  # bytes of activations kept between the two


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
    forward = (one.norm(), one.vector(), one.gemm(), one.down(one.K), one.up())
    low_rank = (one.down(one.N), one.outer_dot(), one.vector(), one.backward_x())
    return Path(forward, (one.gained_weight(), one.gemm(), *low_rank), one.x() + one.h() + one.y())


def dora_merged(one: Layer) -> Path:
    low_rank = (one.down(one.N), one.down(one.K), one.outer(one.K), one.outer_dot())
    vectors = (one.vector(), one.vector())
    return Path((one.merge(), one.gemm()), (one.gemm(), *vectors, *low_rank), one.x() + one.y())


PATHS: dict[str, Callable[[Layer], Path]] = {
    "frozen": frozen,
    "LoRA, dropout": lora_split,
    "LoRA": lora_merged,
    "DoRA, dropout": dora_split,
    "DoRA": dora_merged,
}


def launches(passes: Sequence[Pass]) -> int:
    return sum(one.launches for one in passes)


def moved(path: Path) -> int:
    return sum(one.bytes for one in (*path.forward, *path.backward))


def layer(M: int, K: int, N: int, rank: int, architecture: int) -> Layer:
    """With the splits that the launch table has; the defaults where it leaves a rank to cuBLAS."""
    import torch

    from kernels.launch import find

    found = find("outer", architecture, torch.float16, min(rank, 16))
    return Layer(M, K, N, rank, found.splits)


def table(device: str, tokens: int, rank: int) -> str:
    architecture, bandwidth = DEVICES[device]
    cells = [("layer", "path", "launches", "moved", "saved", "at least", "beyond frozen")]
    for model, sizes in LAYERS.items():
        for K, N in sizes:
            one = layer(tokens, K, N, rank, architecture)
            least = moved(frozen(one)) / bandwidth
            for name, make in PATHS.items():
                path = make(one)
                seconds = moved(path) / bandwidth
                cells.append(
                    (
                        f"{model} {K} -> {N}",
                        name,
                        f"{launches(path.forward)} + {launches(path.backward)}",
                        f"{moved(path) / 1e6:.1f} MB",
                        f"{path.saved / 1e6:.1f} MB",
                        f"{seconds * 1e6:.0f} us",
                        f"{(seconds - least) * 1e6:.0f} us",
                    )
                )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m kernels.roofline", description="What an adapted layer costs at least.")
    parser.add_argument("--device", choices=DEVICES, default="t4", help="whose bandwidth and launches (t4)")
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch (4096)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (8)")
    given = parser.parse_args(arguments)
    for name in ("tokens", "rank"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(given, name)}")
    return given


def main() -> int:
    given = parse(sys.argv[1:])
    print(f"{given.device}, {given.tokens} tokens, rank {given.rank}, fp16; launches forward + backward\n")
    print(table(given.device, given.tokens, given.rank))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
