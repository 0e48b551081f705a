"""The report says what the runs' folders say, of every one of them, and nothing in them becomes markup."""

import json
import random
import re
import shlex
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Seen
from small_runs import call, column, flags, write_data
from written_runs import write_run

import train
from experiments.blocks import plain
from experiments.listing import read_runs
from experiments.plots import Line, best, far_below
from experiments.report import main
from training.cli import parse
from training.config import from_dict

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

NASTY = "<img src=x onerror=alert(1)>|$x$ `a` </script><b>"


def report(tmp_path: Path, *folders: Path) -> tuple[str, str]:
    """The page and the Markdown of runs."""
    ended = call(main, *folders, "--out", tmp_path / "page.html")
    assert (ended.code, ended.err) == (0, "")
    return (tmp_path / "page.html").read_text(), (tmp_path / "page.md").read_text()


def table(markdown: str, *columns: str) -> list[dict[str, str]]:
    """The first table that begins with these columns; nothing in it may be escaped."""
    lines = markdown.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| " + " | ".join(columns)))
    names, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines[start : lines.index("", start) if "" in lines[start:] else len(lines)]
    )
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_a_setting_has_the_mean_and_spread_over_its_seeds(tmp_path: Path) -> None:
    told = [(0.41, 8.0, 290.0), (0.44, 12.0, 310.0), (0.46, 13.0, 330.0)]
    folders = [
        write_run(
            tmp_path / f"run{seed}",
            result={"dev": dev, "train_seconds": seconds, "memory_above_start_mib": memory},
            seed=seed,
        )
        for seed, (dev, seconds, memory) in enumerate(told)
    ]
    folders.append(write_run(tmp_path / "full", method="full", result={"trainable_parameters": 25_000}))
    _, markdown = report(tmp_path, *folders)
    lora, full = table(markdown, r"\#", "method")
    dev, seconds, memory = zip(*told, strict=True)
    assert lora["dev"] == f"{mean(dev):.4f} ± {stdev(dev):.4f}"
    assert lora["seconds"] == f"{mean(seconds):.0f} ± {stdev(seconds):.0f}"
    assert lora["MiB above start"] == f"{mean(memory):.0f} ± {stdev(memory):.0f}"
    assert (lora["seeds"], lora["trained"], full["trained"]) == ("3", "2.0%", "50.0%")
    assert (full["dev"], full["settings"]) == ("0.5000", "")
    assert [row["run"] for row in table(markdown, "run", r"\#", "seed")] == ["run0", "run1", "run2", "full"]


def test_a_grid_of_two_settings_is_shown_as_one_with_its_gaps(tmp_path: Path) -> None:
    cells = {(4, 1e-4): [0.30], (4, 1e-3): [0.40, 0.44], (16, 1e-4): [0.35]}
    folders = [
        write_run(tmp_path / f"{rank}-{lr}-{seed}", result={"dev": dev}, rank=rank, lr=lr, seed=seed)
        for (rank, lr), scores in cells.items()
        for seed, dev in enumerate(scores)
    ]  # alpha differs too, but only because it is twice the rank
    _, markdown = report(tmp_path, *folders)
    assert "rank ↓ × lr →" in markdown
    assert [list(row.values()) for row in table(markdown, "", "0.0001", "0.001")] == [
        ["4", "0.3000", "0.4200"],
        ["16", "0.3500", "no run"],
    ]


def test_runs_that_differ_in_one_setting_or_three_make_no_grid(tmp_path: Path) -> None:
    one = [write_run(tmp_path / f"a{lr}", lr=lr) for lr in (1e-4, 1e-3)]
    assert "↓" not in report(tmp_path, *one)[1]
    three = [write_run(tmp_path / f"b{i}", rank=2**i, lr=10**-i, dropout=i / 10) for i in (1, 2)]
    assert "↓" not in report(tmp_path, *three)[1]


def test_the_confusions_are_those_of_predictions_and_labels(tmp_path: Path, small_data: Path) -> None:
    chance = random.Random(1)
    with open(small_data / "ids-sst-dev.csv") as file:
        labels = {row.split("\t")[1]: int(float(row.split("\t")[3])) for row in file.readlines()[1:]}
    told = [[(name, chance.randrange(5)) for name in labels] for _ in range(2)]
    folders = [
        write_run(tmp_path / str(seed), predictions, data=str(small_data), seed=seed)
        for seed, predictions in enumerate(told)
    ]
    counts = Counter((labels[name], given) for one in told for name, given in one)
    of_label = Counter(labels.values())
    _, markdown = report(tmp_path, *folders)
    for row in table(markdown, "label", "0"):
        label = int(row["label"])
        for said in range(5):
            assert row[str(said)] == f"{counts[label, said] / max(2 * of_label[label], 1):.0%}"


