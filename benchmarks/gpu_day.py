"""Minutes on a CUDA machine, as evidence to keep: `python -m benchmarks.gpu_day --out DIR --seconds 360`.

Facts and ceilings of the card, losses against a CPU's, the tests that need a GPU, training steps against
transformers + PEFT, and kernels.bench. Each part runs in processes of its own with a time limit. What has
been found is written after every few measurements, so that whatever stops the program leaves it. It needs no
network and no installed package of ours. `--tiny` does the same in small on a CPU. docs/gpu.md says more.

Exit codes: 0 all that ran passed; 1 a check failed, or a process did; 2 bad usage.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

from benchmarks import gpu_report, gpu_tests
from benchmarks.flags import check_least
from benchmarks.turns import ROOT, environment, why_ended
from minibert.errors import InputError
from minibert.files import check_folder, write_text
from training.cli import Parser
from training.exit import run_command
from training.machine import cores

FILES = ("report.md", "gpu_day.csv", "kernels.csv", "gpu_day.png", "log.txt")
RESERVE = 8.0  # seconds for the last report and its plot
SHORTEST = 12.0  # a process that has less does not get past its imports
LOGGED = 2**14  # bytes of the end of each process's output
MOST_FAILURES = 3  # in a row: then the rest of the part is not tried
MOST_TESTERS = 8
METHODS = ("lora", "dora", "full", "lora-dropout")
# The order in which training steps are measured: the most telling first.
SHAPES = (
    ("bf16", "bert-base", "mixed"),
    ("bf16", "MiniLM", "mixed"),
    ("fp16", "bert-base", "mixed"),
    ("fp16", "MiniLM", "mixed"),
    ("bf16", "bert-base", "equal"),
    ("bf16", "MiniLM", "equal"),
    ("fp16", "bert-base", "equal"),
    ("fp16", "MiniLM", "equal"),
)
CHECKS = ("facts", "losses:lora", "losses:dora", "losses:full", "losses:frozen")
# So that a child ends with all that it has started.
OWN_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
OUT_OF_TIME, NOT_DONE = "out of time", "Not done yet"


class Deadline:
    """When the program must be done."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self.clock = seconds, clock
        self.began = clock()

    def spent(self) -> float:
        return self.clock() - self.began

    def limit(self, kept: float) -> float:
        """The seconds of a part that leaves this share of all the time to the parts after it."""
        return (1 - kept) * self.seconds - RESERVE - self.spent()


