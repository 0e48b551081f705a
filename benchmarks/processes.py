"""What several processes are worth: `python -m benchmarks.processes --data FOLDER --out FILE.csv`.

The same run of train.py, alternating: by one process of one thread, by one of as many threads as there are
processes in the third, by torchrun in processes of one thread each, and as so many runs side by side, which
have nothing to do with each other: what the machine has to give, as its cores share caches and memory.
Batches are the same in all. `ratio`: tokens a second by those of the first in the same round, the median
with its range.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.flags import check_common, check_data, check_least, log_beside
from benchmarks.machine import describe
from benchmarks.tables import show, with_range
from benchmarks.turns import Log, Round, paired, run_together, take_turns
from training.cli import Parser
from training.exit import run_command
from training.machine import cores

COLUMNS = ("runs", "processes of each", "threads of each", "tokens/s", "ratio")


def variants(count: int) -> dict[str, tuple[int, int, int]]:
    """Name -> runs, processes and threads of each; the first is what the others are compared with."""
    told = [(1, 1, 1), (1, 1, count), (1, count, 1), (count, 1, 1)]
    return {" by ".join(map(str, one)): one for one in told}


def measure(runs: int, processes: int, threads: int, words: Sequence[str], i: int) -> dict:
    """The tokens a second of all runs together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "train.py", *words, "--seed", str(i)]
    with tempfile.TemporaryDirectory() as among:
        folders = [Path(among) / str(number) for number in range(runs)]
        run_together([[*command, "--out", str(folder)] for folder in folders], threads)
        results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    return {"tokens_per_second": sum(result["tokens_per_second"] for result in results)}


def rows(rounds: Sequence[Round], count: int) -> list[tuple[str, ...]]:
    first, *_ = variants(count)
    lines = []
    for name, sizes in variants(count).items():
        rates = with_range([one[name]["tokens_per_second"] for one in rounds], 0)
        ratio = with_range(paired(rounds, name, first, "tokens_per_second"))
        lines.append((*map(str, sizes), rates, ratio))
    return lines


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a value that makes no sense."""
    parser = Parser(
        prog="python -m benchmarks.processes",
        description="The speed of a run in one process and in several.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, help="the folder of the STS files [the built-in data]")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a name or a folder")
    parser.add_argument("--method", choices=("lora", "dora", "full"), default="lora")
    parser.add_argument("--processes", type=int, default=max(2, cores()), help="[all cores]")
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together (32)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of an example (256)")
    parser.add_argument("--steps", type=int, default=60, help="of each run (60)")
    parser.add_argument("--rounds", type=int, default=3, help="each has a turn in each (3)")
    parser.add_argument("--out", type=Path, help="write the table there, as CSV, and keep a log beside it")
    given = parser.parse_args(arguments)
    given.threads = given.processes
    check_common(given)
    check_data(given.data)
    check_least(processes=(given.processes, 2), steps=(given.steps, 1))
    check_least(batch_size=(given.batch_size, given.processes))
    return given


def main() -> int:
    given = parse_flags(sys.argv[1:])
    data = str(given.data.absolute()) if given.data else "demo"
    model = str(Path(given.model).absolute()) if Path(given.model).is_dir() else given.model
    words = ["--task", "sts", "--method", given.method, "--model", model, "--data", data]
    words += ["--batch-size", str(given.batch_size), "--max-steps", str(given.steps)]
    words += ["--max-length", str(given.max_length)]
    measures: dict[str, Callable[[int], dict]] = {
        name: partial(measure, *how, words) for name, how in variants(given.processes).items()
    }
    machine = describe(given.processes)
    asked = ("method", "processes", "batch_size", "max_length", "steps", "model")
    about = {name: getattr(given, name) for name in asked} | {"data": Path(data).name, "machine": machine}
    log = Log(log_beside(given.out), about)
    show(COLUMNS, rows(take_turns(measures, given.rounds, log), given.processes), machine, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
