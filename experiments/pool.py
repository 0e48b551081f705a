"""Cells -> processes: each cell is a run of train.py, `jobs` of them side by side.

FOLDER/.grid/ has, for each cell, NAME.lock, NAME.log (what its run said), NAME.seconds (what its tries took
together) and, if the last one failed, NAME.error. The lock is held by the run's process too, so that it lasts
as long as either: a dead process blocks nobody, and a run that outlives its grid is not started twice. (That
is why it is not filelock's, which no child can hold.) Imports no torch before a run is started.
"""

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from experiments.cells import Cell
from minibert.errors import InputError
from training.signals import SIGNALS, stop_signals

POLL = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class GridFolder:
    """The places in a grid's folder."""

    path: Path

    def run(self, cell: str) -> Path:
        return self.path / cell

    def result(self, cell: str) -> Path:
        return self.path / cell / "result.json"

    def about(self, cell: str, what: str) -> Path:
        return self.path / ".grid" / f"{cell}.{what}"

    def make(self) -> None:
        """Raises:
        InputError: if it cannot be written.
        """
        try:
            (self.path / ".grid").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: {self.path} cannot be written ({error.strerror})") from None

    def lock(self, cell: str) -> IO | None:
        """The cell's lock, until it is closed; None if another has it."""
        file = open(self.about(cell, "lock"), "a")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def seconds(self, cell: str) -> float:
        """What the cell's tries have taken so far, from start to end, or nan if that is not known."""
        path = self.about(cell, "seconds")
        return float(path.read_text()) if path.is_file() else float("nan")

    def error(self, cell: str) -> str:
        """Why its last try failed; empty if it did not."""
        path = self.about(cell, "error")
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


class Work(Protocol):
    """What a pool asks of a grid or a search."""

    def take(self) -> tuple[Cell, IO] | None:
        """The next cell to start, with its lock; None if there is none now."""

    def expects_more(self) -> bool:
        """Whether there may be one later."""

    def prunes(self, cell: Cell) -> bool:
        """Whether the run of this cell is to be stopped for good."""

    def ended(self, cell: Cell, error: str) -> None:
        """Its run is done, has been pruned, or has failed by `error`."""


@dataclass
class Running:
    """A cell's run."""

    cell: Cell
    lock: IO
    process: subprocess.Popen
    started: float
    said_before: int  # bytes of its log by earlier tries
    asked: bool = False  # to stop; once, as a second signal would not let it save
    pruned: bool = False


def run_all(work: Work, folder: GridFolder, jobs: int = 1) -> int:
    """Run all that `work` gives; the signal that ended it before, or 0.

    At SIGINT, SIGTERM or SIGHUP no run is started any more, and those under way save and stop.
    """
    running: list[Running] = []
    with stop_signals() as stopped:
        try:
            while True:
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    finish(run, folder, work)
                while not stopped() and len(running) < jobs and (taken := work.take()):
                    running.append(start(*taken, folder, jobs))
                if not running and (stopped() or not work.expects_more()):
                    return stopped()
                for run in running:
                    if not run.asked and (stopped() or work.prunes(run.cell)):
                        run.asked, run.pruned = True, not stopped()
                        run.process.terminate()
                time.sleep(POLL)
        finally:
            for run in running:  # only if something went wrong here
                run.process.terminate()


def start(cell: Cell, lock: IO, folder: GridFolder, jobs: int) -> Running:
    log = folder.about(cell.name, "log")
    environment = dict(os.environ)
    if jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    with open(log, "ab") as said:
        process = subprocess.Popen(
            [sys.executable, *cell.command(folder.run(cell.name))],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches it through us alone
        )
        return Running(cell, lock, process, time.monotonic(), said.tell())


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def finish(run: Running, folder: GridFolder, work: Work) -> None:
    """Keep what it took and, if it failed, why, and give its lock back."""
    from minibert.files import write_text

    name, code = run.cell.name, run.process.returncode
    spent, before = time.monotonic() - run.started, folder.seconds(name)
    write_text(f"{spent + (0 if math.isnan(before) else before):.1f}\n", folder.about(name, "seconds"))
    finished = folder.result(name).exists()
    # Asked by us, or before us by whoever stopped us.
    stopped = run.asked and any(code in (128 + number, -number) for number in SIGNALS)
    error = ""
    if not finished and not stopped:
        error = last_words(folder.about(name, "log"), run.said_before, code)
        write_text(error + "\n", folder.about(name, "error"))
    else:
        folder.about(name, "error").unlink(missing_ok=True)
    if finished or error or run.pruned:
        work.ended(run.cell, error)
    run.lock.close()


def last_words(log: Path, begin: int, code: int) -> str:
    """A run's last line, or how it ended if it said nothing."""
    lines = log.read_bytes()[begin:].decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"{said[-1].removeprefix('error: ')} ({how})" if said else how
