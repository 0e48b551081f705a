"""What an adapted layer costs beyond its two matrix products: `python -m kernels.roofline --device t4`.

Prints, for the layers of BERT-base and MiniLM, the launches of a forward and a backward pass, the bytes that
they move through DRAM, the activations kept for backward, and the time below which neither bandwidth nor the
peak of matrix products lets them go, by the formulas of kernels/costs.py. All in fp16; nothing is measured.
"""

import argparse
import sys
from collections.abc import Sequence

from kernels.costs import DEVICES, LAYERS, PATHS, frozen, launches, layer
from minibert.errors import InputError
from training.cli import Parser
from training.exit import run_command

HEADER = ("layer", "path", "launches", "moved", "saved", "at least", "beyond frozen")


def table(device: str, tokens: int, rank: int) -> str:
    architecture, limits = DEVICES[device]
    cells = [HEADER]
    for model, sizes in LAYERS.items():
        for K, N in sizes:
            one = layer(tokens, K, N, rank, architecture)
            least = frozen(one).seconds(limits)
            for name, make in PATHS.items():
                path = make(one)
                seconds = path.seconds(limits)
                cells.append(
                    (
                        f"{model} {K} -> {N}",
                        name,
                        f"{launches(path.forward)} + {launches(path.backward)}",
                        f"{path.moved() / 1e6:.1f} MB",
                        f"{path.saved / 1e6:.1f} MB",
                        f"{seconds * 1e6:.0f} us",
                        f"{(seconds - least) * 1e6:.0f} us",
                    )
                )
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m kernels.roofline", description="What an adapted layer costs at least.")
    parser.add_argument("--device", choices=DEVICES, default="t4", help="whose limits and launches (t4)")
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch (4096)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (8)")
    given = parser.parse_args(arguments)
    for name in ("tokens", "rank"):
        if getattr(given, name) < 1:
            raise InputError(f"--{name}: expected at least 1, got {getattr(given, name)}")
    return given


def main() -> int:
    given = parse(sys.argv[1:])
    print(f"{given.device}, {given.tokens} tokens, rank {given.rank}, fp16; launches forward + backward;")
    print("saved: activations, not the weight that a form multiplies by (W', or W in fp16)\n")
    print(table(given.device, given.tokens, given.rank))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
