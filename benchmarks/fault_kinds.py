"""What is done to runs, one trial a call: killed, stopped, files damaged, the disk full or read-only."""

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.fault_runs import (
    PER_EPOCH,
    STEPS,
    Bench,
    Ended,
    being_written,
    cut,
    flip,
    interrupt,
    left_by,
    steps_done,
    wait,
    wait_until,
)
from training.signals import SIGNALS

RIGHT, REFUSED = "right", "refused"


@dataclass(frozen=True)
class Trial:
    """`outcome` is RIGHT, REFUSED (one line, non-zero exit) or what went wrong."""

    kind: str
    detail: str
    outcome: str


@dataclass(frozen=True)
class Victim:
    """What trials start from: the bench, a run that was stopped, one that ended, and what that left."""

    bench: Bench
    stopped: Path
    finished: Path
    whole: Mapping[str, object]

    def copy(self, name: str, of: Path | None = None) -> Path:
        return Path(shutil.copytree(of or self.stopped, self.bench.path / name))

    def judge(self, ended: Ended, folder: Path) -> str:
        if ended.code == 0:
            return RIGHT if left_by(folder) == self.whole else "another result"
        return REFUSED if ended.refusal() else unclear(ended)

    def goes_on(self, folder: Path) -> str:
        """What becomes of a run that nothing keeps from ending well."""
        outcome = self.judge(ended := self.bench.run(self.bench.command(folder)), folder)
        return outcome if outcome == RIGHT else f"did not go on: {outcome} {ended.err[-300:]}"


def unclear(ended: Ended) -> str:
    return "hangs" if ended.code is None else f"exit {ended.code}: {ended.err.strip()[-300:]}"


def loading(folder: Path, chance: random.Random, process: subprocess.Popen) -> None:
    pause, until = chance.uniform(0, 4), time.monotonic()
    wait_until(lambda: time.monotonic() > until + pause or steps_done(folder) > 0, process, 0.002)


def a_step(folder: Path, chance: random.Random, process: subprocess.Popen) -> None:
    step = chance.randrange(1, STEPS)
    wait_until(lambda: steps_done(folder) >= step, process, 0.0005)
    time.sleep(chance.uniform(0, 0.02))


