"""The benchmark of the kernels without a GPU: the real layers on a CPU, a timer that reads no GPU's clock."""

import argparse
import csv
import importlib.util
import io
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import call

from kernels import bench, cases, dispatch, timing
from kernels.bench import Row, csv_text, layers, parse, plot, table
from kernels.cases import operations
from kernels.costs import PATHS, Layer, Limits, layer
from kernels.timing import CudaTimer, Timing, sustained
from minibert.errors import InputError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = Layer(M=24, K=16, N=32, r=3, splits=16)
OPERATIONS = {"down", "up", "outer", "outer and dot", "backward y", "merge", "merge and gain", "gain",
              "down, dropout", "backward x, dropout"}  # fmt: skip
LAYERS = set(PATHS) - {"frozen"}
HAS_PEFT = bench.installed()


def fake_timer(calls):
    """Runs each call once; the first is said to take a microsecond, the next two, ..."""
    for one in calls:
        one()
    return [Timing(gpu=(i + 1) * 1e-6, cpu=(i + 1) * 1e-5) for i in range(len(calls))]


@pytest.fixture
def small(monkeypatch) -> argparse.Namespace:
    """A benchmark of two layers that a CPU runs in a moment."""
    monkeypatch.setattr(bench, "LAYERS", {"tiny": ((16, 32), (32, 16))})
    monkeypatch.setattr(timing, "sustained", lambda *_: Limits(1e9, 1e12))
    return parse(["--models", "tiny", "--tokens", "24", "--ranks", "1", "3"])


@pytest.fixture
def row() -> Row:
    times = {"ours": Timing(2e-5, 1e-4), "unfused": Timing(4e-5, 2e-4), "PEFT": Timing(8e-5, 3e-4)}
    return Row("MiniLM", layer(1280, 384, 1536, 8, 75), "DoRA", times, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("make", "names"), [(operations, OPERATIONS), (layers, LAYERS)])
def test_every_case_runs_in_every_way(make, names, dtype):
    seen = set()
    for case in make(SMALL, dtype, CPU):
        ways = ["ours", "unfused"] + ["PEFT"] * (make is layers and HAS_PEFT)
        assert list(case.ways) == ways
        assert sum(one.bytes for one in case.passes) > 0
        for run in case.ways.values():
            result = run()
            for tensor in result if isinstance(result, tuple) else (result,):
                assert tensor is None or tensor.isfinite().all()
        seen.add(case.name)
    assert seen == names


def test_a_layers_ways_differentiate_by_the_same_tensors():
    for case in layers(SMALL, torch.float32, CPU):
        shapes = [sorted(tuple(tensor.shape) for tensor in run()) for run in case.ways.values()]
        vectors = [(32,)] if "DoRA" in case.name else []
        assert shapes[0] == sorted([(24, 16), (3, 16), (32, 3), *vectors])
        assert all(other == shapes[0] for other in shapes)


def test_ours_and_unfused_compute_the_same_where_nothing_is_drawn():
    for case in [*operations(SMALL, torch.float32, CPU), *layers(SMALL, torch.float32, CPU)]:
        # The updates of x and y in place are of other tensors the second time.
        if "dropout" not in case.name and case.name != "up":
            torch.testing.assert_close(case.ways["ours"](), case.ways["unfused"]())


def test_unfused_is_without_kernels_and_ours_is_not(monkeypatch):
    inside: list[bool] = []

    @contextmanager
    def without_kernels():
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(dispatch, "without_kernels", without_kernels)
    assert cases.unfused(lambda: list(inside))() == [True]
    assert inside == []


def test_a_layers_least_time_is_its_path_s(small):
    limits = Limits(1e9, 1e12)
    for row in bench.measure(small, torch.float32, CPU, fake_timer, limits):
        if row.name in PATHS:
            assert row.floor == pytest.approx(PATHS[row.name](row.sizes).seconds(limits))


def test_everything_that_the_flags_ask_for_is_timed_and_written(small, tmp_path, capsys):
    small.csv = tmp_path / "bench.csv"
    bench.run(small, CPU, "a CPU", fake_timer)
    printed = capsys.readouterr().out
    assert printed.startswith("a CPU, fp16: copies at 1 GB/s, products at 1.0 TFLOP/s; times in us\n")
    with open(small.csv, newline="") as file:
        lines = list(csv.DictReader(file))
    asked = {(K, rank, name) for K in ("16", "32") for rank in "13" for name in OPERATIONS | LAYERS}
    assert {(line["K"], line["rank"], line["what"]) for line in lines} == asked
    assert len(lines) == len(asked) == printed.count(" tiny ") + printed.count("\ntiny ")
    for line in lines:
        assert (line["ours_gpu_us"], line["ours_cpu_us"], line["unfused_gpu_us"]) == ("1.00", "10.00", "2.00")
        assert line["PEFT_gpu_us"] == ("3.00" if line["what"] in LAYERS and HAS_PEFT else "")
        assert float(line["at_least_us"]) > 0


def test_the_table_has_ratios_and_the_share_of_the_least_time(row):
    header, line = (text.split("  ") for text in table([row]).splitlines())
    told = dict(zip(filter(None, map(str.strip, header)), filter(None, map(str.strip, line)), strict=True))
    assert told == {"layer": "MiniLM 384 -> 1536", "tokens": "1280", "rank": "8", "what": "DoRA",
                    "ours": "20.0", "unfused": "40.0", "PEFT": "80.0", "/unfused": "0.50", "/PEFT": "0.25",
                    "at least": "10.0", "reached": "50%"}  # fmt: skip


