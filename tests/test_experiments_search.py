"""A search: equal budgets, one seed, the same trials whenever it is stopped, and the best by dev."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
from small_runs import Ended, call, flags

from experiments.grid import main
from experiments.pool import GridFolder
from experiments.space import Plan, make_spaces, read_plan
from training.cli import parse

pytest.importorskip("optuna")

from experiments.search import SearchWork  # noqa: E402
from experiments.study import Study, TrialState, open_storage  # noqa: E402

ROOT = Path(__file__).parents[1]
LR = {"low": 1e-4, "high": 1e-2, "log": True}
NO_FLAGS = Namespace(search=None, trials=None, pruner=None, storage=None)


def silent(line: str) -> None:
    """A search's lines, read by nobody."""


def work(table: dict, plan: Plan, out: Path) -> SearchWork:
    spaces, plan = make_spaces(table, "s", plan)
    folder = GridFolder(out)
    folder.make()
    storage = open_storage(plan, folder)
    return SearchWork([Study(space, plan, storage) for space in spaces], plan, folder, silent)


def leave_result(out: Path, name: str, dev: float) -> None:
    """What a run leaves behind, as far as a search reads it."""
    (out / name).mkdir()
    lines = [{"epoch": 1, "step": 3, "dev": dev}, {"epoch": 2, "step": 6, "dev": dev}]
    (out / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / name / "config.json").write_text(json.dumps({"epochs": 2, "max_steps": None}))
    (out / name / "result.json").write_text(json.dumps({"dev": dev}))


def exhausted(search: SearchWork, out: Path) -> dict[str, float]:
    """All trials of a search whose runs score their learning rate, and those rates."""
    rates = {}
    while taken := search.take():
        cell, lock = taken
        rates[cell.name] = cell.config.lr
        leave_result(out, cell.name, cell.config.lr)
        search.ended(cell, "")
        lock.close()
    return rates


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_each_method_has_as_many_trials_and_the_best_is_by_dev(sampler: str, tmp_path: Path) -> None:
    table = {"axes": {"method": ["lora", "full"], "lr": LR}}
    search = work(table, Plan(sampler, trials=7), tmp_path)
    rates = exhausted(search, tmp_path)
    assert sorted(rates) == [f"sts-{method}-{i:03d}" for method in ("full", "lora") for i in range(7)]
    assert all(1e-4 <= lr <= 1e-2 for lr in rates.values())
    assert len(set(rates.values())) >= 7
    assert not search.expects_more()
    for study in search.studies:
        told, command = study.best().split(": python train.py ")
        best, name = max((lr, name) for name, lr in rates.items() if name.startswith(study.space.name))
        assert name in told
        assert parse(command.split())[0].lr == best


@pytest.mark.parametrize("sampler", ["random", "tpe", "grid"])
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(sampler: str, tmp_path: Path) -> None:
    table = {"axes": {"lr": [1e-4, 1e-3, 1e-2] if sampler == "grid" else LR, "dropout": [0.1, 0.5]}}
    plan = Plan(sampler, trials=6)
    whole = exhausted(work(table, plan, tmp_path / "whole"), tmp_path / "whole")
    first = work(table, plan, tmp_path / "parts")
    told = {}
    for stopped in (False, False, True):  # the third trial's process goes away without a word
        cell, lock = first.take()
        told[cell.name] = cell.config.lr
        lock.close()
        if not stopped:
            leave_result(tmp_path / "parts", cell.name, cell.config.lr)
            first.ended(cell, "")
    again = exhausted(work(table, plan, tmp_path / "parts"), tmp_path / "parts")
    assert set(told) & set(again) == {"sts-rslora-002"}
    assert told | again == whole


def test_a_grid_search_tries_every_combination_once(tmp_path: Path) -> None:
    search = work({"axes": {"lr": [1e-4, 1e-3], "targets": ["all", "query+value"]}}, Plan("grid"), tmp_path)
    exhausted(search, tmp_path)
    cells = search.finished_here()
    assert {(cell.config.lr, cell.config.targets) for cell in cells} == {
        (lr, targets) for lr in (1e-4, 1e-3) for targets in (("all",), ("query", "value"))
    }
    assert len(cells) == 4


