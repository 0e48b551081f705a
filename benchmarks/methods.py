"""What each method costs, against another: `python -m benchmarks.methods --data FOLDER --out FILE.csv`.

Time: all models stand in one process and take turns, step by step, on the same batches; the ratio of two
methods is the median over the steps of their ratio in each, so that what else the machine does hits both.
A frozen encoder reads the data beforehand, once for all epochs: its steps are those of the head alone.
Memory: each method trains in a process of its own; `memory_above_start_mib` of its result.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles

from benchmarks.flags import check_least
from benchmarks.tables import table, write_csv
from benchmarks.turns import ROOT
from minibert.errors import InputError
from minibert.files import check_output
from training.cli import Parser, parse
from training.exit import run_command

VARIANTS = {
    "full": ("--method", "full"),
    "frozen": ("--method", "frozen"),
    "LoRA": ("--method", "lora"),
    "DoRA": ("--method", "dora"),
    "LoRA, rank 1": ("--method", "lora", "--rank", "1"),
    "LoRA, rank 32": ("--method", "lora", "--rank", "32"),
    "LoRA, dropout .1": ("--method", "lora", "--lora-dropout", "0.1"),
    "DoRA, dropout .1": ("--method", "dora", "--lora-dropout", "0.1"),
}
PAIRS = (
    ("frozen", "full"),
    ("LoRA", "full"),
    ("DoRA", "full"),
    ("DoRA", "LoRA"),
    ("LoRA, rank 32", "LoRA, rank 1"),
    ("LoRA, dropout .1", "LoRA"),
    ("DoRA, dropout .1", "LoRA, dropout .1"),
)
COLUMNS = ("method", "against", "time", "quartile 1", "quartile 3", "memory")
WARM_UP = 5  # steps that are not counted: libraries choose and keep their kernels in the first


def step_times(arguments: Sequence[str], variants: Sequence[str], steps: int) -> dict[str, list[float]]:
    """Seconds of each training step, the variants in turn; whose turn is first rotates."""
    from training.run import Run

    total = WARM_UP + steps
    trainers = {}
    for name in variants:
        config, _ = parse([*arguments, *VARIANTS[name]])
        trainers[name] = Run(replace(config, max_steps=total)).trainer
        trainers[name].model.train()
        for _ in trainers[name].encode_training_data():
            pass
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(total):
        shift = i % len(variants)
        for name in (*variants[shift:], *variants[:shift]):
            started = time.perf_counter()
            trainers[name].step()
            times[name].append(time.perf_counter() - started)
        print(f"\rstep {i + 1} of {total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {name: seconds[WARM_UP:] for name, seconds in times.items()}


def memory(arguments: Sequence[str], variants: Sequence[str], steps: int) -> dict[str, float]:
    """The peak of a short run, in MiB above what was resident once everything was imported.

    Raises:
        InputError: if a run fails, with its own line.
    """
    peaks = {}
    for name in variants:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "train.py", *arguments, *VARIANTS[name]]
            command += ["--max-steps", str(steps), "--out", str(out)]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if run.returncode:
                raise InputError(f"{name}: {run.stderr.strip()}")
            peaks[name] = json.loads((out / "result.json").read_text())["memory_above_start_mib"]
        print(f"{name}: {peaks[name]:.0f} MiB above start", file=sys.stderr)
    return peaks


def ratios(times: Mapping[str, Sequence[float]], peaks: Mapping[str, float]) -> list[tuple[str, ...]]:
    """A line for each pair of variants that were measured."""
    lines = []
    for one, other in PAIRS:
        if one in times and other in times:
            by_step = [a / b for a, b in zip(times[one], times[other], strict=True)]
            low, middle, high = quantiles(by_step, n=4)
            numbers = (middle, low, high, peaks[one] / peaks[other])
            lines.append((one, other, *(f"{number:.3f}" for number in numbers)))
    return lines


def parse_flags(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of train.py that hold for every variant.

    Raises:
        InputError: for a value that makes no sense.
    """
    parser = Parser(
        prog="python -m benchmarks.methods",
        description="Step time and memory of the methods, as ratios. Other flags are train.py's.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=100, help="timed steps of each method (100)")
    parser.add_argument("--memory-steps", type=int, default=190, help="steps of the runs for memory (190)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the table there, as CSV")
    given, others = parser.parse_known_args(arguments)
    check_least(steps=(given.steps, 2), memory_steps=(given.memory_steps, 2))
    check_output(given.out, "--out")
    parse(others)
    return given, others


def main() -> int:
    given, others = parse_flags(sys.argv[1:])
    peaks = memory(others, given.variants, given.memory_steps)
    lines = [COLUMNS, *ratios(step_times(others, given.variants, given.steps), peaks)]
    print(table(lines))
    if given.out:
        write_csv(lines, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