def test_a_way_that_was_not_timed_is_a_dash_in_the_table_and_empty_as_csv(row):
    without = row._replace(times={"ours": row.times["ours"], "unfused": row.times["unfused"]})
    assert table([without]).splitlines()[1].split()[7:12] == ["20.0", "40.0", "-", "0.50", "-"]
    (line,) = csv.DictReader(io.StringIO(csv_text([without], "T4", "fp16")))
    assert (line["device"], line["dtype"], line["PEFT_gpu_us"], line["PEFT_cpu_us"]) == ("T4", "fp16", "", "")


def test_a_plot_is_a_picture(row, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    without = row._replace(times={"ours": row.times["ours"], "unfused": row.times["unfused"]}, name="down")
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        plot([row, without], "a GPU", tmp_path / f"bench{suffix}")
        assert (tmp_path / f"bench{suffix}").read_bytes().startswith(start)


class Clock:
    """A GPU that does one thing after another, and at once; time passes where it is told to."""

    def __init__(self):
        self.now = 0.0
        self.said: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float):
        def act() -> None:
            self.said.append(name)
            self.now += seconds

        return act


class TestTimer:
    @pytest.fixture
    def clock(self, monkeypatch) -> Clock:
        clock = Clock()

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, end) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing, "time", clock)
        return clock

    @pytest.fixture
    def timer(self, clock) -> CudaTimer:
        timer = CudaTimer(repeats=4, device=CPU, flushed=1024)
        assert timer.buffer.nbytes == 1024
        timer.buffer = SimpleNamespace(zero_=clock.takes("flush", 0.002))
        return timer

    def test_a_call_s_time_is_its_own_without_the_flushes(self, clock, timer):
        short, long = timer([clock.takes("one", 0.001), clock.takes("two", 0.01)])
        assert short == (pytest.approx(0.001), pytest.approx(0.001))
        assert long == (pytest.approx(0.01), pytest.approx(0.01))

    def test_calls_take_turns_and_flushes_keep_the_gpu_busy_while_each_is_launched(self, clock, timer):
        timer([clock.takes("one", 0.001), clock.takes("two", 0.01)])
        timed = clock.said[-4 * 2 * 9 :]
        for start, name in zip(range(0, len(timed), 9), ["one", "two", "two", "one"] * 2, strict=True):
            assert timed[start : start + 9] == ["flush"] * 8 + [name]  # 8 of 2 ms: 1.5 times 10 ms

    def test_what_a_device_sustains_is_bytes_and_flops_over_their_times(self):
        limits = sustained(fake_timer, CPU, torch.float32, copied=1000, width=10)
        assert limits == Limits(pytest.approx(2000 / 1e-6), pytest.approx(2000 / 2e-6))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "128", "0"], "--tokens: expected 1 to 1048576, got 0"),
        (["--ranks", "385"], "--ranks: expected 1 to 384, got 385"),
        (["--repeats", "0"], "--repeats: expected 1 to 10000, got 0"),
        (["--dtype", "fp8"], "--dtype"),
        (["--models", "GPT"], "--models"),
        (
            ["--csv", "no/such/folder/a.csv"],
            "--csv: no/such/folder/a.csv cannot be written (No such file or directory)",
        ),
        (["--plot", "a.exe"], "--plot: expected a file that ends in .png, .svg, .pdf, got a.exe"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(bench.main, *arguments)
    assert ended.code == 2
    assert said in ended.line


def test_help_answers_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "kernels.bench", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in run.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "peft", "matplotlib"}


def test_a_plot_without_matplotlib_is_refused_before_anything_is_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="^--plot: matplotlib is not installed: pip install matplotlib$"):
        parse(["--plot", str(tmp_path / "a.png")])


def test_without_cuda_it_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = call(bench.main)
    assert ended.code == 2
    assert "no CUDA device" in ended.line


def test_a_gpu_too_old_for_the_dtype_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    ended = call(bench.main, "--dtype", "bf16")
    assert ended.code == 2
    assert ended.line == "error: --dtype bf16: expected sm_80 or newer, this is sm_75"


INTERPRETED = """
import torch
from kernels.bench import layers
from kernels.cases import operations
from kernels.costs import Layer
from kernels.dispatch import runs_kernels
assert runs_kernels(torch.ones(1))
for make in (operations, layers):
    for case in make(Layer(M=24, K=16, N=32, r=3, splits=16), torch.float16, torch.device("cpu")):
        case.ways["ours"](), case.ways["unfused"]()
        print(case.name)
"""


def test_every_case_is_one_that_the_kernels_take():
    pytest.importorskip("triton", reason="Triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert set(run.stdout.splitlines()) == OPERATIONS | LAYERS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_times_a_small_model(tmp_path):
    file = tmp_path / "bench.csv"
    ended = call(bench.main, "--models", "MiniLM", "--tokens", 256, "--repeats", 3, "--csv", file)
    assert ended.code == 0, ended.err
    with open(file, newline="") as lines:
        assert all(float(line["ours_gpu_us"]) > 0 for line in csv.DictReader(lines))
