"""Runs to do harm to: a tiny model and a little data, a run as a process, and what became of it.

Imports no torch in this process: what is done to a run is done from outside.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.turns import ROOT, environment, run

ROWS = {"train": 48, "dev": 40, "test-student": 8}
BATCH, EPOCHS = 8, 3
PER_EPOCH = ROWS["train"] // BATCH
STEPS = PER_EPOCH * EPOCHS
LIMIT = 300  # seconds: what takes longer hangs
WRITE_MODEL = (
    "import sys; from pathlib import Path; from benchmarks.models import write_random_model;"
    "from minibert.model import BertConfig;"
    "write_random_model(Path(sys.argv[1]), BertConfig(hidden_size=32, num_hidden_layers=2,"
    " num_attention_heads=4, intermediate_size=64))"
)


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None  # None: it hung
    err: str

    def refusal(self) -> str | None:
        """The one line it says of why it failed; None if it did not fail in a line."""
        said = [line for line in self.err.splitlines() if line.startswith("error: ")]
        known = self.code in (1, 2) and len(said) == 1 and "Traceback" not in self.err
        return said[0] if known else None


@dataclass(frozen=True)
class Bench:
    """A folder with the model, the data and the runs of one benchmark."""

    path: Path
    threads: int = 1
    changes: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def data(self) -> Path:
        return self.path / "data"

    def prepare(self, model: Path | None) -> None:
        """Copies, as they are damaged too."""
        self.data.mkdir(parents=True)
        for source in (ROOT / "tasks" / "demo").glob("*.csv"):
            rows = next(count for split, count in ROWS.items() if source.stem.endswith(split))
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            (self.data / source.name).write_text("".join(lines[: rows + 1]), encoding="utf-8")
        if model:
            shutil.copytree(model, self.model)
        else:
            run(["-c", WRITE_MODEL, str(self.model)], self.threads)

    def command(self, out: Path, *more: str) -> list[str]:
        flags = {
            "model": self.model, "data": self.data, "batch-size": BATCH, "epochs": EPOCHS, "lr": 0.01,
            "max-length": 64, "precision": "fp32", "checkpoint-steps": 2, "out": out,
        } | self.changes  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return ["train.py", *words, "--resume", *more]

    def start(self, command: Sequence[str], limit: Callable[[], None] | None = None) -> subprocess.Popen:
        def before() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
            if limit:
                limit()

        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment(self.threads) | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,
        )

    def run(self, command: Sequence[str], limit: Callable[[], None] | None = None) -> Ended:
        return wait(self.start(command, limit))


def wait(process: subprocess.Popen) -> Ended:
    try:
        _, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Ended(None, "")
    return Ended(process.returncode, err)


def left_by(folder: Path) -> dict[str, object]:
    """What must be the same, bit for bit: weights, predictions, and the lines but for their seconds."""
    if not (folder / "result.json").exists():
        return {}
    places = ("head.safetensors", "predictions-*.csv", "adapter*/*", "model/*")
    found: dict[str, object] = {
        str(path.relative_to(folder)): path.read_bytes() for place in places for path in folder.glob(place)
    }
    for name in ("metrics.jsonl", "steps.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        found[name] = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
    return found


def wait_until(happens: Callable[[], bool], process: subprocess.Popen, pause: float) -> bool:
    """False if the process ended before."""
    while not happens():
        if process.poll() is not None:
            return False
        if pause:
            time.sleep(pause)
    return True


def steps_done(folder: Path) -> int:
    path = folder / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def being_written(folder: Path, of: str) -> Callable[[], bool]:
    """Whether a temporary file lies there; fast, as it lies there for a millisecond."""

    def look() -> bool:
        try:
            return any(name.startswith(f".{of}") for name in os.listdir(folder))
        except FileNotFoundError:
            return False

    return look


def cut(path: Path, chance: random.Random) -> str:
    size = chance.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def flip(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = chance.randrange(len(content)), chance.randrange(8)
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path.name}"


def interrupt(process: subprocess.Popen, how: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(how)
