"""A grid's runs: each once, whoever runs them; what fails stops nothing, and what is stopped goes on."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from small_runs import Ended, call, checkpoints, flags, left_behind, lines_of

import train
from experiments.cells import Cell, make_cells
from experiments.grid import main
from experiments.pool import GridFolder, run_all
from experiments.runs import records, run_cells

ROOT = Path(__file__).parents[1]
TWO = {"method": "lora", "epochs": 1}


@pytest.fixture
def small(tiny: Path, small_data: Path) -> dict:
    """The settings of a small run, as a grid has them."""
    return {"model": str(tiny), "data": str(small_data), "max_length": 32, "batch_size": 8} | TWO


def grid(tiny: Path, data: Path, out: Path, *more: object, **changes) -> Ended:
    return call(main, "--out", out, *flags(tiny, data, **TWO | changes), *more)


def start(tiny: Path, data: Path, out: Path, *more: object, **changes) -> subprocess.Popen:
    told = [*flags(tiny, data, **TWO | changes), "--out", out, *more]
    command = [sys.executable, "-m", "experiments.grid", *map(str, told)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)


def steps_done(run: Path) -> int:
    file = run / "steps.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for_steps(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while steps_done(run) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_failed_cell_is_reported_tried_again_and_stops_nothing(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    out, more = tmp_path / "grid", ["--rank", "33", "4"]  # of a model of 32
    ended = grid(tiny, small_data, out, *more)
    assert ended.code == 1
    assert ended.line.startswith("error: rank33: --rank: expected at most the model's hidden size 32, got 33")
    assert "[1/2] rank33  failed" in ended.out
    assert "[2/2] rank4  dev " in ended.out
    assert ended.line.removeprefix("error: rank33: ") == GridFolder(out).error("rank33")
    written = (out / "rank4" / "result.json").stat().st_mtime_ns
    assert grid(tiny, small_data, out, *more).code == 1
    log = GridFolder(out).about("rank33", "log").read_text()
    assert log.count("got 33") == 2  # tried again
    assert (out / "rank4" / "result.json").stat().st_mtime_ns == written  # left alone
    assert GridFolder(out).about("rank4", "log").read_text().count("output ") == 1
    with open(out / "results.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    result = json.loads((out / "rank4" / "result.json").read_text())
    assert (line["rank"], float(line["dev"])) == ("4", result["dev"])
    assert f"{result['dev']:.4f}" in ended.out


def test_a_cell_is_the_run_that_train_makes(
    tiny: Path, small: dict, small_data: Path, tmp_path: Path
) -> None:
    table = small | {"precision": "fp32", "axes": {"seed": [5], "lr": [0.01]}}
    cells = make_cells(table)
    assert run_cells(cells, tmp_path / "grid", say=lambda line: None) == (0, {})
    plain = flags(tiny, small_data, **TWO, seed=5, out=tmp_path / "plain")
    assert call(train.main, *plain).code == 0
    assert left_behind(tmp_path / "grid" / "lr0.01-seed5") == left_behind(tmp_path / "plain")
    (record,) = records(cells, tmp_path / "grid")
    assert record.config.seed == 5


def test_two_grids_on_one_folder_do_each_cell_once(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    both = [start(tiny, small_data, out, "--seed", *range(4)) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    for seed in range(4):
        assert GridFolder(out).about(f"seed{seed}", "log").read_text().count("output ") == 1
        assert all(f"seed{seed}  dev " in told for told, _ in said)
    assert said[0][0].splitlines()[-3:] == said[1][0].splitlines()[-3:]  # one and the same table


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_grid_that_is_stopped_lets_its_run_save_and_goes_on(
    how: signal.Signals, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    out, long = tmp_path / "grid", {"epochs": 40}
    process = start(tiny, small_data, out, "--seed", 0, 1, **long)
    wait_for_steps(out / "seed0", process)
    process.send_signal(how)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (128 + how, "stopped; the same command goes on from there\n")
    assert checkpoints(out / "seed0")
    assert not (out / "seed1").exists()
    assert GridFolder(out).error("seed0") == ""
    before = steps_done(out / "seed0")
    assert grid(tiny, small_data, out, "--seed", "0", "1", **long).code == 0
    assert [line["step"] for line in lines_of(out / "seed0" / "steps.jsonl")] == list(range(1, 121))
    log = GridFolder(out).about("seed0", "log").read_text()
    assert f"stopped after step {before}, saved" in log


class PrunesAll:
    """Work of one cell, given up once its run has done three steps."""

    def __init__(self, cell: Cell, folder: GridFolder):
        self.cell, self.folder, self.left, self.errors = cell, folder, 1, []

    def take(self) -> tuple[Cell, IO] | None:
        self.left -= 1
        return (self.cell, self.folder.lock(self.cell.name)) if self.left == 0 else None

    def expects_more(self) -> bool:
        return False

    def prunes(self, cell: Cell) -> bool:
        return steps_done(self.folder.run(cell.name)) >= 3

    def ended(self, cell: Cell, error: str) -> None:
        self.errors.append(error)


def test_a_run_that_is_pruned_saves_and_is_no_failure(small: dict, tmp_path: Path) -> None:
    folder = GridFolder(tmp_path / "grid")
    folder.make()
    (cell,) = make_cells(small | {"epochs": 1000})
    work = PrunesAll(cell, folder)
    assert run_all(work, folder) == 0
    assert (work.errors, folder.error(cell.name)) == ([""], "")
    assert checkpoints(folder.run(cell.name))
    assert not folder.result(cell.name).exists()


def test_a_run_that_outlives_its_grid_is_waited_for_not_started_twice(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "grid"
    process = start(tiny, small_data, out, epochs=40)
    wait_for_steps(out / "sts-lora", process)
    process.kill()
    process.communicate()
    assert grid(tiny, small_data, out, epochs=40).code == 0
    assert GridFolder(out).about("sts-lora", "log").read_text().count("output ") == 1


def test_runs_side_by_side_share_the_cores(tiny: Path, small: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("experiments.pool.cores", lambda: 5)
    started = []

    def note(command: list[str], env: dict, **_) -> subprocess.Popen:
        started.append(env["OMP_NUM_THREADS"])
        return popen([sys.executable, "-c", "print('error: x'); exit(1)"], env=env)

    popen = subprocess.Popen
    monkeypatch.setattr("experiments.pool.subprocess.Popen", note)
    cells = make_cells(small | {"axes": {"seed": [0, 1]}})
    assert set(run_cells(cells, tmp_path / "grid", jobs=2, say=lambda line: None)[1]) == {"seed0", "seed1"}
    assert started == ["2", "2"]


def test_a_dry_run_lists_every_cell_and_runs_nothing(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    ended = grid(tiny, small_data, out, "--seed", "0", "1", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    listed = ended.out.splitlines()
    assert listed == ["seed0", "seed1", "2 cells"]
    assert not out.exists()


def test_a_dry_run_says_what_is_finished(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    assert grid(tiny, small_data, out, "--seed", "0", "1").code == 0
    ended = grid(tiny, small_data, out, "--seed", *"012", "--dry-run")
    assert ended.out.splitlines() == ["seed0  finished", "seed1  finished", "seed2", "3 cells"]


def test_a_dry_run_refuses_what_the_model_cannot_do(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    ended = grid(tiny, small_data, tmp_path / "grid", "--max-length", "16", "4096", "--dry-run")
    assert ended.code == 2
    assert "max-length4096: --max-length: expected at most the model's" in ended.line


def test_another_grid_in_the_same_folder_is_refused(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    assert grid(tiny, small_data, out, "--seed", "0", "1").code == 0
    ended = grid(tiny, small_data, out, "--seed", "0", "1", dropout=0.5)
    assert ended.code == 2
    assert "seed0: was made with dropout 0.3, the grid says 0.5" in ended.line


def test_flags_override_a_file_wherever_it_says_otherwise(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('model = "nowhere"\naxes.seed = [7]\n[[grid]]\nlr = [1.0]\nhidden_layers = [0, 1]\n')
    ended = call(
        main, file, "--out", tmp_path / "x", *flags(tiny, small_data, **TWO), "--seed", 1, 2, "--dry-run"
    )
    assert ended.code == 0, ended.err
    assert [line.split()[0] for line in ended.out.splitlines()[:4]] == [
        f"hidden-layers{layers}-seed{seed}" for layers in (0, 1) for seed in (1, 2)
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--jobs", "0"], "--jobs: expected at least 1"),
        (["--lr", "x"], "argument --lr: invalid float value: 'x'"),
        (["--lr", "1e-4:1e-3:log"], "a range of lr is for a search"),
        (["--strict", "maybe"], "argument --strict: invalid bool value"),
        (["--trials", "3"], "expected --search"),
        (["none.toml"], "none.toml: cannot be read"),
        (["--data", "nowhere", "--dry-run"], "--data: expected demo, cs224n or a folder"),
    ],
)
def test_bad_usage_is_one_line(more: list[str], words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call(main, "--out", tmp_path / "grid", *more)
    assert (ended.code, ended.out) == (2, "")
    assert words in ended.line


def test_a_folder_that_cannot_be_made_is_refused(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in grid(tiny, small_data, tmp_path / "file" / "grid").line
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "experiments" / "examples").glob("*.toml")), ids=lambda f: f.stem
)
def test_an_example_is_a_grid_that_could_run(
    file: Path, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    ended = call(main, file, "--out", tmp_path / "x", "--dry-run", "--model", tiny, "--data", small_data)
    assert (ended.code, ended.err) == (0, "")
    assert not (tmp_path / "x").exists()