DATA, PREDICTIONS = "data/ids-sst-dev.csv", "run/predictions-dev.csv"


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (DATA, None, "there is no ids-sst-dev.csv any more"),
        (DATA, b"id\n", "expected tab-separated columns"),
        (PREDICTIONS, None, "cannot be read"),
        (PREDICTIONS, b"id,prediction\nx,1\n", "no id 'x'"),
        (PREDICTIONS, b"id,prediction\ndev0,5\n", "expected a class from 0 to 4, got '5'"),
        (PREDICTIONS, b"id,prediction\ndev0,1\n", "expected a prediction for each of 10 ids, got 1"),
        (PREDICTIONS, b"id\xff\n", ":1: expected UTF-8 text, got byte 0xff"),
    ],
)
def test_confusions_that_cannot_be_had_are_left_out_with_the_reason(
    tmp_path: Path, file: str, content: bytes | None, says: str
) -> None:
    data = write_data(tmp_path / "data")
    run = write_run(tmp_path / "run", [(f"dev{i}", 0) for i in range(10)], data=str(data))
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    page, markdown = report(tmp_path, run)
    assert says in Seen(page).text
    assert "Left out: " in markdown
    assert "| label |" not in markdown


def test_what_is_in_no_table_is_listed_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    begun = write_run(tmp_path / "begun", finished=False, epochs=1, seed=5)
    several = write_run(tmp_path / "several", task="sst+qqp", result={"dev": {"sst": 0.1, "qqp": 0.2}})
    damaged = write_run(tmp_path / "damaged")
    (damaged / "result.json").write_text("{")
    torn = write_run(tmp_path / "torn")
    (torn / "metrics.jsonl").write_text('{"epoch": 1, "loss": NaN, "dev": 1, "train": 1}\n')
    odd = write_run(tmp_path / "odd", result={"train_seconds": "long"})
    done = write_run(tmp_path / "done")
    page, markdown = report(tmp_path, tmp_path / "empty", begun, several, damaged, torn, odd, done)
    listed = {row["run"]: row["why"] for row in table(markdown, "run", "why")}
    assert listed.keys() == {"empty", "begun", "several", "damaged", "torn", "odd"}
    assert listed["empty"] == "no run: there is no config.json in it"
    assert listed["begun"] == "not finished: running, stopped or failed after epoch 1 of 2"
    reasons = {"several": "expected the name of a metric as metric of sst", "damaged": "expected JSON",
               "torn": "metrics.jsonl:1", "odd": "train\\_seconds"}  # fmt: skip
    for name, reason in reasons.items():
        assert reason in listed[name]
    assert "1 finished run; 6 not finished or not readable" in Seen(page).text
    (command,) = re.findall(r"python train.py .* --resume", markdown)
    config, beside = parse(shlex.split(command)[2:])
    assert (config.seed, beside.out) == (5, begun)


def test_a_setting_that_does_nothing_in_a_run_does_not_name_it(tmp_path: Path) -> None:
    alone = [write_run(tmp_path / "full", method="full"), write_run(tmp_path / "lora", rank=4)]
    _, markdown = report(tmp_path, *alone)
    full, lora = table(markdown, r"\#", "method")
    assert "rank" not in full["settings"]
    assert "alpha" not in full["settings"]


