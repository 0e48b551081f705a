"""Runs harmed on purpose: killed, stopped, damaged, out of room. `python -m benchmarks.faults --kills 50`

Each trial is to end in the result of the run that nothing happened to, bit for bit, or in one clear line and
a non-zero exit; never in a traceback, a hang or another result. The model is tiny and the data few rows of
the built-in, so that a run's steps take milliseconds and its writing is most of what there is to hit.
"""

import argparse
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.fault_kinds import (
    MOMENTS,
    REFUSED,
    RIGHT,
    Trial,
    Victim,
    damaged_checkpoint,
    flipped_cache,
    flipped_result,
    flipped_source,
    full_disk,
    kill,
    read_only,
    stop,
)
from benchmarks.fault_runs import Bench, cut, flip, interrupt, left_by, steps_done, wait, wait_until
from benchmarks.flags import check_least
from benchmarks.machine import describe
from benchmarks.tables import show
from minibert.errors import InputError
from minibert.files import check_output
from training.cli import Parser
from training.exit import run_command

COLUMNS = ("fault", "trials", "right result", "one line", "anything else")
SAYS_WRONG = 3  # of the trials that ended otherwise, shown whole


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.faults", description="Harm runs on purpose.", allow_abbrev=False
    )
    parser.add_argument(
        "--kills", type=int, default=50, help="kill -9, at a moment of each kind in turn (50)"
    )
    parser.add_argument("--trials", type=int, default=5, help="of each other fault; 0 for kills alone (5)")
    parser.add_argument("--method", default="lora", help="the runs' method (lora)")
    parser.add_argument("--model", type=Path, help="a model folder [a tiny one, random]")
    parser.add_argument("--seed", type=int, default=0, help="of moments, places and bits (0)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (1)")
    parser.add_argument("--out", type=Path, help="write the table there, as CSV")
    given = parser.parse_args(arguments)
    check_least(kills=(given.kills, 0), trials=(given.trials, 0), threads=(given.threads, 1))
    check_output(given.out, "--out")
    if given.model and not given.model.is_dir():
        raise InputError(f"--model: expected a folder, got {str(given.model)!r}")
    return given


def victim_of(bench: Bench) -> Victim:
    """The run that nothing happens to, one stopped in its midst, and what the former predicts."""
    finished, stopped = bench.path / "finished", bench.path / "stopped"
    ended = bench.run(bench.command(finished))
    if ended.code:
        raise InputError(f"a run that nothing happened to failed: {ended.err.strip()}")
    process = bench.start(bench.command(stopped))
    wait_until(lambda: steps_done(stopped) >= 9, process, 0.0005)
    interrupt(process, signal.SIGTERM)
    wait(process)
    asked = ["--input", str(bench.data / "sts-dev.csv"), "--output", str(bench.path / "scored.csv")]
    bench.run(["predict.py", str(finished), *asked])
    return Victim(bench, stopped, finished, left_by(finished))


def trials(victim: Victim, kills: int, others: int, seed: int) -> Iterator[Trial]:
    moments, model, data = list(MOMENTS), victim.bench.model, victim.bench.data
    planned = [partial(kill, victim, moments[i % len(moments)]) for i in range(kills)]
    each = [
        *(partial(stop, victim, moment, twice=twice) for twice in (False, True) for moment in moments),
        *(
            partial(damaged_checkpoint, victim, harm, every)
            for every in (False, True)
            for harm in (cut, flip)
        ),
        partial(flipped_source, victim, "model flipped", model, "*"),
        partial(flipped_source, victim, "data flipped", data, "sts-*"),
        partial(flipped_cache, victim),
        partial(flipped_result, victim, "adapter/*"),
        partial(flipped_result, victim, "[ch]*.*"),
        partial(full_disk, victim),
        partial(read_only, victim),
    ]
    planned += [one for one in each for _ in range(others)]
    for i, trial in enumerate(planned):
        done = trial(chance=random.Random(f"{seed}/{i}"), name=f"trial{i}")
        print(f"{i + 1} of {len(planned)}: {done.kind}: {done.detail}: {done.outcome}", file=sys.stderr)
        for path in victim.bench.path.glob(f"trial{i}*"):
            shutil.rmtree(path, ignore_errors=True)
        yield done


def rows(done: list[Trial]) -> list[tuple[str, ...]]:
    lines = []
    for kind in dict.fromkeys(trial.kind for trial in done):
        outcomes = [trial.outcome for trial in done if trial.kind == kind]
        right, refused = outcomes.count(RIGHT), outcomes.count(REFUSED)
        numbers = (len(outcomes), right, refused, len(outcomes) - right - refused)
        lines.append((kind, *map(str, numbers)))
    return lines


def main() -> int:
    given = parse_flags(sys.argv[1:])
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), given.threads, {"method": given.method})
        bench.prepare(given.model)
        done = list(trials(victim_of(bench), given.kills, given.trials, given.seed))
    show(COLUMNS, rows(done), describe(given.threads), given.out)
    wrong = [trial for trial in done if trial.outcome not in (RIGHT, REFUSED)]
    for trial in wrong[:SAYS_WRONG]:
        print(f"{trial.kind}: {trial.detail}: {trial.outcome}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
