"""Curves and scatter plots as SVG, by matplotlib: without fonts, in the colours of the page around them."""

import importlib
import importlib.util
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean, quantiles, stdev
from typing import TYPE_CHECKING

from minibert.errors import InputError

if TYPE_CHECKING:
    from experiments.listing import Run

SIZE = (5.0, 3.5)  # inches; 360 points wide, so that on a phone a point is a pixel
INK = "#010203"  # stands for the page's own colour of text
# Light enough for a dark page, dark enough for a light one (matplotlib's tab10).
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22",
           "#17becf")  # fmt: skip
DASHES = ("", "4 2", "1 2")  # by which the first, second and third ten differ
LINES = ("-", (0, (4, 2)), (0, (1, 2)))
MARKERS = ("o", "s", "^")
CORNERS = ((7, 6), (-7, 6), (7, -6), (-7, -6), (14, 0), (-14, 0), (0, 12), (0, -12))  # points from a marker
ROOM = 9  # pixels between two numbers
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same picture, the same file
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Line:
    """A setting as the plots show it: its number in the table, and the runs of all its seeds."""

    number: int
    runs: Sequence["Run"]

    @property
    def style(self) -> int:
        return (self.number - 1) // len(COLOURS) % len(DASHES)

    @property
    def colour(self) -> str:
        return COLOURS[(self.number - 1) % len(COLOURS)]

    def sample(self) -> str:
        """A piece of it for the legend."""
        stroke = f'stroke="{self.colour}" stroke-width="4" stroke-dasharray="{DASHES[self.style]}"'
        return f'<svg viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" {stroke}/></svg>'


def check_installed() -> None:
    """Raises InputError if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the plots need matplotlib: pip install matplotlib")


def curves(lines: Sequence[Line], name: str, label: str) -> str:
    """What metrics.jsonl says by epoch: a thin line a seed, a thick one their mean if all went as far.

    In the frame is what is not `far_below` on dev; of the loss, everything.
    """
    far = far_below(lines) if name == "dev" else set()

    def draw(axes) -> None:
        for line in sorted(lines, key=lambda line: line.number in far):
            if line.number in far:
                axes.set_ylim(axes.get_ylim())  # as the ones before it have made it
            _curve(axes, line, name)
        if far:
            below = f"below: {', '.join(map(str, sorted(far)))}"
            axes.annotate(below, (1, 0), (-4, 6), "axes fraction", "offset points", ha="right")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return picture(label, draw)


def _curve(axes, line: Line, name: str) -> None:
    told = [{epoch["epoch"]: epoch[name] for epoch in run.history} for run in line.runs]
    look = {"color": line.colour, "linestyle": LINES[line.style]}
    several = len(told) > 1
    thin = {"linewidth": 0.7, "alpha": 0.6} if several else {"linewidth": 1.6, "marker": "."}
    for one in told:
        axes.plot(one.keys(), one.values(), **look, **thin)
    if several and len({tuple(one) for one in told}) == 1:
        middle = [mean(one[epoch] for one in told) for epoch in told[0]]
        axes.plot(told[0].keys(), middle, **look, linewidth=1.8, marker=".")


def pareto(lines: Sequence[Line], name: str, label: str, metric: str) -> str:
    """dev against a cost, both as mean ± standard deviation; dashed, what nothing beats in both.

    A setting `far_below` the rest is a ▼ at the foot.
    """
    far = far_below(lines)

    def draw(axes) -> None:
        points = []
        for line in lines:
            costs, scores = ([run.result[key] for run in line.runs] for key in (name, "dev"))
            x, y = mean(costs), mean(scores)
            if line.number in far:
                axes.plot(x, 0, "v", color=line.colour, transform=axes.get_xaxis_transform(), clip_on=False)
            else:
                spread = {"xerr": stdev(costs), "yerr": stdev(scores)} if len(costs) > 1 else {}
                axes.errorbar(x, y, fmt=MARKERS[line.style], color=line.colour, linewidth=1, **spread)
            points.append((x, y))
        axes.margins(0.12)
        _cost_axis(axes, [x for x, _ in points], label)
        foot, top = axes.get_ylim()
        axes.set_ylim(foot, top)  # whatever the dashed line comes from
        front = zip(*best(points), strict=True)
        axes.plot(*front, color=INK, linestyle="--", linewidth=0.8, alpha=0.5, zorder=0)
        _number(axes, lines, [(x, max(y, foot)) for x, y in points])

    return picture(f"dev {metric} by {label}", draw)


def _cost_axis(axes, costs: Sequence[float], label: str) -> None:
    """Logarithmic where costs differ by more than a factor of ten; 340k, 22.6M."""
    ticker = importlib.import_module("matplotlib.ticker")
    axes.set_xlabel(label)
    if 0 < 10 * min(costs) < max(costs):
        few = 1000 * min(costs) > max(costs)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    else:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4))  # in a narrow range the numbers are long
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def far_below(lines: Sequence[Line]) -> set[int]:
    """The numbers of those whose mean dev is below Q1 - 3 (Q3 - Q1), Tukey's "far out" (1977, ch. 2D).

    In one frame with them the others could not be told apart; a frozen encoder is often one.
    """
    scores = {line.number: mean(run.result["dev"] for run in line.runs) for line in lines}
    if len(scores) < 4:
        return set()
    low, _, high = quantiles(scores.values(), n=4, method="inclusive")
    return {number for number, score in scores.items() if score < low - 3 * (high - low)}


def _number(axes, lines: Sequence[Line], points: Sequence[tuple[float, float]]) -> None:
    """Each point's number at the first of its corners that is free of the others, or at the first."""
    places = [tuple(axes.transData.transform(point)) for point in points]  # pixels
    taken = list(places)
    for line, point, place in zip(lines, points, places, strict=True):
        ends = {corner: (place[0] + 1.4 * corner[0], place[1] + 1.4 * corner[1]) for corner in CORNERS}
        free = (corner for corner in CORNERS if min(math.dist(ends[corner], one) for one in taken) > ROOM)
        corner = next(free, CORNERS[0])
        taken.append(ends[corner])
        centred = {"ha": "center", "va": "center", "fontsize": 9}
        axes.annotate(str(line.number), point, corner, textcoords="offset points", **centred)


def best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, score) for which no other costs at most as much and scores higher, by cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def picture(title: str, draw: Callable[[object], None]) -> str:
    """Axes with a title, and what `draw` puts on them, as SVG."""
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=SIZE, layout="constrained")
        axes, text = figure.add_subplot(), io.StringIO()
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        draw(axes)
        figure.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """An SVG file as part of a page: no prologue, no ids that another picture has too."""
    svg = svg[svg.index("<svg") :].strip().replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
