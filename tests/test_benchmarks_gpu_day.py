"""The GPU day on a machine without a GPU: all of it in small, and what it does when things go wrong."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import call

from benchmarks import gpu_day, gpu_report, gpu_tests
from benchmarks.gpu_day import Day, Deadline, main, measure, run
from benchmarks.gpu_measure import compared, counts
from benchmarks.gpu_report import Findings, csv_text, markdown

ROOT = Path(__file__).parents[1]


class Clock:
    """Passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def day(tmp_path: Path) -> Day:
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir()
    return Day(tmp_path / "out", Deadline(60), tmp_path / "scratch", tiny=True)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "gpu_day.csv", newline="") as file:
        return list(csv.DictReader(file))


def scripted(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """In the place of gpu_measure a program that has `items` and `tell(item)`."""
    begin = (
        "import os, sys, time\nfrom benchmarks.gpu_tests import write\nitems = sys.argv[1:]\n"
        "def tell(item): write(item=item, value=1)\n"
    )

    def start(day: Day, items: list[str], seconds: float) -> gpu_day.Child:
        return day.start(f"measure-{len(day.children)}", ["-c", begin + script, *items], 1)

    monkeypatch.setattr(gpu_day, "start_measuring", start)


def test_all_of_it_runs_in_small_on_a_cpu(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "out"
    ended = call(main, "--tiny", "--out", out)
    assert ended.code == 0, ended.out + ended.err + (out / "log.txt").read_text()
    files = sorted(path.name for path in out.iterdir())
    assert set(files) <= set(gpu_day.FILES)
    assert len(files) <= 8
    assert all(re.fullmatch(r"[\w.-]+", name) for name in files)
    found = rows(out)
    assert {row["part"] for row in found} == {"facts", "losses", "ceilings", "tests", "steps", "skipped"}
    verdicts = {row["case"]: row["value"] for row in found if row["measure"] == "verdict"}
    assert verdicts == dict.fromkeys(("lora", "dora", "full", "frozen"), "agree")
    assert {row["value"] for row in found if row["measure"] == "outcome"} == {"passed"}
    measured = {(row["case"], row["side"]) for row in found if row["measure"] == "step_ms"}
    sides = {case: {side for one, side in measured if one == case} for case, _ in measured}
    assert sides == {f"tiny mixed fp32 {method}": {"ours", "peer"} for method in gpu_day.METHODS}
    assert all(float(row["value"]) > 0 for row in found if row["measure"] in ("launches", "gpu_ms", "tflop"))
    report = (out / "report.md").read_text()
    assert "4 of 4 methods agree" in report
    assert "The times say nothing about a GPU." in report
    assert "kernels.bench needs a GPU" in report


def test_a_part_leaves_time_to_those_after_it_and_gets_what_others_did_not_use(clock):
    deadline = Deadline(100, clock)
    assert deadline.limit(kept=0.5) == pytest.approx(50 - gpu_day.RESERVE)
    clock.now = 30
    assert deadline.limit(kept=0.5) == pytest.approx(20 - gpu_day.RESERVE)
    assert deadline.limit(kept=0) == pytest.approx(70 - gpu_day.RESERVE)


def test_when_the_time_is_over_nothing_is_started_and_all_is_said(clock, day):
    day.deadline = Deadline(100, clock)
    clock.now = 96
    assert run(day) == 0
    assert day.children == []
    text = (day.out / "report.md").read_text()
    assert "out of time" in text
    for what in ("losses lora", "tests that need a GPU", "kernels.bench"):
        assert what in csv_text(day.findings)


def test_a_process_that_takes_too_long_is_ended_and_what_it_measured_is_kept(day, monkeypatch):
    scripted(monkeypatch, "tell(items[0])\ntime.sleep(60)")
    monkeypatch.setattr(gpu_day, "SHORTEST", 1)
    day.deadline = Deadline(gpu_day.RESERVE + 4)
    measure(day, ["facts", "losses:lora", "losses:dora"], kept=0)
    assert day.findings.measured == {("facts", ""): {"value": 1}}
    assert day.findings.skipped == {"out of time": ["losses lora", "losses dora"]}
    assert day.children[0].process.returncode == -signal.SIGKILL
    assert day.findings.wrong() == {}


def test_an_item_that_fails_is_reported_and_the_others_are_measured(day, monkeypatch):
    fail = "for item in items:\n  if item == 'facts:2': sys.exit('error: no such kernel')\n  tell(item)"
    scripted(monkeypatch, fail)
    items = ["facts:1", "facts:2", "facts:3"]
    assert run(day, [lambda day: measure(day, items, 0)]) == 1
    assert day.findings.failed == {"facts 2": "no such kernel (exit 1)"}
    assert set(day.findings.measured) == {("facts", "1"), ("facts", "3")}
    assert "| facts 2 | no such kernel (exit 1) |" in (day.out / "report.md").read_text()
    assert "error: no such kernel" in (day.out / "log.txt").read_text()


def test_when_several_items_in_a_row_fail_the_rest_is_not_tried(day, monkeypatch):
    scripted(monkeypatch, "sys.exit('error: no GPU answers')")
    measure(day, [f"facts:{i}" for i in range(8)], kept=0)
    assert len(day.children) == len(day.findings.failed) == gpu_day.MOST_FAILURES
    assert day.findings.skipped == {"3 failed one after another": [f"facts {i}" for i in range(3, 8)]}


def test_an_item_that_hangs_is_ended_and_the_others_are_measured(day, monkeypatch):
    scripted(
        monkeypatch,
        "import faulthandler\nfaulthandler.dump_traceback_later(0.2, exit=True)\n"
        "if items[0] == 'facts': time.sleep(60)\ntell(items[0])",
    )
    measure(day, ["facts", "facts:1"], kept=0)
    assert day.findings.failed == {"facts": "an item took too long; log.txt has where"}
    assert ("facts", "1") in day.findings.measured


STOPPED = """
import sys
from pathlib import Path
from benchmarks import gpu_day
from training.exit import run_command

folder = Path(sys.argv[1])
command = ["-c", folder.joinpath("child.py").read_text(), str(folder / "open")]
gpu_day.start_measuring = lambda day, items, seconds: day.start("child", command, 1)
day = gpu_day.Day(folder, gpu_day.Deadline(60), folder / "scratch", True)
part = lambda day: gpu_day.measure(day, ["facts", "facts:1", "facts:2"], kept=0)
sys.exit(run_command(lambda: gpu_day.run(day, [part])))
"""
# It starts a process that holds a pipe open, and measures two of three things.
CHILD = """
import os, subprocess, sys, time
from benchmarks.gpu_tests import write
program = "import sys, time; file = open(sys.argv[1], 'w'); print(flush=True); time.sleep(60)"
started = subprocess.Popen([sys.executable, "-c", program, sys.argv[1]], stdout=subprocess.PIPE)
started.stdout.readline()
write(item="facts", value=1)
time.sleep(0.3)
write(item="facts:1", group=os.getpgrp())
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=str)
def test_what_stops_it_leaves_what_is_done(tmp_path, number, code):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "child.py").write_text(CHILD)
    os.mkfifo(tmp_path / "open")
    reader = os.open(tmp_path / "open", os.O_RDONLY | os.O_NONBLOCK)
    with subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT) as started:
        table, until = tmp_path / "gpu_day.csv", time.monotonic() + 30
        while not (table.exists() and "group" in table.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(number)
        assert started.wait(30) == code
    (row,) = [row for row in rows(tmp_path) if row["measure"] == "group"]
    state = "Interrupted" if number == signal.SIGTERM else "Not done yet"
    assert state in (tmp_path / "report.md").read_text()
    if number == signal.SIGKILL:  # nobody ends the child then; a real one ends at its own time limit
        os.killpg(int(row["value"]), signal.SIGKILL)
        os.close(reader)
        return
    try:
        assert os.read(reader, 1) == b""  # nobody has it open; else this would be a BlockingIOError
    finally:
        os.close(reader)


TESTS = """
import pytest

@pytest.fixture
def broken():
    raise OSError("no such device")

@pytest.mark.gpu
@pytest.mark.parametrize("i", range(2))
def test_right(i): pass

@pytest.mark.gpu
def test_wrong(): raise ValueError("the sum is off\\nby one")

@pytest.mark.gpu
def test_broken(broken): pass

@pytest.mark.gpu
@pytest.mark.skip(reason="needs sm_90")
def test_left_out(): pass

def test_of_the_cpu(): assert False
"""


def outcomes(day: Day, folder: Path, shares: int) -> dict[str, dict]:
    """What the plugin writes of the tests above, in so many processes."""
    (folder / "test_made_up.py").write_text(TESTS)
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\nmarkers =\n    gpu: needs one\n")
    command = ["-m", "pytest", "-q", "-p", "benchmarks.gpu_tests", "-c", str(settings), str(folder)]
    children = [day.start(f"t{i}", command, 1, GPU_DAY_SHARE=f"{i}/{shares}") for i in range(shares)]
    day.watch(children, 60, lambda line: day.findings.add("tests", line.pop("item").split("::")[1], line))
    assert sum(child.rows.read_text().count("not reached") for child in children) == 5  # each once
    return day.findings.part("tests")


def test_each_test_that_needs_a_gpu_runs_in_one_share_and_says_how_it_ended(day, tmp_path):
    found = outcomes(day, tmp_path, shares=2)
    assert {name: one["outcome"] for name, one in found.items()} == {
        "test_right[0]": "passed",
        "test_right[1]": "passed",
        "test_wrong": "failed",
        "test_broken": "error",
        "test_left_out": "skipped",
    }
    assert found["test_wrong"]["reason"] == "ValueError: the sum is off"
    assert found["test_broken"]["reason"] == "OSError: no such device"
    assert "needs sm_90" in found["test_left_out"]["reason"]
    assert set(day.findings.wrong()) == {"test_wrong", "test_broken"}


def test_a_failing_test_is_exit_code_1_and_named(day, tmp_path, capsys):
    assert run(day, [lambda day: outcomes(day, tmp_path, shares=1)]) == 1
    assert "failed: test_wrong: ValueError: the sum is off" in capsys.readouterr().out
    assert "| test_wrong | ValueError: the sum is off |" in (day.out / "report.md").read_text()


def test_the_files_with_gpu_tests_are_found_and_parity_runs_in_the_place_of_its_wrapper():
    names = {Path(path).name for path in gpu_tests.test_files(ROOT / "tests")}
    assert names >= {"test_gpu.py", "test_kernels_bench.py", "test_kernels_dispatch.py", *gpu_tests.PARITY}
    assert gpu_tests.WRAPPER not in names


def test_losses_agree_or_differ_and_nan_agrees_with_nothing():
    assert compared([2.0, 1.0], [2.0, 1.00005])["verdict"] == "agree"
    assert compared([2.0, 1.0], [2.0, 1.001])["verdict"] == "DIFFER"
    assert compared([2.0, float("nan")], [2.0, 1.0])["verdict"] == "DIFFER"
    findings = Findings(tiny=False)
    findings.add("losses", "dora", compared([2.0, 1.0], [2.0, 2.0]))
    assert findings.wrong() == {"losses of dora": "they differ by 5.0e-01, allowed 1e-04"}


def event(name: str, device: str, us: float, annotation: bool = False) -> SimpleNamespace:
    """As torch.profiler has it"""
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        cpu_children=[],
        is_user_annotation=annotation,
    )


def test_a_profile_counts_kernels_copies_and_waits_of_a_step_and_no_annotation():
    on_device = [
        event("gemm", "CUDA", 3000),
        event("_down_kernel", "CUDA", 1000),
        event("Memcpy HtoD (Pageable -> Device)", "CUDA", 500),
        event("Memset (Device)", "CUDA", 500),
        event("Optimizer.step#AdamW.step", "CUDA", 9000, annotation=True),
    ]
    on_host = [
        event(f"cuda{what}", "CPU", 5) for what in ("LaunchKernel", "StreamSynchronize", "DeviceSynchronize")
    ]
    assert counts(on_device + on_host, "CUDA", 2) == {"launches": 1, "copies": 1, "gpu_ms": 2.5, "waits": 0.5}
    assert counts(on_host, "CUDA", 2) == {}


def filled() -> Findings:
    """One case on both sides, another on ours alone."""
    findings = Findings(tiny=False)
    findings.add("facts", "", {"card": "A card", "capability": "7.5"})
    findings.add("ceilings", "fp16", {"copy_gb_per_s": 300.0, "tflop_per_s": 50.0})
    for side, ms in (("ours", 20.0), ("peer", 30.0)):
        measures = {"step_ms": ms, "peak_mib": 100.0, "tflop": 0.1, "first_step_s": 9.0}
        findings.add("steps", f"MiniLM mixed fp16 lora {side}", measures)
    findings.add("steps", "MiniLM mixed fp16 dora ours", {"step_ms": 1.0, "tflop": 0.1})
    findings.add("steps", "MiniLM mixed bf16 lora ours", {"skipped": "no bf16 here"})
    times = {"ours_gpu_us": "20", "unfused_gpu_us": "50", "PEFT_gpu_us": "", "at_least_us": "10"}
    findings.kernels = [{"model": "MiniLM", "dtype": "fp16", "tokens": "1280", "what": "LoRA", **times}]
    return findings


def test_the_report_has_the_ratio_the_shares_of_the_ceilings_and_what_is_missing():
    page = markdown(filled(), "Done")
    assert page.startswith("# GPU day: A card\n")
    # 0.1 TFLOP in 20 ms are 5 of 50 TFLOP/s.
    begins = "| MiniLM mixed fp16 lora | **1.50** | 20 / 30 | 100 / 100 |"
    assert f"{begins} - / - | - / - | - / - | 9 / 9 | 10.0% / 6.7% |" in page
    assert "| MiniLM mixed fp16 dora | - | 1 / - |" in page
    assert "| MiniLM | fp16 | 1280 | LoRA | 2.50 | - | 0.50 |" in page
    assert "| no bf16 here | steps MiniLM mixed bf16 lora ours |" in page
    assert "steps,MiniLM mixed fp16 lora,peer/ours,ratio,1.5000" in csv_text(filled())
    assert gpu_day.half(filled()) == "fp16"
    assert "| failed | 0 |" in markdown(Findings(tiny=False), "Interrupted")


def test_kernels_are_read_from_what_the_benchmark_wrote_and_its_failure_is_told(day):
    text = gpu_report.kernels_text(filled())
    for name, code in (("a", 0), ("b", 1)):
        write = f"open({str(day.scratch / name)!r} + '.csv', 'w').write({text!r})"
        script = f"{write}; raise SystemExit({code})"
        gpu_day.read_kernels(day, day.start(name, ["-c", script], 1), name, 60)
    assert list(day.findings.failed) == ["b"]
    assert (day.out / "kernels.csv").read_text() == text


@pytest.mark.parametrize(
    ("absent", "part", "said"),
    [
        ("pytest", gpu_day.test, "pytest is not installed"),
        ("peft", gpu_day.train, "peft is not installed"),
    ],
)
def test_a_missing_package_costs_its_own_part_and_a_line(day, monkeypatch, absent, part, said):
    asked = []
    monkeypatch.setattr(gpu_day, "installed", lambda name: name != absent)
    monkeypatch.setattr(gpu_day, "measure", lambda day, items, kept: asked.extend(items))
    part(day)
    assert list(day.findings.skipped) == [said]
    assert all(item.endswith(":ours") for item in asked)
    assert day.children == []


def test_without_matplotlib_there_is_a_line_in_the_place_of_the_plot(day, monkeypatch):
    day.findings = filled()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    day.plot()
    *_, (reason, left_out) = day.findings.skipped.items()
    assert reason.startswith("matplotlib cannot be imported: ")
    assert left_out == ["gpu_day.png"]
    assert list(day.out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out", "x"], "no CUDA device: there is nothing to measure; --tiny runs all of it on a CPU"),
        (["--tiny"], "--out"),
        (["--out", "x", "--seconds", "5"], "--seconds: expected at least 60, got 5"),
        (["--out", __file__], "--out: expected a folder that can be written"),
        (["--out", "x", "--nope"], "--nope"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line
    assert list(tmp_path.iterdir()) == []