def test_two_processes_share_a_study_and_its_budget(tmp_path: Path) -> None:
    table, plan = {"axes": {"lr": LR}}, Plan("random", trials=4)
    one, two = (work(table, plan, tmp_path) for _ in range(2))
    names = []
    while taken := [search.take() for search in (one, two)]:
        if taken == [None, None]:
            break
        for search, mine in zip((one, two), taken, strict=True):
            cell, lock = mine
            names.append(cell.name)
            leave_result(tmp_path, cell.name, 0.5)
            search.ended(cell, "")
            lock.close()
    assert sorted(names) == [f"sts-rslora-{i:03d}" for i in range(4)]


def test_machines_share_a_study_by_its_storage_and_each_goes_on_with_its_own(tmp_path: Path) -> None:
    plan = Plan("random", trials=3, storage=f"sqlite:///{tmp_path / 'study.db'}")
    one, two = (work({"axes": {"lr": LR}}, plan, tmp_path / name) for name in ("one", "two"))
    (first, lock), (second, _) = one.take(), two.take()
    assert (first.name, second.name) == ("sts-rslora-000", "sts-rslora-001")
    lock.close()
    again = work({"axes": {"lr": LR}}, plan, tmp_path / "one")
    cell, _ = again.take()
    assert (cell.name, cell.config) == (first.name, first.config)
    cell, _ = again.take()
    assert cell.name == "sts-rslora-002"
    assert again.take() is None


def test_a_run_behind_the_median_of_others_is_pruned_but_not_after_its_last_epoch(tmp_path: Path) -> None:
    search = work({"axes": {"lr": LR}}, Plan("random", trials=7), tmp_path)
    for _ in range(5):
        cell, _lock = search.take()
        leave_result(tmp_path, cell.name, 0.5)
        search.ended(cell, "")
    for epochs, pruned in ((2, True), (1, False)):
        cell, _lock = search.take()
        leave_result(tmp_path, cell.name, 0.1)
        run = tmp_path / cell.name
        (run / "result.json").unlink()
        first, _ = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text(first)
        (run / "config.json").write_text(json.dumps({"epochs": epochs, "max_steps": None}))
        assert search.prunes(cell) is pruned
        search.ended(cell, "")
    states = [trial.state for trial in search.studies[0].trials()]
    assert states == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED] * 2


def test_another_search_in_the_same_folder_is_refused(tmp_path: Path, refusal) -> None:
    work({"epochs": 2, "axes": {"lr": LR}}, Plan("random", trials=1), tmp_path)
    work({"epochs": 2, "axes": {"lr": LR}}, Plan("random", trials=9), tmp_path)
    said = refusal(work, {"epochs": 3, "axes": {"lr": LR}}, Plan("random", trials=1), tmp_path)
    assert "was begun with epochs 2, now it is 3" in said


REFUSED = {
    "s: search.trials: expected a number of trials, got none": ({"axes": {"lr": LR}}, {}),
    "s: search.trials: expected at least 1, got 0": ({"axes": {"lr": LR}}, {"trials": 0}),
    "s: search.trials: expected another type": ({"axes": {"lr": LR}}, {"trials": "x"}),
    "s: search.sampler: expected grid, random, tpe; got 'x'": ({"axes": {"lr": LR}}, {"sampler": "x"}),
    "s: search: unknown key 'budget'": ({"axes": {"lr": LR}}, {"budget": 1}),
    "s: axes.seed: a search has one seed": ({"axes": {"seed": [0, 1]}}, {"trials": 1}),
    "s: a search needs axes beside": ({"axes": {"method": ["lora"]}}, {"trials": 1}),
    "s: axes.lr: a range has no grid": ({"axes": {"lr": LR}}, {"sampler": "grid"}),
    "s: axes.pair: pair is no number": ({"axes": {"pair": LR, "lr": LR}}, {"trials": 1}),
    "s: axes.rank: expected whole numbers": ({"axes": {"rank": {"low": 1.5, "high": 4}}}, {"trials": 1}),
    "s: axes.dropout: cell sts-rslora-000: --dropout: expected a number from 0 to 0.999, got 1.5": (
        {"axes": {"dropout": {"low": 0.1, "high": 1.5}}},
        {"trials": 1},
    ),
    "s: search.trials: expected at most 2, for as many of each": (
        {"grid": [{"method": "lora", "lr": [1e-4, 1e-3, 1e-2]}, {"method": "full", "lr": [1e-5, 1e-4]}]},
        {"sampler": "grid"},
    ),
    "s: sts-lora is searched by two tables": (
        {"method": "lora", "grid": [{"rank": [1, 2]}, {"lr": [1e-4, 1e-3]}]},
        {"trials": 1},
    ),
}


