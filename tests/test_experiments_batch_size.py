"""The largest batch: found by few measurements, none of them beyond what the line through them allows."""

import csv
from collections.abc import Callable

import pytest
from small_runs import call, flags, settings

from experiments.batch_size import Step, largest, last_within, main
from experiments.batch_step import available_mib, measure_apart

ALL = 10_000  # examples

# MiB of a batch's size: a line, one that bends down as the longest examples are used up, one that bends up.
PEAKS: dict[str, Callable[[int], float]] = {
    "line": lambda n: 500 + 7.3 * n,
    "bends down": lambda n: 500 + 90 * n**0.7,
    "bends up": lambda n: 500 + n + n**2 / 50,
    "steps": lambda n: 500 + 64 * (n // 64),
}


@pytest.mark.parametrize("peaks", PEAKS)
@pytest.mark.parametrize("room", [560, 900, 4000, 20_000])
def test_it_finds_the_largest_multiple_of_eight_that_fits(peaks: str, room: float) -> None:
    peak = PEAKS[peaks]
    sizes = largest(lambda n: Step(n, peak(n), 1.0), room, ALL)
    expected = max((n for n in range(8, ALL + 1, 8) if peak(n) <= room), default=None)
    assert max((n for n, step in sizes.items() if step.peak <= room), default=None) == expected
    assert len(sizes) <= 18
    if peaks in ("line", "bends down"):  # two sizes make the first line
        assert all(step.peak <= room for n, step in sizes.items() if n > 16)


def test_a_gpu_that_is_out_of_memory_is_a_size_that_does_not_fit() -> None:
    tried = []

    def measure(n: int) -> Step:
        tried.append(n)
        return Step(n, 100.0, 1.0, fits=n <= 1000)  # as an allocator whose peak says nothing

    sizes = largest(measure, 1e9, ALL)
    assert max(n for n, step in sizes.items() if step.fits) == 1000
    assert len(tried) == len(set(tried)) < 20


@pytest.mark.parametrize(("most", "expected"), [(100, 96), (8, 8), (7, None)])
def test_no_batch_is_larger_than_the_data(most: int, expected: int | None) -> None:
    sizes = largest(lambda n: Step(n, 1.0, 1.0), 100, most)
    assert max(sizes, default=None) == expected


def test_the_line_goes_through_the_two_largest_that_fitted() -> None:
    sizes = {8: Step(0, 400.0, 1), 16: Step(0, 500.0, 1), 32: Step(0, 600.0, 1), 64: Step(0, 0.0, 0, False)}
    assert last_within(sizes, 706) == 48  # 6.25 MiB an example: 32 + 16.96
    assert last_within({8: sizes[8]}, 706) > ALL


def test_it_tries_real_steps_and_says_what_they_took(tiny, small_data, tmp_path):
    out = tmp_path / "sizes.csv"
    ended = call(main, *flags(tiny, small_data, task="sts"), "--memory", 100, "--out", out)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == "largest batch: 24"  # all there are
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["batch"] for line in lines] == ["8", "16", "24"]
    tokens = [int(line["tokens"]) for line in lines]
    assert tokens == sorted(tokens)
    assert tokens[0] / 8 >= tokens[2] / 24  # the longest first


@pytest.mark.parametrize("task", ["sst+sts", "sst"])
def test_a_step_is_that_of_the_task_with_the_most_tokens(task, tiny, small_data):
    step = measure_apart(settings(tiny, small_data, task=task, method="lora"), 16)
    assert step["peak"] > 0
    alone = measure_apart(settings(tiny, small_data, task="sts", method="lora"), 16)["tokens"]
    assert (step["tokens"] == alone) == (task == "sst+sts")  # pairs are longer
    if task == "sst+sts":
        both = settings(tiny, small_data, task=task, method="lora", adapters="per-task")
        assert measure_apart(both, 16)["tokens"] > alone


def test_what_is_available_is_the_systems_or_the_containers(tmp_path, refusal):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:   8388608 kB\n")
    assert available_mib(meminfo, tmp_path) == 8192
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert available_mib(meminfo, tmp_path) == 8192
    (tmp_path / "memory.max").write_text(f"{3 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30}\n")
    assert available_mib(meminfo, tmp_path) == 2048
    assert available_mib(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "0"], "--memory: expected GiB above 0, got 0"),
        (["--limit", "1.5"], "--limit: expected a share above 0 and at most 1, got 1.5"),
        (["--method", "frozen"], "--method frozen: its encoder reads the data once, whatever the batch"),
        (["--task", "none"], "--task: expected sst, qqp, sts"),
        (["--overfit-batch"], "expected settings of a run"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line


def test_no_room_for_the_smallest_batch_is_said_with_what_it_takes(tiny, small_data):
    ended = call(main, *flags(tiny, small_data, task="sts"), "--memory", 0.01)
    assert ended.code == 2
    assert "expected room for a batch of 8, 0." in ended.err
