"""Training against transformers + PEFT: `python -m benchmarks.train_speed --data FOLDER --out FILE.csv`.

Same task, rows, model, batch size, length, rank, learning rate and dropout; each measurement is a process of
its own (train.py, or benchmarks/peer.py), and they take turns, round by round. `ratio`: a variant's seconds
by ours in the same round, the median over rounds with its range. `of bf16` and `of fp32`: the seconds that
the encoder's matrix products alone would take at the machine's rate (benchmarks/machine.py, measured in each
round), as a share of the seconds taken. FILE.jsonl beside FILE.csv keeps every process's numbers, and the
same command goes on from there. Imports no torch before something is measured.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks.flags import (
    add_common,
    check_common,
    check_data,
    check_installed,
    check_least,
    log_beside,
)
from benchmarks.machine import describe
from benchmarks.tables import show
from benchmarks.train_results import (
    COLUMNS,
    FLOPS,
    RATES,
    VARIANTS,
    plot,
    rates_line,
    rows,
    variants_of,
    verdict,
)
from benchmarks.turns import Log, run, run_json, take_turns
from lora.methods import METHODS
from minibert.errors import InputError
from minibert.files import check_output
from tasks import TASKS
from training.cli import Parser
from training.exit import run_command
from training.machine import has_bf16

RANDOM_BASE = "bert-base-random"  # the shapes of bert-base, without a download


def ours(words: Sequence[str], threads: int) -> dict:
    """A run of train.py, in the peer's terms; its folder is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        run(["train.py", *words, "--pooling", "mean", "--out", str(out)], threads)
        result = json.loads((out / "result.json").read_text())
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    kept = ("tokens_per_second", "memory_above_start_mib", "trainable_parameters", "precision")
    return {
        "epoch_seconds": result["train_seconds"] / result["epochs"],
        "tokens": sum(step["tokens"] for step in steps),
        "dev": last["dev"],
        "loss": last["loss"],
    } | {name: result[name] for name in kept}


def peer(words: Sequence[str], threads: int) -> dict:
    return run_json(["-m", "benchmarks.peer", *words], threads)


def measures(given: argparse.Namespace, model: str, data: Path) -> dict[str, Callable[[int], dict]]:
    """All that takes turns, by name; each is called with the round, which is its seed too."""
    programs = {"ours": ours, "peer": peer}
    settings = ["--task", given.task, "--model", model, "--data", str(data), "--epochs", str(given.epochs)]
    settings += ["--max-length", str(given.max_length), "--batch-size", str(given.batch_size)]
    settings += ["--device", given.device]
    todo: dict[str, Callable[[int], dict]] = {
        RATES: lambda i: run_json(["-m", "benchmarks.machine", given.device], given.threads)
    }

    def measure(program: str, words: Sequence[str], i: int) -> dict:
        return programs[program]([*words, "--seed", str(i)], given.threads)

    for method in given.methods:
        words = [*settings, "--method", method, "--lr", str(METHODS[method].lr)]
        for name in variants_of(method, given.variants):
            program, *own = VARIANTS[name]
            todo[f"{method}: {name}"] = partial(measure, program, [*words, *own])
    return todo


def first_rows(source: Path, files: Mapping[str, str], count: int | None, folder: Path) -> Path:
    """A folder with a task's files, of the training file its first rows alone; for both sides to read."""
    if count is None:
        return source
    for split in ("train", "dev"):
        try:
            with open(source / files[split], encoding="utf-8-sig") as file:
                lines = file.readlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source / files[split]}: cannot be read ({error})") from None
        kept = lines[: count + 1] if split == "train" else lines
        (folder / files[split]).write_text("".join(kept), encoding="utf-8")
    return folder


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a value that makes no sense."""
    parser = Parser(
        prog="python -m benchmarks.train_speed",
        description="Training speed, memory and score against transformers + PEFT.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, help="the folder of the task's files [the built-in data]")
    parser.add_argument("--task", choices=TASKS, default="sts")
    parser.add_argument("--methods", nargs="+", choices=FLOPS, default=list(FLOPS), metavar="METHOD")
    variants = ", ".join(f'"{name}"' for name in VARIANTS)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=[name for name, words in VARIANTS.items() if has_bf16() or "bf16" not in words],
        metavar="NAME",
        help=f"some of {variants}; ours in any case [all that this CPU has instructions for]",
    )
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help=f"a name, a folder or {RANDOM_BASE}")
    parser.add_argument("--examples", type=int, help="the first so many training rows [all]")
    parser.add_argument("--epochs", type=int, default=1, help="of each process (1)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    add_common(parser)
    parser.add_argument("--plot", type=Path, help="draw the tokens a second there, as PNG (matplotlib)")
    given = parser.parse_args(arguments)
    check_common(given)
    check_data(given.data)
    check_output(given.plot, "--plot")
    least = {"epochs": 1, "batch_size": 1, "max_length": 4} | (
        {} if given.examples is None else {"examples": 2}
    )
    check_least(**{name: (getattr(given, name), number) for name, number in least.items()})
    return given


def main() -> int:
    given = parse_flags(sys.argv[1:])
    check_installed("transformers", "peft")
    from benchmarks.models import product_weights, write_random_model
    from minibert.hub import resolve
    from minibert.model import BertConfig
    from training.build import DEMO

    machine = describe(given.threads)
    asked = (
        "task",
        "methods",
        "variants",
        "model",
        "examples",
        "epochs",
        "batch_size",
        "max_length",
        "device",
    )
    source = (given.data or DEMO).absolute()
    about = {name: getattr(given, name) for name in asked} | {"data": source.name, "machine": machine}
    log = Log(log_beside(given.out), about)
    with tempfile.TemporaryDirectory() as kept:
        for name in ("model", "data"):
            (Path(kept) / name).mkdir()
        if given.model == RANDOM_BASE:
            model = write_random_model(Path(kept) / "model", BertConfig())
        else:
            model = resolve(given.model).absolute()
        data = first_rows(source, TASKS[given.task].files, given.examples, Path(kept) / "data")
        rounds = take_turns(measures(given, str(model), data), given.rounds, log)
        weights = product_weights(model)
    show(COLUMNS, rows(rounds, given.methods, weights), machine, given.out)
    for method in given.methods:
        if said := verdict(rounds, method):
            print(said)
    print(rates_line(rounds))
    if given.plot:
        plot(rounds, given.methods, weights, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
