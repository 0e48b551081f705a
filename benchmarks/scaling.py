"""How a step's time and memory grow: `python -m benchmarks.scaling --out FILE.csv --plot FILE.png`.

One axis at a time away from a base point; each point is a process of its own (benchmarks/step.py) on a BERT
with random weights. For each axis y = c xᵏ is fitted by least squares of log y on log x, with k's 95 %
interval (Student's t, n - 2 degrees of freedom). k describes the range that was measured: what does not grow
with x, as the weights' memory does not with the batch, makes it smaller, and it is no asymptote.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import exp, log
from pathlib import Path
from statistics import median

from benchmarks.flags import add_common, check_common, check_least, log_beside
from benchmarks.machine import describe
from benchmarks.tables import show
from benchmarks.turns import Log, Round, run_json, take_turns
from minibert.files import check_output, replacing
from training.cli import Parser
from training.exit import run_command

COLUMNS = ("axis", "value", "s/step", "MiB above start", "time's exponent", "memory's exponent")
MEASURED = {"seconds": "seconds a step", "memory_above_start_mib": "MiB above start"}
HEAD = 32  # width of an attention head, as all-MiniLM-L6-v2's
METHODS = ("lora", "dora", "full")


@dataclass(frozen=True)
class Point:
    """What a step is measured at; the base is all-MiniLM-L6-v2's shape."""

    length: int = 64
    batch: int = 16
    rank: int = 8
    hidden: int = 384
    layers: int = 6

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


# Tokens: length and batch grow together.
AXES: dict[str, dict[int, Point]] = {
    "length": {n: Point(length=n) for n in (16, 32, 64, 128, 256)},
    "batch": {n: Point(batch=n) for n in (4, 8, 16, 32, 64)},
    "tokens": {n * m: Point(length=n, batch=m) for n, m in ((16, 4), (32, 8), (64, 16), (128, 32))},
    "rank": {n: Point(rank=n) for n in (1, 2, 4, 8, 16, 32, 64)},
    "hidden": {n: Point(hidden=n) for n in (128, 256, 384, 512, 768)},
    "layers": {n: Point(layers=n) for n in (1, 2, 4, 6, 12)},
}


def model_folder(point: Point, among: Path) -> Path:
    """The checkpoint of a point's shape, written when it is first needed."""
    from benchmarks.models import write_random_model
    from minibert.model import BertConfig

    folder = among / f"{point.hidden}x{point.layers}"
    if not folder.exists():
        heads, inner = max(1, point.hidden // HEAD), 4 * point.hidden
        shape = {"num_hidden_layers": point.layers, "num_attention_heads": heads, "intermediate_size": inner}
        write_random_model(folder, BertConfig(hidden_size=point.hidden, **shape))
    return folder


def measure(point: Point, given: argparse.Namespace, among: Path, i: int) -> dict:
    words = [
        "--model",
        str(model_folder(point, among)),
        "--method",
        given.method,
        "--steps",
        str(given.steps),
    ]
    words += ["--length", str(point.length), "--batch", str(point.batch), "--device", given.device]
    words += [] if given.method == "full" else ["--rank", str(point.rank)]
    return run_json(["-m", "benchmarks.step", *words], given.threads)


def exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """k of y = c xᵏ by least squares of the logarithms, and half the width of its 95 % interval."""
    from scipy import stats

    if min(y) == max(y):  # of a constant linregress gives no error
        return 0.0, 0.0
    fit = stats.linregress(list(map(log, x)), list(map(log, y)))
    return fit.slope, stats.t.ppf(0.975, len(x) - 2) * fit.stderr


def middles(rounds: Sequence[Round], axis: str, key: str) -> list[float]:
    """The median over the rounds at each value of an axis."""
    return [median(one[str(point)][key] for one in rounds) for point in AXES[axis].values()]


def rows(rounds: Sequence[Round], axes: Sequence[str]) -> list[tuple[str, ...]]:
    lines = []
    for axis in axes:
        values = list(AXES[axis])
        seconds, mib = (middles(rounds, axis, key) for key in MEASURED)
        fits = ["{:.2f} ± {:.2f}".format(*exponent(values, one)) for one in (seconds, mib)]
        for value, spent, taken in zip(values, seconds, mib, strict=True):
            lines.append((axis, str(value), f"{spent:.4f}", f"{taken:.0f}", *fits))
    return lines


def plot(rounds: Sequence[Round], axes: Sequence[str], path: Path) -> None:
    """Time above, memory below, an axis each: log-log, with the fitted line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(2.2 * len(axes) + 0.6, 5.2), layout="constrained")
    grid = figure.subplots(len(MEASURED), len(axes), squeeze=False, sharey="row")
    for line, (key, label) in zip(grid, MEASURED.items(), strict=True):
        line[0].set_ylabel(label)
        for one, axis in zip(line, axes, strict=True):
            values, y = list(AXES[axis]), middles(rounds, axis, key)
            k, half = exponent(values, y)
            level = sum(log(b) - k * log(a) for a, b in zip(values, y, strict=True)) / len(y)
            one.loglog(values, y, "o")
            one.loglog(values, [exp(level) * a**k for a in values], linewidth=1)
            one.set_title(f"k = {k:.2f} ± {half:.2f}", fontsize=10)
            one.set_xlabel(axis)
            one.set_xticks(values, values, fontsize=8)
            one.xaxis.set_minor_locator(NullLocator())
            one.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            one.yaxis.set_minor_locator(NullLocator())
            one.yaxis.set_major_formatter("{x:g}")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for a value that makes no sense."""
    parser = Parser(
        prog="python -m benchmarks.scaling",
        description="How a training step's time and memory grow with its size.",
        allow_abbrev=False,
    )
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--axes", nargs="+", choices=AXES, metavar="AXIS", help=f"[{' '.join(AXES)}]")
    parser.add_argument("--steps", type=int, default=10, help="timed in each process (10)")
    add_common(parser, rounds=2)
    parser.add_argument("--plot", type=Path, help="draw it there, as PNG (matplotlib)")
    given = parser.parse_args(arguments)
    check_common(given)
    check_least(steps=(given.steps, 1))
    check_output(given.plot, "--plot")
    if given.method == "full" and "rank" in (given.axes or ()):
        parser.error("--axes rank: --method full has no adapters")
    given.axes = given.axes or [axis for axis in AXES if (given.method, axis) != ("full", "rank")]
    return given


def main() -> int:
    given = parse_flags(sys.argv[1:])
    machine = describe(given.threads)
    about = {name: getattr(given, name) for name in ("method", "steps", "device")} | {"machine": machine}
    log_of_points = Log(log_beside(given.out), about)
    with tempfile.TemporaryDirectory() as among:
        points = dict.fromkeys(point for axis in given.axes for point in AXES[axis].values())
        measures: dict[str, Callable[[int], dict]] = {
            str(point): partial(measure, point, given, Path(among)) for point in points
        }
        rounds = take_turns(measures, given.rounds, log_of_points)
    show(COLUMNS, rows(rounds, given.axes), machine, given.out)
    if given.plot:
        plot(rounds, given.axes, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
