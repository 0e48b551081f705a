"""Embeddings and pair scores a second against sentence-transformers: `python -m benchmarks.inference_speed`.

First what comes out is compared, then each side, in a process of its own, has its turn in each round:
benchmarks/inference.py. `ratio`: seconds by ours in the same precision and round, the median with its range.
`difference`: the largest from the peer's in fp32, of vectors of length 1 and of scores.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.flags import add_common, check_common, check_data, check_installed, check_least, log_beside
from benchmarks.machine import describe
from benchmarks.tables import show, with_range
from benchmarks.turns import Log, Round, paired, run_json, take_turns
from minibert.errors import InputError
from tasks import TASKS
from tasks.base import Example
from training.cli import Parser
from training.exit import run_command

COLUMNS = ("what", "precision", "side", "texts/s", "ratio", "difference")
PAIR_TASKS = [name for name, task in TASKS.items() if task.is_pair]
CLOSE = 1e-4  # in fp32; sums in another order differ by less


def name_of(what: str, precision: str, side: str) -> str:
    return f"{what}, {precision}: {side}"


def texts_of(examples: Sequence[Example]) -> dict[str, list]:
    """Every sentence once, and the pairs."""
    sentences = list(dict.fromkeys(text for example in examples for text in example.texts))
    return {"sentences": sentences, "pairs": [example.texts for example in examples]}


def differences(given: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The largest difference of each from the peer in fp32.

    Raises:
        InputError: if ours in fp32 is another than the peer's.
    """
    from minibert.files import read_safetensors

    came = {}
    for what in ("sentences", "pairs"):
        for precision in given.precisions:
            for side in ("peer", "ours"):
                file, name = folder / "out.safetensors", name_of(what, precision, side)
                print(f"what comes out: {name}", file=sys.stderr, flush=True)
                compute(given, folder, what, precision, side, 0, passes=0, save=file)
                came[name] = read_safetensors(file)["out"]
    against = {what: came[name_of(what, given.precisions[0], "peer")] for what in ("sentences", "pairs")}
    found = {name: float((one - against[name.partition(",")[0]]).abs().max()) for name, one in came.items()}
    for what in ("sentences", "pairs"):
        name = name_of(what, "fp32", "ours")
        if not found[name] <= CLOSE:
            raise InputError(f"{name}: expected the peer's within {CLOSE:g}, differs by {found[name]:.2g}")
    return found


def compute(
    given, folder: Path, what: str, precision: str, side: str, i: int, passes: int, save=None
) -> dict:
    words = ["--folder", str(folder), "--texts", str(folder / "texts.json"), "--passes", str(passes)]
    words += ["--what", what, "--precision", precision, "--side", side, "--max-length", str(given.max_length)]
    words += ["--device", given.device]
    words += ["--save", str(save)] if save else []
    measured = run_json(["-m", "benchmarks.inference", *words], given.threads)
    return measured | {"mean": sum(measured["seconds"]) / passes if passes else 0.0}


def rows(
    rounds: Sequence[Round], precisions: Sequence[str], found: dict[str, float]
) -> list[tuple[str, ...]]:
    lines = []
    for what in ("sentences", "pairs"):
        for precision in precisions:
            ours = name_of(what, precision, "ours")
            for side in ("ours", "peer"):
                name = name_of(what, precision, side)
                rate = median(one[name]["texts"] / one[name]["mean"] for one in rounds)
                ratio = with_range(paired(rounds, name, ours, "mean"))
                lines.append((what, precision, side, f"{rate:.0f}", ratio, f"{found[name]:.1e}"))
    return lines


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a value that makes no sense."""
    parser = Parser(
        prog="python -m benchmarks.inference_speed",
        description="Embeddings and pair scores a second against sentence-transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, help="the folder of the task's files [the built-in data]")
    parser.add_argument("--task", choices=PAIR_TASKS, default="sts", help="whose dev pairs are read (sts)")
    parser.add_argument("--split", choices=("train", "dev"), default="dev")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder")
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), help="[both, if the CPU lists bf16]"
    )
    parser.add_argument("--examples", type=int, help="the first so many pairs [all]")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--passes", type=int, default=3, help="over all texts, in each turn (3)")
    add_common(parser)
    given = parser.parse_args(arguments)
    check_common(given)
    check_data(given.data)
    check_least(max_length=(given.max_length, 4), passes=(given.passes, 1))
    if given.examples is not None:
        check_least(examples=(given.examples, 1))
    return given


def main() -> int:
    given = parse_flags(sys.argv[1:])
    check_installed("sentence_transformers")
    from benchmarks.inference import write_folders
    from minibert.files import write_json
    from minibert.hub import resolve
    from tasks.reader import read_examples
    from training.build import DEMO
    from training.machine import has_bf16

    wanted = given.precisions or (["fp32", "bf16"] if has_bf16() else ["fp32"])
    given.precisions = [
        "fp32",
        *(["bf16"] if "bf16" in wanted else []),
    ]  # the peer's fp32 is what is compared with
    task, source = TASKS[given.task], (given.data or DEMO).absolute()
    examples, _ = read_examples(source / task.files[given.split], task, labelled=True)
    asked = ("task", "split", "model", "precisions", "examples", "max_length", "passes", "device")
    machine = describe(given.threads)
    about = {name: getattr(given, name) for name in asked} | {"data": source.name, "machine": machine}
    log = Log(log_beside(given.out), about)
    names = [
        (w, p, side) for w in ("sentences", "pairs") for p in given.precisions for side in ("ours", "peer")
    ]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        write_folders(resolve(given.model), folder, given.max_length)
        write_json(texts_of(examples[: given.examples]), folder / "texts.json")
        found = differences(given, folder)
        measures = {
            name_of(*one): partial(compute, given, folder, *one, passes=given.passes) for one in names
        }
        rounds = take_turns(measures, given.rounds, log)
    show(COLUMNS, rows(rounds, given.precisions, found), machine, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