class Child:
    """A process in a group of its own, which writes lines of JSON to one file and all else to another."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, settings: Mapping[str, str]):
        self.name, self.rows, self.output = name, folder / f"{name}.jsonl", folder / f"{name}.txt"
        self.read, self.cut_off = 0, False
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env={**settings, "GPU_DAY_ROWS": str(self.rows)},
                stdout=file,
                stderr=subprocess.STDOUT,
                **OWN_GROUP,
            )

    def new_lines(self) -> list[dict]:
        """Whole lines since the last call."""
        if not self.rows.exists():
            return []
        with open(self.rows, "rb") as file:
            file.seek(self.read)
            *whole, _ = file.read().split(b"\n")
        self.read += sum(len(line) + 1 for line in whole)
        return [json.loads(line) for line in whole]

    def end(self) -> None:
        """With everything it has started."""
        self.cut_off = self.process.poll() is None
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        with open(self.output, "rb") as file:
            file.seek(max(0, self.output.stat().st_size - LOGGED))
            return file.read().decode("utf-8", "replace")

    def why(self) -> str:
        """One line: how it ended."""
        said = self.tail()
        if "Timeout (" in said:  # faulthandler's first word
            return "an item took too long; log.txt has where"
        return why_ended(self.process.returncode, said)


class Day:
    """The findings, where they are written, and the time that is left."""

    def __init__(self, out: Path, deadline: Deadline, scratch: Path, tiny: bool):
        self.out, self.deadline, self.scratch, self.tiny = out, deadline, scratch, tiny
        self.findings = gpu_report.Findings(tiny)
        self.children: list[Child] = []

    def start(self, name: str, command: Sequence[str], threads: int, **settings: str) -> Child:
        ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        ours |= {"TRITON_CACHE_DIR": str(self.scratch / "triton"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        ours["PYTHONUNBUFFERED"] = "1"  # what a process that is killed has said is in the log
        kept = {
            name: value
            for name, value in environment(threads).items()
            if not name.startswith(("PYTEST", "TRITON_INTERPRET"))
        }
        self.children.append(Child(name, command, self.scratch, {**kept, **ours, **settings}))
        return self.children[-1]

    def watch(self, children: Sequence[Child], seconds: float, add: Callable[[dict], None]) -> None:
        """Until all have ended or the time is over; then none is left running."""
        until, unsaved, saved = self.deadline.spent() + seconds, 0, -math.inf
        try:
            while any(child.process.poll() is None for child in children) and self.deadline.spent() < until:
                unsaved += self.collect(children, add)
                if unsaved and self.deadline.spent() > saved + 1:  # seconds
                    self.save(NOT_DONE)
                    unsaved, saved = 0, self.deadline.spent()
                time.sleep(0.1)
        finally:
            for child in children:
                child.end()
            self.collect(children, add)
        self.save(NOT_DONE)

    def collect(self, children: Sequence[Child], add: Callable[[dict], None]) -> int:
        """Add what the children have written since; how many lines."""
        lines = [line for child in children for line in child.new_lines()]
        for line in lines:
            add(line)
        return len(lines)

    def save(self, state: str) -> None:
        """Each file is the old one or the whole new one."""
        spent = f"{state}: {self.deadline.spent():.0f} of {self.deadline.seconds:.0f} seconds spent."
        write_text(gpu_report.csv_text(self.findings), self.out / "gpu_day.csv")
        write_text(gpu_report.markdown(self.findings, spent), self.out / "report.md")
        if self.findings.kernels:
            write_text(gpu_report.kernels_text(self.findings), self.out / "kernels.csv")
        write_text("".join(f"=== {one.name}\n{one.tail()}\n" for one in self.children), self.out / "log.txt")

    def plot(self) -> None:
        from minibert.files import replacing

        if not self.findings.ratios():
            self.findings.skip("no training step was measured on both sides", "gpu_day.png")
            return
        try:
            with replacing(self.out / "gpu_day.png") as temporary:
                gpu_report.plot(self.findings, temporary)
        except ImportError as error:
            self.findings.skip(f"matplotlib cannot be imported: {error}", "gpu_day.png")


def measure(day: Day, items: Sequence[str], kept: float) -> None:
    """Have benchmarks.gpu_measure measure items, leaving this share of the time to later parts.

    One that fails ends the process; another then takes the items after it.
    """
    left, failures = list(items), 0

    def add(line: dict) -> None:
        left.remove(line["item"])
        part, *words = line.pop("item").split(":")
        day.findings.add(part, " ".join(words), line)

    while left and failures < MOST_FAILURES and day.deadline.limit(kept) > SHORTEST:
        before, seconds = len(left), day.deadline.limit(kept)
        child = start_measuring(day, left, seconds)
        day.watch([child], seconds, add)
        if child.cut_off or child.process.returncode == 0:
            break
        failures = failures + 1 if len(left) == before else 1
        day.findings.failed[left.pop(0).replace(":", " ") if left else child.name] = child.why()
    if left:
        reason = f"{MOST_FAILURES} failed one after another" if failures == MOST_FAILURES else OUT_OF_TIME
        day.findings.skip(reason, *(item.replace(":", " ") for item in left))


def start_measuring(day: Day, items: Sequence[str], seconds: float) -> Child:
    until = time.time() + seconds - 1
    flags = ["--scratch", str(day.scratch), "--until", str(until), *["--tiny"] * day.tiny]
    command = ["-m", "benchmarks.gpu_measure", *items, *flags]
    return day.start(f"measure-{len(day.children)}", command, 1 if day.tiny else cores())


def check(day: Day) -> None:
    """The card, the losses, the ceilings."""
    precisions = ("fp32",) if day.tiny else ("bf16", "fp16", "fp32")
    measure(day, [*CHECKS, *(f"ceilings:{name}" for name in precisions)], kept=0.6)


def test(day: Day) -> None:
    """The tests that need a GPU, in processes side by side; tiny: a few, interpreted."""
    missing = [name for name in ("pytest", "hypothesis", "triton") if not installed(name)]
    if missing:
        day.findings.skip(f"{' and '.join(missing)} is not installed", "tests that need a GPU")
        return
    seconds = day.deadline.limit(kept=0.5)
    if seconds < SHORTEST:
        day.findings.skip(OUT_OF_TIME, "tests that need a GPU")
        return
    shares = 2 if day.tiny else max(2, min(MOST_TESTERS, cores() // 2))
    files = gpu_tests.test_files(ROOT / "tests")
    chosen = [files[0], "-k", "zeros or tokens"] if day.tiny else files
    settings = {"GPU_DAY_SECONDS": str(round(seconds) + 5)} | ({"TRITON_INTERPRET": "1"} if day.tiny else {})
    # A file that cannot be imported must not keep the others from running.
    options = ["-p", "no:cacheprovider", "-p", "benchmarks.gpu_tests", "--continue-on-collection-errors"]
    command, threads = ["-m", "pytest", *options, *chosen], max(1, cores() // shares)
    children = [
        day.start(f"tests-{i}", command, threads, GPU_DAY_SHARE=f"{i}/{shares}", **settings)
        for i in range(shares)
    ]
    day.watch(children, seconds, lambda line: day.findings.add("tests", line.pop("item"), line))
    for child in children:
        if child.cut_off:
            day.findings.skip(OUT_OF_TIME, f"the rest of {child.name}")
        elif child.process.returncode not in (0, 1, 5):  # passed, failed, no tests in this share
            day.findings.failed[child.name] = child.why()


def train(day: Day) -> None:
    """Training steps of ours and, where it is installed, of transformers + PEFT."""
    missing = [name for name in ("transformers", "peft") if not installed(name)]
    if missing:
        day.findings.skip(f"{' and '.join(missing)} is not installed", "the peer's training steps")
    sides = gpu_report.SIDES[:1] if missing else gpu_report.SIDES
    shapes = (("fp32", "tiny", "mixed"),) if day.tiny else SHAPES
    items = [
        f"steps:{model}:{lengths}:{precision}:{method}:{side}"
        for precision, model, lengths in shapes
        for method in METHODS
        for side in sides
    ]
    measure(day, items, kept=0.2)


def time_kernels(day: Day) -> None:
    """kernels.bench, which writes when it is done: a process for each model, its layers first."""
    for kind, (model, tokens) in product(
        ("layers", "operations"), (("BERT-base", "4096"), ("MiniLM", "1280"))
    ):
        what = f"kernels.bench of {model}, {kind}"
        seconds = day.deadline.limit(kept=0)
        if day.tiny or seconds < SHORTEST:
            day.findings.skip("kernels.bench needs a GPU" if day.tiny else OUT_OF_TIME, what)
            continue
        name = f"kernels-{model}-{kind}"
        flags = {
            "models": model,
            "kinds": kind,
            "tokens": tokens,
            "dtype": half(day.findings),
            "repeats": "15",
        }
        flags["csv"] = str(day.scratch / f"{name}.csv")
        words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
        read_kernels(day, day.start(name, ["-m", "kernels.bench", *words], cores()), what, seconds)


def read_kernels(day: Day, child: Child, what: str, seconds: float) -> None:
    day.watch([child], seconds, lambda line: None)
    if child.cut_off:
        day.findings.skip(OUT_OF_TIME, what)
    elif child.process.returncode:
        day.findings.failed[what] = child.why()
    else:
        with open(child.output.with_suffix(".csv"), newline="", encoding="utf-8") as file:
            day.findings.kernels += csv.DictReader(file)
        day.save(NOT_DONE)


def half(findings: gpu_report.Findings) -> str:
    """The half precision that the card multiplies fast."""
    capability = findings.part("facts").get("", {}).get("capability", "7.5")
    return "bf16" if float(capability) >= 8 else "fp16"


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


PARTS = (check, test, train, time_kernels)


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a value that makes no sense."""
    parser = Parser(
        prog="python -m benchmarks.gpu_day",
        description="What minutes on a CUDA machine can tell: correctness, tests, speed against PEFT.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help=f"a folder; it gets {', '.join(FILES)}")
    parser.add_argument(
        "--seconds", type=int, default=360, help="all of it takes no longer; 540 for all (360)"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to see that it works")
    options = parser.parse_args(arguments)
    check_least(seconds=(options.seconds, 60))
    check_folder(options.out, "--out")
    return options


def check_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("no CUDA device: there is nothing to measure; --tiny runs all of it on a CPU")


def run(day: Day, parts: Sequence[Callable[[Day], None]] = PARTS) -> int:
    """Every part, the files, and the exit code."""
    state = "Interrupted"
    try:
        day.save(NOT_DONE)
        for part in parts:
            print(f"{day.deadline.spent():4.0f} s  {part.__name__}", flush=True)
            part(day)
        state = "Done"
        day.save(state)
        day.plot()
    finally:
        day.save(state)
    print(gpu_report.table(("what", "result"), gpu_report.summary(day.findings)))
    for what, why in day.findings.wrong().items():
        print(f"failed: {what}: {why}")
    return 1 if day.findings.wrong() else 0


def main() -> int:
    options = parse_flags(sys.argv[1:])
    deadline = Deadline(options.seconds)
    if not options.tiny:
        check_cuda()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # an earlier day's would pass for this one's
        (options.out / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_day.", ignore_cleanup_errors=True) as scratch:
        return run(Day(options.out.absolute(), deadline, Path(scratch), options.tiny))


if __name__ == "__main__":
    sys.exit(run_command(main))