@pytest.mark.parametrize(("message", "given"), REFUSED.items(), ids=list(REFUSED))
def test_a_search_that_makes_no_sense_is_refused_with_its_place(message: str, given: tuple, refusal) -> None:
    table, search = given

    def read() -> None:
        make_spaces(table, "s", read_plan({"search": search}, "s", NO_FLAGS))

    assert refusal(read).startswith(message)


def test_flags_override_the_files_search() -> None:
    given = Namespace(search="random", trials=3, pruner=None, storage=None)
    plan = read_plan({"search": {"sampler": "tpe", "trials": 20, "seed": 7}}, "s", given)
    assert plan == Plan("random", trials=3, seed=7)


def test_a_storage_that_cannot_be_used_is_refused(tmp_path: Path, refusal) -> None:
    for url in ("nowhere://x", f"sqlite:///{tmp_path}/none/study.db"):
        assert f"search.storage: {url} cannot be used" in refusal(
            open_storage, Plan(storage=url), GridFolder(tmp_path)
        )


def test_without_optuna_a_search_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("raise ImportError\n")
    command = [sys.executable, "-m", "experiments.grid", "--out", tmp_path / "x", "--search", "tpe"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: a search needs Optuna: pip install 'minibert[search]'\n"


def search(tiny: Path, data: Path, out: Path, *more: object) -> Ended:
    told = flags(tiny, data, epochs=30)
    at = told.index("--lr")
    return call(main, "--out", out, *told[:at], *told[at + 2 :], *more)


def test_a_search_of_real_runs_is_stopped_and_goes_on(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    out, more = (
        tmp_path / "grid",
        ["--lr", "1e-3:1e-2:log", "--rank", "4", "--search", "random", "--trials", "2"],
    )
    told = flags(tiny, small_data, epochs=30)
    at = told.index("--lr")
    command = [sys.executable, "-m", "experiments.grid", "--out", out, *told[:at], *told[at + 2 :], *more]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run, deadline = out / "sts-rslora-000", time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1] == "stopped; the same command goes on from there\n"
    assert process.returncode == 143
    assert not (run / "result.json").exists()
    ended = search(tiny, small_data, out, *more)
    assert (ended.code, ended.err) == (0, "")
    assert "sts-rslora, 2 trials (0 pruned, 0 failed): best dev " in ended.out
    assert (out / "results.csv").read_text().count("\n") == 3
    assert "saved; " in GridFolder(out).about("sts-rslora-000", "log").read_text()


def test_a_dry_run_of_a_search_runs_nothing(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    more = [
        "--lr",
        "1e-3:1e-2:log",
        "--method",
        "lora",
        "full",
        "--search",
        "tpe",
        "--trials",
        "5",
        "--dry-run",
    ]
    ended = search(tiny, small_data, tmp_path / "x", *more)
    assert (ended.code, ended.err) == (0, "")
    assert [line.split("  ")[0] for line in ended.out.splitlines()[:2]] == ["sts-lora", "sts-full"]
    assert ended.out.splitlines()[2] == "10 trials"
    assert not (tmp_path / "x").exists()
