"""What all figures share: colours, sizes, boxes and arrows."""

import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.plots import COLOURS, INK

BLUE, ORANGE, GREEN, RED = COLOURS[:4]
GREY = "#8888884d"


def sized(width: float, height: float) -> Callable:
    """A figure's size in inches; 4.6 are the width of a phone, so that a point is a pixel there."""

    def put(function: Callable) -> Callable:
        function.size = (width, height)
        return function

    return put


def bare(axes: Axes, width: float, height: float) -> Axes:
    """Without ticks or spines, from (0, 0) to (width, height), upside up."""
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str = GREY) -> None:
    """Round corners, its text in the middle; (x, y) is the lower left corner."""
    shape = {"boxstyle": "round,pad=0,rounding_size=0.12", "facecolor": colour, "edgecolor": INK}
    axes.add_patch(FancyBboxPatch((x, y), width, height, linewidth=0.8, **shape))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: str = "arc3") -> None:
    look = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.9, "connectionstyle": bend}
    axes.annotate("", end, start, arrowprops=look)


def cells(axes: Axes, x: float, y: float, colours: list[str], size: float = 1.0) -> None:
    """A row of squares, beginning at the lower left corner (x, y)."""
    for i, colour in enumerate(colours):
        square = Rectangle((x + i * size, y), size, size, facecolor=colour, edgecolor=INK, linewidth=0.5)
        axes.add_patch(square)


def powers(*all_axes: Axis) -> None:
    """Logarithmic axes labelled 10⁻³, 10⁻²: matplotlib's own labels are TeX, which an SVG's text is not."""
    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    for one in all_axes:
        one.set_major_locator(LogLocator(numticks=6))
        one.set_major_formatter(lambda x, _: "10" + str(round(math.log10(x))).translate(digits))
        one.set_minor_formatter(NullFormatter())
