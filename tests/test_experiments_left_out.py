"""`runs/*`: what can be used is used, the rest is listed with the reason, whichever command reads it."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from scored_runs import one_hot, write_labels, write_scored
from small_runs import Ended, call

from experiments import compare, report, summary
from training.config import Config, check, to_dict

N = 20
SST, STS = np.arange(N) % 5, np.linspace(0, 5, N)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """What README's commands leave: a run and its repetition, several tasks, a grid, an unfinished run."""
    folder, chance = tmp_path / "runs", np.random.default_rng(0)
    data = write_labels(tmp_path / "data", "sst", SST)
    write_labels(data, "sts", STS)
    folder.mkdir()
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        write_scored(folder / name, data, "sts", STS + chance.normal(size=N), seed=seed)
    both = write_scored(folder / "both", data, "sst", one_hot(SST, 5))
    write_scored(tmp_path / "other", data, "sts", STS[::-1])
    (tmp_path / "other" / "predictions-dev.csv").rename(both / "predictions-dev-sts.csv")
    (both / "predictions-dev.csv").rename(both / "predictions-dev-sst.csv")
    config = to_dict(check(Config(task="sst+sts", method="lora", data=str(data))))
    result = json.loads((both / "result.json").read_text())
    result |= {"metric": {"sst": "accuracy", "sts": "pearson"}, "train": {"sst": 0.5, "sts": 0.5}}
    (both / "config.json").write_text(json.dumps(config))
    (both / "result.json").write_text(json.dumps(result | {"dev": {"sst": 1.0, "sts": -1.0}}))
    (folder / "head").mkdir()
    write_scored(folder / "head" / "rank4", data, "sts", STS, rank=4)
    (write_scored(folder / "begun", data, "sts", STS, seed=5) / "result.json").unlink()
    for run in folder.glob("*/config.json"):
        (run.parent / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1, "dev": 1, "train": 1}\n')
    line = {"epoch": 1, "loss": 1, "dev": {"sst": 1, "sts": 1}, "train": {"sst": 1, "sts": 1}}
    (both / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "empty").mkdir()
    (folder / "notes.txt").write_text("a stray file")
    (folder / "gone").symlink_to("nowhere")
    return folder


REASONS = {
    "begun": "not finished: running, stopped or failed after epoch 1 of ",
    "c": "has the setting and seed of RUNS/a, dev DEV there and DEV here",
    "empty": "no run: there is no config.json in it",
    "gone": "no run: it is no folder",
    "head": "a folder of runs, which RUNS/head/* names",
    "notes.txt": "no run: it is no folder",
}


def all_of(command, runs: Path, *more: object) -> Ended:
    ended = call(command.main, *sorted(runs.iterdir()), *more)
    assert ended.code == 0, ended.err
    return ended


def check_reasons(told: dict[str, str], runs: Path) -> None:
    plain = {
        name: re.sub(r"\d\.\d+", "DEV", reason.replace(str(runs), "RUNS")) for name, reason in told.items()
    }
    assert plain.keys() == REASONS.keys()
    assert all(plain[name].startswith(reason) for name, reason in REASONS.items()), plain


def listed(ended: Ended, runs: Path) -> None:
    lines = [line.removeprefix(f"not used: {runs}/").partition(": ") for line in ended.err.splitlines()]
    check_reasons({name: reason for name, _, reason in lines}, runs)


def dev(run: Path) -> float:
    return json.loads((run / "result.json").read_text())["dev"]


def test_the_summary_has_a_row_for_each_setting(runs: Path) -> None:
    ended = all_of(summary, runs)
    listed(ended, runs)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ended.out.splitlines()]
    scores = [dev(runs / name) for name in "ab"]  # of c, which repeats a, there is no trace
    alone, *both = [(row[0], row[-5], row[-4]) for row in cells[2:]]
    assert alone == ("sts", "2", f"{mean(scores):.4f} ± {stdev(scores):.4f}")
    assert both == [("sst with sts", "1", "1.0000"), ("sts with sst", "1", "-1.0000")]


def test_settings_are_compared_in_each_of_the_tasks(runs: Path, tmp_path: Path) -> None:
    ended = all_of(compare, runs, "--csv", tmp_path / "table.csv")
    listed(ended, runs)
    sts, sst = ended.out.split("## sst on ")
    assert sts.startswith(f"## sts on {tmp_path / 'data'}\n")
    assert [line.split("|")[2].strip() for line in sts.splitlines() if line.startswith("| lora")] == [
        "2",
        "1",
    ]
    assert [line.split("|")[3].strip() for line in sst.splitlines() if line.startswith("| lora")] == [
        "1.0000"
    ]
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["data", task] for task in ("sts", "sts", "sst")]


def test_the_report_lists_them_on_its_page(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert all_of(report, runs, "--out", tmp_path / "page.html").err == ""
    markdown = (tmp_path / "page.md").read_text()
    assert "3 finished runs; 6 not finished" in markdown
    rows = markdown[markdown.index("| run | why |") :].splitlines()[2:8]
    cells = [[cell.strip().replace("\\", "") for cell in row.split("|")[1:-1]] for row in rows]
    check_reasons(dict(cells), runs)


@pytest.mark.parametrize("command", [summary, compare])
def test_where_none_can_be_used_that_is_an_error(command, runs: Path) -> None:
    ended = call(command.main, runs / "begun", runs / "notes.txt")
    assert ended.code == 2
    first, last = ended.err.splitlines()
    assert first == f"not used: {runs / 'notes.txt'}: no run: it is no folder"
    assert last.startswith(f"error: {runs / 'begun'}: expected a finished run; not finished: ")
    assert "expected the folder of a run" in call(command.main, runs / "a", runs / "typo").line
