"""Runs seen closely, as pictures: all of them on one axis each, in the colours of their numbers."""

import importlib
from collections.abc import Callable, Collection, Sequence

import numpy as np

from experiments.microscopy import Group, Magnified
from experiments.plots import INK, LINES, MARKERS, Line, picture
from lora.placement import TARGETS

WIDE = 20  # a logarithmic axis from this ratio on
DEEP = 1e-5  # of the largest singular value: what is below is out of the frame
NEAR = 1e-7  # from 1, where a cosine is as good as it


def lines_of(runs: Sequence[Magnified]) -> list[tuple[Line, Magnified]]:
    """Those that changed anything, under their numbers in the table."""
    return [(Line(number, ()), run) for number, run in enumerate(runs, 1) if run.modules]


def look_of(line: Line, lines: Collection[Line]) -> dict[str, object]:
    """The first is the widest, so that what lies on it leaves some of it to be seen."""
    width = 1.3 + 1.7 * (1 - list(lines).index(line) / len(lines))
    return {"color": line.colour, "linestyle": LINES[line.style], "linewidth": width}


def spectrum(runs: Sequence[Magnified], part: str) -> str | None:
    """σ_i of ΔW by i, both logarithmic, the mean over the layers that have the part; None if none has it."""
    means = {}
    for line, run in lines_of(runs):
        values = [one.values for one in run.modules if one.part == part]
        if values:
            mean = np.mean(values, axis=0)  # [p]
            means[line] = mean[mean > 0]
    if not any(map(len, means.values())):
        return None

    def draw(axes) -> None:
        for line, mean in means.items():
            marker = {"marker": "."} if len(mean) <= 32 else {}
            axes.plot(range(1, len(mean) + 1), mean, **look_of(line, means), **marker)
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, high * DEEP), high)
        axes.set_xlabel("i")
        _plain(axes.xaxis)
        _plain(axes.yaxis)

    return picture(f"singular values of ΔW, {short(part)}", draw)


def short(part: str) -> str:
    """As targets are called: attention.self.query -> query"""
    return next((name for name, path in TARGETS.items() if path == part), part)


def by_layer(runs: Sequence[Magnified], title: str, value: Callable[[Group], float | None]) -> str:
    """A number of each layer, counted from 0, that has one; the pooler, which is none, is left out."""
    told = {}
    for line, run in lines_of(runs):
        numbers = {at: value(group) for at, group in run.layers.items() if at is not None}
        told[line] = {at: number for at, number in numbers.items() if number is not None}
    numbers = [number for one in told.values() for number in one.values()]

    def draw(axes) -> None:
        for line, one in told.items():
            axes.plot(one.keys(), one.values(), **look_of(line, told), marker=".")
        if numbers and min(numbers) > 0 and max(numbers) > WIDE * min(numbers):
            axes.set_yscale("log")
            _plain(axes.yaxis)
        else:
            axes.set_ylim(0, None if any(numbers) else 1)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return picture(title, draw)


def turned(runs: Sequence[Magnified]) -> str:
    """ΔM against ΔD of every module, both logarithmic; what is 0 has no place there."""

    def draw(axes) -> None:
        for line, run in lines_of(runs):
            points = np.array([(one.direction, one.magnitude) for one in run.modules])
            points = points[(points > 0).all(axis=1)]
            marker = MARKERS[line.style]
            axes.plot(*points.T, marker, color=line.colour, markersize=4, alpha=0.7, markeredgewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("ΔD, direction")
        axes.set_ylabel("ΔM, magnitude")
        _plain(axes.xaxis)
        _plain(axes.yaxis)

    return picture("ΔM by ΔD, a point a module", draw)


def intruding(runs: Sequence[Magnified], threshold: float) -> str:
    """Of the examined singular vectors the share that is at least so far from all of W's.

    By 1 - |cosine|, logarithmic, for most are very near to one; right of the dashed line they intrude.
    """
    told = {
        line: np.sort([max(1 - cosine, NEAR) for one in run.modules for cosine in one.closest])
        for line, run in lines_of(runs)
    }

    def draw(axes) -> None:
        for line, far in told.items():
            share = 1 - np.arange(len(far)) / len(far)
            axes.step([NEAR, *far, 1.0], [1.0, *share, 0.0], where="pre", **look_of(line, told))
        axes.axvline(1 - threshold, color=INK, linestyle="--", linewidth=0.8, alpha=0.5)
        axes.set_xscale("log")
        axes.set_xlim(NEAR, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("1 - greatest |cosine| with one of W's")
        axes.yaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").PercentFormatter(1.0))
        _plain(axes.xaxis)

    return picture("share of singular vectors as far off", draw)


def _plain(axis) -> None:
    """0.01, 1, 100 on a logarithmic axis, at powers of ten, or between them where they are few."""
    ticker = importlib.import_module("matplotlib.ticker")
    low, high = sorted(axis.get_view_interval())
    few = high < 100 * low
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
