"""A pytest plugin: run a share of the tests that need a GPU; write each outcome at once as a line of JSON.

`python -m pytest -p benchmarks.gpu_tests FILE...` reads GPU_DAY_ROWS=FILE and GPU_DAY_SHARE=0/8 from the
environment. Triton compiles on the CPU, so gpu_day starts several such processes side by side, each with its
own share. One that is killed leaves the outcomes it has. Imports nothing of pytest: it only names its hooks.
"""

import json
import os
import signal
from pathlib import Path

# Written for a process of their own, where Triton compiles or interprets: all their tests count.
PARITY = ("kernel_parity.py", "layer_parity.py")
# The same tests, in two processes: a share of PARITY is better.
WRAPPER = "test_kernels_triton.py"


def test_files(folder: Path) -> list[str]:
    """The files with tests marked `gpu`, and those of PARITY in place of the one that runs them."""
    marked = [path for path in sorted(folder.glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    named = [folder / name for name in PARITY]
    return [str(path) for path in [*named, *marked] if path.name != WRAPPER and path.exists()]


def write(**row: object) -> None:
    with open(os.environ["GPU_DAY_ROWS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def needs_gpu(item) -> bool:
    return item.path.name in PARITY or item.get_closest_marker("gpu") is not None


def pytest_configure(config) -> None:
    # Even if gpu_day itself is killed, this process ends.
    signal.alarm(int(os.environ.get("GPU_DAY_SECONDS", "600")))


def pytest_collection_modifyitems(items: list) -> None:
    """Every n-th test: neighbours compile similar kernels, and take as long."""
    share, shares = map(int, os.environ["GPU_DAY_SHARE"].split("/"))
    items[:] = [item for item in items if needs_gpu(item)][share::shares]


def pytest_collection_finish(session) -> None:
    for item in session.items:
        write(item=item.nodeid, outcome="not reached")


def pytest_collectreport(report) -> None:
    if report.failed:
        write(item=report.nodeid, outcome="error", reason=reason(report.longrepr))


def pytest_runtest_logreport(report) -> None:
    """The call's outcome; that of its fixtures only where they skip or fail."""
    if report.when == "call" or not report.passed:
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        row = {"item": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2)}
        write(**row, **({} if report.passed else {"reason": reason(report.longrepr)}))


def reason(longrepr: object) -> str:
    """One line of what pytest says at length; of a skipped test its third part is the reason."""
    if isinstance(longrepr, tuple):
        return str(longrepr[2])
    crash = getattr(longrepr, "reprcrash", None)
    lines = str(crash.message if crash else longrepr).strip().splitlines()
    return (lines[0] if crash else lines[-1])[:300] if lines else "no reason given"