def scoring(folder: Path, chance: random.Random, process: subprocess.Popen) -> None:
    step = PER_EPOCH * chance.randrange(1, STEPS // PER_EPOCH + 1)
    wait_until(lambda: steps_done(folder) >= step, process, 0.0005)
    time.sleep(chance.uniform(0, 0.05))


def writing(what: str, folder: Path, chance: random.Random, process: subprocess.Popen) -> None:
    """Its temporary file has appeared, after some step."""
    step = chance.randrange(0, STEPS - 2)
    wait_until(lambda: steps_done(folder) >= step, process, 0.0005)
    place, _, name = what.rpartition("/")
    wait_until(being_written(folder / place, name), process, 0)


def results(folder: Path, chance: random.Random, process: subprocess.Popen) -> None:
    wait_until(being_written(folder, "predictions"), process, 0)
    time.sleep(chance.uniform(0, 0.1))


MOMENTS: dict[str, Callable[[Path, random.Random, subprocess.Popen], None]] = {
    "a step": a_step,
    "writing a checkpoint": partial(writing, "checkpoint/state"),
    "scoring": scoring,
    "writing the history": partial(writing, "metrics"),
    "loading": loading,
    "writing the results": results,
}


def kill(victim: Victim, moment: str, chance: random.Random, name: str) -> Trial:
    """kill -9, then --resume to the end."""
    folder = victim.bench.path / name
    process = victim.bench.start(victim.bench.command(folder))
    MOMENTS[moment](folder, chance, process)
    interrupt(process, signal.SIGKILL)
    wait(process)
    torn = [path.name.split(".")[1] for path in folder.rglob(".*") if path.is_file()]
    detail = f"after step {steps_done(folder)}" + (f", writing {' and '.join(torn)}" if torn else "")
    return Trial(f"kill -9: {moment}", detail, victim.goes_on(folder))


def stop(victim: Victim, moment: str, chance: random.Random, name: str, twice: bool) -> Trial:
    """SIGINT, SIGTERM or SIGHUP, once or a second time soon after, then --resume to the end."""
    folder, how = victim.bench.path / name, chance.choice(SIGNALS)
    process = victim.bench.start(victim.bench.command(folder))
    time.sleep(0.3)  # before that it is Python that starts, and not yet a run
    MOMENTS[moment](folder, chance, process)
    interrupt(process, how)
    if twice:
        time.sleep(chance.uniform(0, 0.02))
        interrupt(process, how)
    ended = wait(process)
    kind = f"{'two signals' if twice else 'a signal'}: {moment}"
    detail = f"{how.name} after step {steps_done(folder)}, exit {ended.code}"
    # A second one may meet Python on its way out, and end it by itself: a shell shows the same code.
    codes = (0, 128 + how, -how) if twice else (0, 128 + how)
    if ended.code not in codes or len(ended.err.splitlines()) > 1:
        return Trial(kind, detail, unclear(ended))
    return Trial(kind, detail, victim.goes_on(folder))


def damaged_checkpoint(
    victim: Victim, harm: Callable[[Path, random.Random], str], every: bool, chance: random.Random, name: str
) -> Trial:
    folder = victim.copy(name)
    saved = sorted((folder / "checkpoint").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    what = [harm(path, chance) for path in (saved if every else saved[-1:])]
    ended = victim.bench.run(victim.bench.command(folder))
    outcome = victim.judge(ended, folder)
    kind = f"checkpoint{'s all' if every else ''} {'cut' if harm is cut else 'flipped'}"
    expected = REFUSED if every else RIGHT
    return Trial(kind, what[0], outcome if outcome == expected else f"{outcome}: {unclear(ended)}")


def flipped_source(victim: Victim, kind: str, sources: Path, pattern: str, chance, name: str) -> Trial:
    """A file of the model or the data has changed since the run was stopped."""
    folder = victim.copy(name)
    path = chance.choice(sorted(sources.glob(pattern)))
    good = path.read_bytes()
    try:
        detail = flip(path, chance)
        ended = victim.bench.run(victim.bench.command(folder))
    finally:
        path.write_bytes(good)
    outcome = victim.judge(ended, folder)
    return Trial(kind, detail, outcome if outcome == REFUSED else f"{outcome}: {unclear(ended)}")


def flipped_cache(victim: Victim, chance: random.Random, name: str) -> Trial:
    """A downloaded model's file has changed since; a run by the model's name, without a network."""
    cache = victim.bench.path / name
    shutil.copytree(victim.bench.model, cache / "some--model@main")
    offline = {"MINIBERT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    bench = Bench(victim.bench.path, victim.bench.threads, {"model": "some/model"}, offline)
    record_hashes(cache / "some--model@main")
    path = chance.choice(sorted((cache / "some--model@main").glob("*")))
    detail = flip(path, chance)
    ended = bench.run(bench.command(victim.bench.path / f"{name}-run"))
    return Trial("cached model flipped", detail, REFUSED if ended.refusal() else unclear(ended))


def record_hashes(folder: Path) -> None:
    """hashes.json as a download writes it."""
    from minibert.files import write_json
    from minibert.hub import HASHES
    from minibert.verify import sha256

    hashes = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json({"repo": "some/model", "commit": "0" * 40, "sha256": hashes}, folder / HASHES)


def flipped_result(victim: Victim, pattern: str, chance: random.Random, name: str) -> Trial:
    """A file of a finished run has changed, then predict.py scores the dev set with it."""
    folder = victim.copy(name, victim.finished)
    detail = flip(chance.choice(sorted(folder.glob(pattern))), chance)
    asked = ["--input", str(victim.bench.data / "sts-dev.csv"), "--output", f"{folder}.csv"]
    ended = victim.bench.run(["predict.py", str(folder), *asked])
    outcome = REFUSED if ended.refusal() else unclear(ended)
    if ended.code == 0:
        same = Path(f"{folder}.csv").read_bytes() == victim.bench.path.joinpath("scored.csv").read_bytes()
        outcome = RIGHT if same else "another prediction"
    return Trial("finished run's file flipped", detail, outcome)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many KiB. Raises PermissionError where none may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        raise PermissionError from None
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(victim: Victim, chance: random.Random, name: str) -> Trial:
    """A disk with too little room, or files that may not be so large; with room again the run goes on."""
    place = victim.bench.path / name
    room = chance.randrange(4, 500)
    saved = victim.bench.path / f"{name}-saved"
    try:
        with small_disk(place, room):
            kind = "disk full (tmpfs)"
            ended = victim.bench.run(victim.bench.command(place / "run"))
            if (place / "run").exists():
                shutil.copytree(place / "run", saved)
    except PermissionError:
        kind, room = "disk full (RLIMIT_FSIZE)", room // 4
        limits = (room * 1024, room * 1024)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
        ended = victim.bench.run(victim.bench.command(saved), limit)
    detail = f"{room} KiB: {ended.err.strip().splitlines()[-1] if ended.err else 'enough'}"
    line = ended.refusal()
    if ended.code and not (line and str(place) in line):
        return Trial(kind, detail, unclear(ended))
    return Trial(kind, detail, victim.goes_on(saved))


def read_only(victim: Victim, chance: random.Random, name: str) -> Trial:
    """A stopped run on a file system, or in a folder, that may only be read."""
    place, kind = victim.bench.path / name, "read-only"
    try:
        with small_disk(place, 4096):
            shutil.copytree(victim.stopped, place / "run")
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True, capture_output=True)
            ended = victim.bench.run(victim.bench.command(place / chance.choice(["run", "new"])))
    except PermissionError:
        if os.geteuid() == 0:
            return Trial(kind, "root may write everywhere", "not tried")
        shutil.copytree(victim.stopped, place / "run")
        place.joinpath("run").chmod(0o555)
        ended = victim.bench.run(victim.bench.command(place / "run"))
        place.joinpath("run").chmod(0o755)
    return Trial(kind, ended.err.strip(), REFUSED if ended.refusal() else unclear(ended))
