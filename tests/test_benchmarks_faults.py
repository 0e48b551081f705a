"""Harm is done to real processes, and what comes of it is told apart."""

from pathlib import Path

import pytest
from small_runs import call

from benchmarks.fault_kinds import REFUSED, RIGHT, Trial, Victim
from benchmarks.fault_runs import Bench, Ended
from benchmarks.faults import main, rows


def test_killed_runs_end_as_those_that_were_not(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "faults.csv"
    ended = call(main, "--kills", 3, "--trials", 0, "--model", tiny, "--out", out)
    assert ended.code == 0, ended.err
    header, *lines = [line.split(",") for line in out.read_text().splitlines()]
    assert header[:5] == ["fault", "trials", "right result", "one line", "anything else"]
    assert [line[:5] for line in lines] == [
        [f"kill -9: {moment}", "1", "1", "0", "0"] for moment in ("a step", "writing a checkpoint", "scoring")
    ]


@pytest.mark.parametrize(
    ("code", "err", "refused"),
    [
        (2, "error: x: damaged\n", True),
        (1, "x is not pinned\nerror: no room\n", True),
        (0, "", False),
        (1, "Traceback (most recent call last):\nerror: x\n", False),
        (1, "error: one\nerror: two\n", False),
        (1, "", False),
        (-11, "error: x\n", False),
        (None, "", False),
    ],
)
def test_a_refusal_is_one_line_and_an_exit_code(code: int | None, err: str, refused: bool) -> None:
    assert bool(Ended(code, err).refusal()) == refused


def test_another_result_is_not_right(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, content in (("result.json", "{}"), ("metrics.jsonl", '{"seconds": 1}\n'), ("steps.jsonl", "")):
        (run / name).write_text(content)
    whole = {"metrics.jsonl": [{}], "steps.jsonl": []}
    assert Victim(Bench(tmp_path), run, run, whole).judge(Ended(0, ""), run) == RIGHT
    other = whole | {"steps.jsonl": [{"loss": 1}]}
    assert Victim(Bench(tmp_path), run, run, other).judge(Ended(0, ""), run) == "another result"


def test_the_table_counts_outcomes_by_kind() -> None:
    done = [Trial("a", "", RIGHT), Trial("b", "", "hangs"), Trial("a", "", REFUSED), Trial("b", "", RIGHT)]
    assert rows(done) == [("a", "2", "1", "1", "0"), ("b", "2", "1", "0", "1")]


@pytest.mark.parametrize(
    "given", [["--kills", "-1"], ["--threads", "0"], ["--model", "nowhere"], ["x"]], ids=str
)
def test_bad_usage_is_one_line(given: list[str]) -> None:
    ended = call(main, *given)
    assert ended.code == 2
    assert given[0] in ended.line
