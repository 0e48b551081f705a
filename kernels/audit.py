"""Check what the kernels compile to, without a GPU: `python -m kernels.audit`.

Every kernel is compiled as it is launched on sm_75 (T4), sm_80 (A100) and sm_90 (H100), at several ranks,
and held to what its speed rests on: nothing spilled, shared memory within an SM's, 16-byte loads, tensor
cores where they are meant and there alone, no TF32, and the number of instructions it had when it was tuned.

Exit codes: 0 all hold, 1 one does not, 2 bad usage, or no Triton to compile with.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minibert.errors import InputError
from minibert.files import write_text
from training.cli import Parser
from training.exit import run_command

if TYPE_CHECKING:
    from kernels.compiled import Compiled
    from kernels.launch import Launch

ARCHITECTURES = (75, 80, 90)
OPERATIONS = ("down", "up", "outer", "outer_dot", "backward_x", "backward_y", "merge", "drop")
RANKS = (1, 8, 16, 32, 64)
WIDTHS = (384, 768, 1536, 3072)  # MiniLM's and BERT's hidden and intermediate sizes
GOLDEN = Path(__file__).with_name("golden_instructions.json")
BY_WIDTH = ("merge",)  # whose launches depend on the width, not on the rank
DRIFT = 0.1
KIB = 1024


class Case(NamedTuple):
    """What is compiled: a kernel as it is launched for activations of a width and dtype."""

    operation: str
    architecture: int
    rank: int
    width: int
    dtype: str
    launch: "Launch"
    full: bool  # with mask and gain

    @property
    def name(self) -> str:
        extras = "" if self.full else " bare"
        return f"{self.operation} sm_{self.architecture} r{self.rank} {self.width} {self.dtype}{extras}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m kernels.audit", description="Check what the kernels compile to.")
    parser.add_argument(
        "operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(OPERATIONS)} [all]"
    )
    parser.add_argument(
        "--update", action="store_true", help="write down today's instruction counts as the ones to keep"
    )
    given = parser.parse_args(arguments)
    for name in given.operations:
        if name not in OPERATIONS:
            raise InputError(f"{name} is no operation: {', '.join(OPERATIONS)}")
    return given


def cases(operation: str) -> Iterator[Case]:
    """All ranks at BERT's width in fp16; at rank 8 the other widths, dtypes, and no mask or gain.

    fp32 at rank 16 too: its elements are twice as wide, and registers run out there first.
    """
    import torch

    from kernels.launch import find

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    points = [(rank, 768, "fp16", True) for rank in RANKS]
    points += [
        (8, width, "fp16", True) for width in WIDTHS if width != 768 and operation in ("down", *BY_WIDTH)
    ]
    points += [(8, 8192, "fp16", True)] if operation in BY_WIDTH else []
    points += [(8, 768, "fp16", False), (8, 768, "bf16", True), (8, 768, "fp32", True)]
    points += [(16, 768, "fp32", True)] if operation not in BY_WIDTH else []
    if operation == "drop":
        points = [(8, 768, dtype, True) for dtype in dtypes]
    for architecture in ARCHITECTURES:
        for rank, width, dtype, full in points:
            if architecture < 80 and dtype == "bf16":
                continue
            if architecture == 90 and full and rank in (1, 16, 32):  # between what is compiled at 8 and 64
                continue
            launch = find(operation, architecture, dtypes[dtype], width if operation in BY_WIDTH else rank)
            if launch is not None:
                yield Case(operation, architecture, rank, width, dtype, launch, full)


def faults(case: Case, found: "Compiled", golden: int | None) -> list[str]:
    """What does not hold, in words."""
    tensor_cores = case.launch.form == "dot" and case.architecture >= 80 and case.dtype != "fp32"
    most_shared = 48 * KIB if case.architecture < 80 else 96 * KIB
    # From rank 32 on the accumulators are most of the registers; two programs still fit on an SM.
    most_registers = 168 if case.rank <= 16 else 255
    said = {
        f"{found.stack + found.local} bytes spilled": found.stack + found.local > 0,
        f"{found.registers} registers, over {most_registers}": found.registers > most_registers,
        f"{found.shared} bytes of shared memory, over {most_shared}": found.shared > most_shared,
        f"loads {found.widest} bytes at the widest, not 16": found.widest != 16,
        f"loads as few as {found.narrowest} bytes": found.narrowest < 4,
        "no tensor cores": tensor_cores and not found.mma,
        "tensor cores, which were not meant": found.mma and not tensor_cores,
        "TF32": found.tf32,
        f"{found.instructions} instructions, {golden} when tuned": golden is not None
        and abs(found.instructions - golden) > DRIFT * golden,
    }
    return [text for text, wrong in said.items() if wrong]


def table(rows: Sequence[tuple[Case, "Compiled", int | None, list[str]]]) -> str:
    cells = [("kernel", "form", "tile", "warps", "registers", "spilled", "shared", "load", "mma",
              "instructions", "tuned", "ok")]  # fmt: skip
    for case, found, golden, wrong in rows:
        launch = case.launch
        numbers = (
            launch.warps,
            found.registers,
            found.stack + found.local,
            found.shared,
            f"{found.widest} B",
            "yes" if found.mma else "-",
            found.instructions,
            "-" if golden is None else golden,
            "NO" if wrong else "yes",
        )
        cells.append((case.name, launch.form, f"{launch.rows}x{launch.columns}", *map(str, numbers)))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def load_golden(version: str) -> dict[str, int]:
    """The instruction counts to keep; none with another Triton, whose code may well differ."""
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    if stored["triton"] != version:
        print(f"instruction counts are those of Triton {stored['triton']}, this is {version}: not compared")
        return {}
    return stored["instructions"]


def main() -> int:
    given = parse(sys.argv[1:])
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise InputError("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")
    # Fusing multiply-add is the default up to Triton 3.9, with a warning; the kernels ask for it by name.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        import triton
    except ModuleNotFoundError:
        raise InputError("Triton is not installed: there is nothing to compile with") from None
    from kernels.compiled import compile_kernel

    golden = load_golden(triton.__version__)
    rows = []
    for case in (case for operation in given.operations or OPERATIONS for case in cases(operation)):
        found = compile_kernel(*case)
        count = None if given.update else golden.get(case.name)
        rows.append((case, found, count, faults(case, found, count)))
    print(table(rows))
    if given.update:
        counts = golden | {case.name: found.instructions for case, found, _, _ in rows}
        text = json.dumps({"triton": triton.__version__, "instructions": counts}, indent=1)
        write_text(text + "\n", GOLDEN)
    failed = [(case, wrong) for case, _, _, wrong in rows if wrong]
    print(f"\n{len(failed)} of {len(rows)} kernels fail:" if failed else f"\nall {len(rows)} kernels hold")
    for case, wrong in failed:
        print(f"  {case.name}: {'; '.join(wrong)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
