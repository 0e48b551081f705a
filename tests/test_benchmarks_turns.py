"""Measurements take turns, are compared within a round, and are taken once."""

import json
import platform
import re
from collections.abc import Callable

import pytest

from benchmarks.machine import describe
from benchmarks.tables import with_range
from benchmarks.turns import Log, paired, run, run_json, take_turns


def counting(calls: list[str], *names: str) -> dict[str, Callable[[int], dict]]:
    """Measures that give the number of calls there have been, and note them."""

    def measure(name: str) -> Callable[[int], dict]:
        return lambda i: calls.append(f"{name}{i}") or {"seconds": float(len(calls))}

    return {name: measure(name) for name in names}


def test_each_round_begins_with_another():
    calls: list[str] = []
    rounds = take_turns(counting(calls, "a", "b", "c"), 4, Log(None, {}))
    assert calls == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2", "a3", "b3", "c3"]
    assert [one["a"]["seconds"] for one in rounds] == [1.0, 6.0, 8.0, 10.0]


def test_a_ratio_is_of_two_in_the_same_round():
    rounds = [{"a": {"s": 3.0}, "b": {"s": 2.0}}, {"a": {"s": 10.0}, "b": {"s": 40.0}}]
    assert paired(rounds, "a", "b", "s") == [1.5, 0.25]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([2.0], "2.000"), ([3.0, 1.0, 1.5], "1.500 [1.000, 3.000]"), ([1.0, 2.0], "1.500 [1.000, 2.000]")],
    ids=str,
)
def test_a_number_is_shown_with_its_range(values, shown):
    assert with_range(values) == shown


def test_what_the_log_has_is_not_measured_again(tmp_path):
    path, calls = tmp_path / "log.jsonl", []

    def stop(i: int) -> dict:
        raise KeyboardInterrupt

    measures = counting(calls, "a", "b")
    with pytest.raises(KeyboardInterrupt):
        take_turns(measures | {"b": stop}, 1, Log(path, {"task": "sts"}))
    take_turns(measures, 2, Log(path, {"task": "sts"}))
    assert calls == ["a0", "b0", "b1", "a1"]
    again = take_turns(measures, 2, Log(path, {"task": "sts"}))
    assert len(calls) == 4
    assert again == take_turns(counting([], "a", "b"), 2, Log(None, {}))
    about, *lines = map(json.loads, path.read_text().splitlines())
    assert about == {"task": "sts"}
    assert [(line["round"], line["name"]) for line in lines] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"task": "sst"}\n', "was measured with task 'sst', now it is 'sts'; use another --out"),
        ('{"task": "sts", "rank": 1}\n', "was measured with rank 1, now it is None"),
        ("", "expected the log of a benchmark"),
        ("[]\n", "expected the log of a benchmark"),
        ('{"task": "sts"}\n{"round": 0}\n', "expected the log of a benchmark"),
    ],
    ids=str,
)
def test_a_log_of_something_else_is_left_alone(tmp_path, refusal, text, said):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    assert said in refusal(Log, path, {"task": "sts"})
    assert path.read_text() == text


def test_a_program_runs_with_as_many_threads_and_without_our_own_settings(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    names = ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    code = f"import json, os; print('noise'); print(json.dumps({{n: os.environ.get(n) for n in {names}}}))"
    assert run_json(["-c", code], 3) == dict(zip(names, ("3", "3", None), strict=True))


def test_a_program_that_fails_says_why_in_a_line(refusal):
    assert "no such thing (exit 7)" in refusal(
        run, ["-c", "import sys; sys.stderr.write('noise\\nerror: no such thing\\n'); sys.exit(7)"], 1
    )
    assert "SIGKILL" in refusal(run, ["-c", "import os; os.kill(os.getpid(), 9)"], 1)


def test_the_machine_is_described_and_multiplies():
    told = describe(2)
    assert told["threads"] == 2
    assert told["cpu"]
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        assert re.search(r".\(family \d+, model \d+\)$", told["cpu"])
    rates = run_json(["-m", "benchmarks.machine"], 1)
    assert rates.keys() == {"fp32", "bf16"}
    assert min(rates.values()) > 0


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("a warning\\nerror: no such file\\n", "no such file"),
        ("error: the disk is full\\n=====\\ntrain.py FAILED\\n=====\\n", "the disk is full"),
        ("train.py FAILED\\n  traceback : Signal 6 (SIGABRT)\\n=====\\n", "traceback : Signal 6 (SIGABRT)"),
        ("", "it said nothing"),
    ],
)
def test_a_program_that_fails_is_quoted_with_what_went_wrong(said: str, line: str, refusal) -> None:
    script = f"import sys; sys.stderr.write('{said}'); sys.exit(1)"
    assert refusal(run, ["-c", script], 1).endswith(f": {line} (exit 1)")
