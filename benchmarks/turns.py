"""Measurements taken in turn, each by a process of its own, and kept: a stopped benchmark goes on.

What else the machine does hits neighbours alike, so two are compared within a round and never across.
Imports no torch.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import PIPE, Popen

from minibert.errors import InputError
from minibert.files import read_text, write_text

ROOT = Path(__file__).parents[1]
Round = Mapping[str, dict]  # what was measured, by name


class Log:
    """A file of lines: the settings and the machine first, then round, name and what came out, as JSON.

    Raises:
        InputError: if the file holds another benchmark, or none.
    """

    def __init__(self, path: Path | None, about: Mapping[str, object]):
        self.path, self.about = path, json.loads(json.dumps(about))
        self.measured: dict[tuple[int, str], dict] = {}
        if path and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            before, *lines = map(json.loads, read_text(path).splitlines())
            self.measured = {(one["round"], one["name"]): one["measured"] for one in lines}
            differing = [name for name in self.about | before if self.about.get(name) != before.get(name)]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: expected the log of a benchmark, got something else") from None
        if differing:
            name = differing[0]
            now, then = self.about.get(name), before.get(name)
            raise InputError(
                f"{path}: was measured with {name} {then!r}, now it is {now!r}; use another --out"
            )

    def add(self, turn: int, name: str, measured: dict) -> None:
        self.measured[turn, name] = measured
        if self.path:
            lines = [self.about]
            lines += [{"round": i, "name": n, "measured": one} for (i, n), one in self.measured.items()]
            write_text("".join(json.dumps(line) + "\n" for line in lines), self.path)


def take_turns(measures: Mapping[str, Callable[[int], dict]], rounds: int, log: Log) -> list[Round]:
    """What each of `measures`, called with the round, gives in each; whose turn is first rotates.

    What the log has already is not measured again.
    """
    names = list(measures)
    for i in range(rounds):
        shift = i % len(names)
        for name in (*names[shift:], *names[:shift]):
            if (i, name) not in log.measured:
                print(f"round {i + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                log.add(i, name, measures[name](i))
    return [{name: log.measured[i, name] for name in names} for i in range(rounds)]


def paired(rounds: Sequence[Round], name: str, against: str, key: str) -> list[float]:
    """The ratio of two in each round."""
    return [one[name][key] / one[against][key] for one in rounds]


def environment(threads: int) -> dict[str, str]:
    """Of a process that is measured."""
    ours = dict(os.environ, OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    # `run_command` sets it for our programs; what is compared with them keeps PyTorch's own default.
    ours.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    return ours


def run(command: Sequence[str], threads: int) -> str:
    """What a program of this project says on stdout, run by this Python with so many threads.

    Raises:
        InputError: if it fails, with its last error or else its last line.
    """
    return run_together([command], threads)[0]


def run_together(commands: Sequence[Sequence[str]], threads: int) -> list[str]:
    """The same of several, side by side; none is left running."""
    asked = {"cwd": ROOT, "env": environment(threads), "stdout": PIPE, "stderr": PIPE, "text": True}
    with ExitStack() as until_ended:
        started = [until_ended.enter_context(Popen([sys.executable, *words], **asked)) for words in commands]
        try:
            said = [program.communicate() for program in started]
        finally:
            for program in started:
                program.kill()  # what has ended is left alone
    for words, program, (_, errors) in zip(commands, started, said, strict=True):
        if program.returncode:
            raise InputError(f"{' '.join(words[:2])}: {why_ended(program.returncode, errors)}")
    return [output for output, _ in said]


def why_ended(code: int, errors: str) -> str:
    """The last line of a program's errors that says something, and how it ended."""
    how = signal.Signals(-code).name if code < 0 else f"exit {code}"
    said = [line.strip() for line in errors.splitlines() if any(map(str.isalnum, line))]
    own = [line for line in said if line.startswith("error: ")]  # of torchrun's processes, before its own
    return f"{(own or said or ['it said nothing'])[-1].removeprefix('error: ')} ({how})"


def run_json(command: Sequence[str], threads: int) -> dict:
    """The JSON object in the last line of what a program says."""
    return json.loads(run(command, threads).splitlines()[-1])