@pytest.mark.parametrize("adapters", ["shared", "per-task"])
def test_a_run_of_several_tasks_stands_in_the_part_of_each(
    adapters: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    told = {"both": {"task": "sst+sts", "adapters": adapters, "best": "per-task", "epochs": 4, "lr": 0.03},
            "sst": {"task": "sst", "lr": 0.02}, "sts": {"task": "sts", "lr": 0.02}}  # fmt: skip
    for name, changes in told.items():
        ended = call(train.main, *flags(tiny, small_data, out=runs / name, method="lora", **changes))
        assert (ended.code, ended.err) == (0, "")
    page, markdown = report(tmp_path, *(runs / name for name in told))
    assert "3 finished runs." in Seen(page).text
    result = json.loads((runs / "both" / "result.json").read_text())
    for task in ("sst", "sts"):
        part = markdown[markdown.index(f"## {task}, ") :]
        together, alone = table(part, r"\#", "method")
        assert together["dev"] == f"{result['dev'][task]:.4f}"
        assert "task sst+sts" in together["settings"]
        assert f"task {task}" in alone["settings"]
        assert "adapters" not in alone["settings"]
        row, _ = table(part, "run", r"\#", "seed")
        epoch = result["best_epoch"]
        assert row["best epoch"] == str(epoch[task] if isinstance(epoch, dict) else epoch)
        assert ("| label |" in part[: part.index("### Every run")]) == (task == "sst")


def test_runs_none_of_which_has_finished_make_a_report_too(tmp_path: Path) -> None:
    page, _ = report(tmp_path, write_run(tmp_path / "begun", finished=False))
    assert "0 finished runs" in Seen(page).text


def test_of_real_runs_every_command_makes_its_run_again(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "runs" / f"lora {seed}" for seed in (0, 1)]
    for seed, out in enumerate(folders):
        changes = {"task": "sst", "method": "lora", "rank": 4, "seed": seed, "out": out}
        assert call(train.main, *flags(tiny, small_data, **changes)).code == 0
    page, markdown = report(tmp_path, *folders)
    commands = [line.strip() for line in markdown.splitlines() if line.startswith("    python train.py")]
    for command, folder in zip(commands, folders, strict=True):
        assert command.endswith(f"  # {folder.name}")
        config, _ = parse(shlex.split(command, comments=True)[2:])
        assert config == from_dict(json.loads((folder / "config.json").read_text()), "here")
    assert page.count("<svg role=") == 5
    assert len(column(folders[0] / "predictions-dev.csv", "id")) == 10
    assert len(table(markdown, "label", "0")) == 5


def test_no_name_in_a_run_becomes_markup(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{NASTY.replace('/', '∕')}{i}", data=NASTY, seed=i) for i in range(2)]
    folders.append(write_run(tmp_path / "metric", result={"metric": NASTY}, model=NASTY))
    folders.append(write_run(tmp_path / "x\n\n# <script>y", finished=False))
    page, markdown = report(tmp_path, *folders)
    seen = Seen(page)
    tags = Counter(tag for tag, _ in seen.tags)
    assert tags["script"] == 1
    assert tags["img"] == tags["b"] == tags["a"] == 0
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert f"Model all-MiniLM-L6-v2, data {NASTY}." in seen.text
    assert f"dev {NASTY} by training seconds" in seen.text  # no $ is mathematics
    shown = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not [line for line in shown if "<" in line]
    # A heading is one of the report's own.
    assert {line for line in shown if line.startswith("# ")} == {"# Runs compared"}
    rows = [line for line in shown if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} <= {3, 9, 10}


@given(st.text())
def test_markdown_text_is_one_line_without_markup(text: str) -> None:
    shown = plain(text)
    assert len(shown.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_|#$]|<|>", shown.replace("&lt;", "").replace("&gt;", ""))


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    page, _ = report(tmp_path, write_run(tmp_path / "run"))
    places = [
        value
        for _, attributes in Seen(page).tags
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href", "action", "data"}
    ]
    assert all(value.startswith("#") for value in places)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "default-src 'none'" in page


def test_the_same_runs_make_the_same_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert report(tmp_path, run) == report(tmp_path, run)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    def beaten(one: tuple[int, int]) -> bool:
        return any(o != one and o[0] <= one[0] and o[1] >= one[1] for o in points)

    assert best(points) == sorted({one for one in points if not beaten(one)})


@pytest.mark.parametrize(
    ("scores", "far"),
    [
        ([0.4759, 0.4787, 0.4799, 0.4832, 0.4233], {5}),
        ([0.86, 0.87, 0.88, 0.85], set()),
        ([0.1, 0.9, 0.9], set()),  # too few to say which is the odd one
        ([0.5, 0.5, 0.5, 0.5], set()),
    ],
)
def test_far_below_is_what_tukeys_outer_fence_leaves_out(tmp_path: Path, scores, far) -> None:
    folders = [write_run(tmp_path / str(i), result={"dev": dev}, lr=1 / 2**i) for i, dev in enumerate(scores)]
    lines = [Line(number, [run]) for number, run in enumerate(read_runs(folders)[0], 1)]
    assert far_below(lines) == far
    low, high = np.percentile(scores, [25, 75])
    fence = low - 3 * (high - low)
    assert len(scores) < 4 or far == {i for i, score in enumerate(scores, 1) if score < fence}
    page, markdown = report(tmp_path, *folders)
    assert ("below: 5" in Seen(page).text) is bool(far)
    assert len(table(markdown, r"\#", "method")) == len(scores)  # all are in the table


def test_bad_input_is_one_line_and_leaves_the_old_page(tmp_path: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "a")
    out = tmp_path / "page.html"
    out.write_text("old")
    for arguments, says in [
        ([tmp_path / "nowhere", "--out", out], "expected the folder of a run, there is none"),
        ([run, "--out", tmp_path / "page.md"], "expected a file that ends in .html"),
        ([run, "--out", tmp_path / "no" / "page.html"], "cannot be written (No such file or directory)"),
        ([], "the following arguments are required: RUN"),
    ]:
        ended = call(main, *arguments)
        assert ended.code == 2
        assert says in ended.line
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = call(main, run, "--out", out)
    assert (ended.code, ended.line) == (2, "error: the plots need matplotlib: pip install matplotlib")
    assert out.read_text() == "old"
    assert not (tmp_path / "page.md").exists()
