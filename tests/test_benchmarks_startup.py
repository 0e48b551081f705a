"""What is waited for is what the table says, and a run that fails is no measurement."""

import pytest
from small_runs import call

from benchmarks import inference_speed, startup, train_speed
from benchmarks.startup import COMMANDS, FIRST_STEP, IMPORTS, first_step_seconds, main, rows


def test_ratios_are_to_our_imports_in_the_same_round():
    rounds = [
        {IMPORTS: {"seconds": 2.0}, "python": {"seconds": 1.0}},
        {IMPORTS: {"seconds": 1.0}, "python": {"seconds": 0.1}},
    ]
    assert rows(rounds) == [
        (IMPORTS, "1.500 [1.000, 2.000]", "1.000 [1.000, 1.000]"),
        ("python", "0.550 [0.100, 1.000]", "0.300 [0.100, 0.500]"),
    ]


def test_it_measures_every_command_and_the_first_step(tiny, small_data, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "startup.csv"
    asked = ["--data", small_data, "--model", tiny, "--rounds", 1, "--threads", 1, "--out", out]
    ended = call(main, *asked)
    assert ended.code == 0, ended.err
    assert all(name in ended.out and name in out.read_text() for name in (*COMMANDS, FIRST_STEP))


def test_a_run_that_fails_says_why(tiny, tmp_path, refusal):
    assert "sts-train.csv: cannot be read" in refusal(first_step_seconds, str(tmp_path), str(tiny), 1, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rounds", "0"], "--rounds: expected at least 1"), (["--data", "no/where"], "--data"), (["x"], "x")],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line


@pytest.mark.parametrize(
    ("program", "missing"),
    [(startup, "transformers and peft"), (train_speed, "transformers and peft"),
     (inference_speed, "sentence_transformers")],
)  # fmt: skip
def test_a_peer_that_is_not_installed_is_said_before_anything_is_measured(program, missing, monkeypatch):
    monkeypatch.setattr("benchmarks.flags.importlib.util.find_spec", lambda name: None)
    ended = call(program.main)
    assert (ended.code, ended.out) == (2, "")
    assert ended.line == f"error: the comparison needs {missing}: pip install -e '.[bench]'"
