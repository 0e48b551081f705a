"""How long one waits before anything happens: `python -m benchmarks.startup --out FILE.csv`.

Seconds from the start of a process: to the end of `train.py --help` or of imports, ours and the peer's (what
benchmarks/peer.py imports of transformers and PEFT), and to the first line of a run's steps.jsonl. `ratio`:
by what our imports take in the same round, the median with its range.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.flags import add_common, check_common, check_data, check_installed, log_beside
from benchmarks.machine import describe
from benchmarks.tables import show, with_range
from benchmarks.turns import ROOT, Log, Round, environment, paired, run, take_turns
from minibert.errors import InputError
from training.cli import Parser
from training.exit import run_command

COLUMNS = ("what", "seconds", "ratio")
IMPORTS = "our imports"
PEER = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding
import transformers.models.bert.modeling_bert
"""
COMMANDS = {
    "python": ("-c", ""),
    "train.py --help": ("train.py", "--help"),
    "import torch": ("-c", "import torch"),
    IMPORTS: ("-c", "import training.run"),
    "the peer's imports": ("-c", PEER),
}
FIRST_STEP = "train.py, to its first step"
POLL = 0.002  # seconds


def command_seconds(command: Sequence[str], threads: int, i: int) -> dict:
    started = time.perf_counter()
    run(command, threads)
    return {"seconds": time.perf_counter() - started}


def first_step_seconds(data: str, model: str, threads: int, i: int) -> dict:
    """Until there is a line in steps.jsonl; the run is ended then.

    Raises:
        InputError: if it ends without one.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["train.py", "--method", "lora", "--max-length", "128", "--data", data, "--model", model]
        with open(Path(folder) / "said", "w+") as said:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command, "--out", str(out)],
                cwd=ROOT,
                env=environment(threads),
                stdout=said,
                stderr=said,
            )
            try:
                while not (out / "steps.jsonl").exists():
                    if process.poll() is not None:
                        said.seek(0)
                        last = (said.read().strip().splitlines() or ["train.py said nothing"])[-1]
                        raise InputError(last.removeprefix("error: "))
                    time.sleep(POLL)
                return {"seconds": time.perf_counter() - started}
            finally:
                process.kill()
                process.wait()


def rows(rounds: Sequence[Round]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            with_range([one[name]["seconds"] for one in rounds]),
            with_range(paired(rounds, name, IMPORTS, "seconds")),
        )
        for name in rounds[0]
    ]


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a value that makes no sense."""
    parser = Parser(
        prog="python -m benchmarks.startup",
        description="How long train.py and imports take, ours and the peer's.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, help="of the run whose first step is waited for [built-in data]")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="of that run")
    add_common(parser, rounds=5)
    given = parser.parse_args(arguments)
    check_common(given)
    check_data(given.data)
    return given


def main() -> int:
    given = parse_flags(sys.argv[1:])
    check_installed("transformers", "peft")
    data = str(given.data.absolute()) if given.data else "demo"
    model = str(Path(given.model).absolute()) if Path(given.model).is_dir() else given.model
    measures: dict[str, Callable[[int], dict]] = {
        name: partial(command_seconds, command, given.threads) for name, command in COMMANDS.items()
    }
    measures[FIRST_STEP] = partial(first_step_seconds, data, model, given.threads)
    machine = describe(given.threads)
    log = Log(log_beside(given.out), {"model": given.model, "data": Path(data).name, "machine": machine})
    show(COLUMNS, rows(take_turns(measures, given.rounds, log)), machine, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
