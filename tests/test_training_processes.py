"""A run of two processes is the run of one: its steps, its files, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared_steps import NO_DROPOUT, SHARED, STEPS, steps
from small_runs import call, column, flags, strict_json

import train
from training.errors import TrainingError
from training.processes import Processes, joined, not_from_torchrun, others_there

ROOT = Path(__file__).parents[1]
UNTIL_FULL = ROOT / "tests" / "run_until_full.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*arguments: object, **more) -> subprocess.CompletedProcess:
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **more)


@pytest.fixture(scope="module")
def by_two(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two processes computed in each case."""
    out = tmp_path_factory.mktemp("steps")
    ended = torchrun(ROOT / "tests" / "shared_steps.py", tiny, small_data, out)
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.mark.parametrize("case", SHARED)
def test_every_step_has_the_loss_and_the_gradient_of_one_process(
    case: str, by_two: Path, tiny: Path, small_data: Path
) -> None:
    alone = steps(tiny, small_data, SHARED[case])
    for rank in (0, 1):
        shared = load_file(by_two / f"{case}-{rank}.safetensors")
        assert shared.keys() == alone.keys()
        assert len(shared["loss"]) == STEPS
        for name, values in alone.items():
            difference = torch.linalg.vector_norm(shared[name] - values)
            assert difference <= 1e-6 * torch.linalg.vector_norm(values), (rank, name)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells the names of threads")
def test_no_thread_that_talks_to_others_is_left_when_the_work_is_done(by_two: Path) -> None:
    """One that frees a tensor while Python ends would abort the process."""
    for rank in (0, 1):
        names = (by_two / f"threads-{rank}").read_text()
        assert "python" in names
        assert "gloo" not in names


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """Up to rounding in fp32."""
    steps, others = (lines_of(folder / "steps.jsonl") for folder in (one, other))
    for name in ("step", "task", "tokens", "lr"):
        assert [line[name] for line in steps] == [line[name] for line in others]
    for name in ("loss", "grad_norm"):
        values = [[line[name] for line in lines] for lines in (steps, others)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5)
    for file in sorted(path.name for path in one.glob("predictions-*")):
        assert column(one / file, "id") == column(other / file, "id")
        said = [np.float64(column(folder / file, "prediction")) for folder in (one, other)]
        np.testing.assert_allclose(*said, atol=1e-3)


@pytest.mark.parametrize(
    "changes", [{"task": "sts", "method": "dora"}, {"task": "sst+sts", "method": "lora"}]
)
def test_a_run_of_two_processes_leaves_what_one_does(
    changes: dict, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes |= NO_DROPOUT
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "one", **changes)).code == 0
    ended = torchrun("train.py", *flags(tiny, small_data, out=tmp_path / "two", **changes), cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("written") == 1  # one process speaks
    assert_same_run(tmp_path / "one", tmp_path / "two")
    results = [strict_json((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [result["processes"] for result in results] == [1, 2]
    assert results[0]["rows"] == results[1]["rows"]
    assert not (tmp_path / "two" / "checkpoint").exists()


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_stopped_run_goes_on_in_another_number_of_processes(
    first: int, then: int, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    changes = {"task": "sts", "method": "lora", "epochs": 4, **NO_DROPOUT}
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "whole", **changes)).code == 0

    def go(processes: int, program: Sequence[str | Path], *more: str) -> subprocess.CompletedProcess:
        arguments = [*program, *flags(tiny, small_data, out=tmp_path / "run", **changes), *more]
        if processes == 2:
            return torchrun(*arguments, cwd=ROOT)
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT)

    ended = go(first, [UNTIL_FULL, "step"], "--checkpoint-steps", "2")
    assert ended.returncode == 1
    assert "No space left" in ended.stderr
    ended = go(then, ["train.py"], "--resume")
    assert ended.returncode == 0, ended.stderr
    assert f"processes {first}, now it is {then}" in ended.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_none_ends_well_if_the_first_cannot_write_the_end(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", task="sts", method="lora")
    ended = torchrun("--redirects", "3", "--log-dir", tmp_path / "log", UNTIL_FULL, "end", *arguments)
    assert ended.returncode == 1
    first, other = (
        next(tmp_path.glob(f"log/*/attempt_0/{rank}/stderr.log")).read_text() for rank in range(2)
    )
    assert first.endswith("error: No space left\n")
    assert other.splitlines()[-1].startswith("error: process 1 of 2: another process of the run has ended")
    assert not (tmp_path / "run" / "result.json").exists()


def wait_for(path: Path, *running: subprocess.Popen) -> None:
    """Until a run has done a step."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert all(process.poll() is None for process in running)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def pair(tiny: Path, small_data: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen]]:
    """Two processes of a long run, started as torchrun does but with nobody to watch them."""
    out = tmp_path / "run"
    arguments = flags(tiny, small_data, out=out, task="sts", method="lora", epochs=10**6)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "train.py", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            stdout=subprocess.DEVNULL, env=ENVIRONMENT | together | {"RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(2)
    ]  # fmt: skip
    wait_for(out / "steps.jsonl", *processes)
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_dies_the_other_ends_too_and_says_so(rank: int, pair: list) -> None:
    pair[rank].kill()
    other = 1 - rank
    _, err = pair[other].communicate(timeout=120)
    assert pair[other].returncode == 1, err
    said = f"error: process {other} of 2: another process of the run has ended or does not answer"
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("rank", "how"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGHUP)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(
    rank: int, how: signal.Signals, pair: list, tmp_path: Path
) -> None:
    pair[rank].send_signal(how)
    errs = [process.communicate(timeout=120)[1] for process in pair]
    assert [process.returncode for process in pair] == [128 + how] * 2, errs
    step = len(lines_of(tmp_path / "run" / "steps.jsonl"))
    assert f"{how.name}: stopped after step {step}, saved" in errs[0]
    assert errs[1] == ""
    assert list((tmp_path / "run" / "checkpoint").glob(f"step-{step}-*.safetensors"))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_torchrun_ends_with_the_process_that_dies(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", task="sts", method="lora", epochs=10**6)
    run = subprocess.Popen([*TORCHRUN, "train.py", *arguments], env=ENVIRONMENT, cwd=ROOT, text=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    wait_for(tmp_path / "run" / "steps.jsonl", run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = [int(one) for one in children if b"\0RANK=1\0" in Path(f"/proc/{one}/environ").read_bytes()]
    os.kill(*ranks, signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in err  # torchrun's own words
    assert not any(Path(f"/proc/{child}").exists() for child in children)


class TestRefuses:
    def test_fewer_examples_in_a_batch_than_processes(self, tiny: Path, small_data: Path, tmp_path: Path):
        ended = torchrun("train.py", *flags(tiny, small_data, out=tmp_path / "run", batch_size=1), cwd=ROOT)
        assert ended.returncode != 0
        assert "--batch-size: expected an example for each of 2 processes, got 1" in ended.stderr
        assert not (tmp_path / "run").exists()

    def test_one_batch_learnt_by_heart(self, tiny: Path, small_data: Path):
        ended = torchrun("train.py", *flags(tiny, small_data, overfit_batch=True), cwd=ROOT)
        assert "--overfit-batch: expected one process, got 2" in ended.stderr

    @pytest.mark.parametrize("count", ["2", "two", "-1", "0.5"])
    def test_several_processes_that_torchrun_did_not_start(
        self, count: str, tiny: Path, small_data: Path, monkeypatch
    ):
        monkeypatch.setenv("WORLD_SIZE", count)
        ended = call(train.main, *flags(tiny, small_data))
        assert ended.code == 2
        others = "RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR are not what torchrun sets"
        wanted = others if count == "2" else others.replace("RANK, ", "RANK, WORLD_SIZE, ", 1)
        assert wanted in ended.line

    @pytest.mark.parametrize(
        ("changes", "wrong"),
        [({"WORLD_SIZE": "0"}, "RANK, WORLD_SIZE are"), ({"RANK": "2"}, "RANK is"),
         ({"RANK": "-1"}, "RANK is"), ({"MASTER_PORT": "0"}, "MASTER_PORT is"),
         ({"MASTER_PORT": "65536"}, "MASTER_PORT is"),
         ({"MASTER_ADDR": ""}, "MASTER_ADDR is"), ({"LOCAL_RANK": ""}, "LOCAL_RANK is")],
    )  # fmt: skip
    def test_a_place_among_them_that_there_is_not(
        self, changes: dict, wrong: str, tiny: Path, small_data: Path, monkeypatch
    ):
        sound = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "h"}
        assert not_from_torchrun(sound) == []
        for name, value in (sound | changes).items():
            monkeypatch.setenv(name, value)
        ended = call(train.main, *flags(tiny, small_data))
        assert ended.code == 2
        assert f", but {wrong} not what torchrun sets" in ended.line

    def test_processes_that_were_told_different_things(self, refusal):
        class Told(Processes):
            def largest(self, value: int) -> int:
                return max(value, 5)

        assert "process 1 of 2: expected the settings" in refusal(Told(1, 2).check_same, {"seed": 1})


def test_a_defect_is_not_taken_for_another_processs_end():
    with pytest.raises(RuntimeError, match="shapes") as raised, others_there(Processes(0, 2)):
        raise RuntimeError("shapes do not match")
    assert not isinstance(raised.value, TrainingError)


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as processes:
        assert (processes.alone, processes.first) == (True, True)
        assert list(processes.mine("abc")) == list("abc")
