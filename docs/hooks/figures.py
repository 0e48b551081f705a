"""The figures of the guided reading: drawn anew with every build, by the project's own code where it has any.

A figure is a function of a matplotlib Figure in `figures_model` or `figures_tuning`, called after its name.
"""

import io
import re
from html import escape

import figures_model
import figures_tuning
import matplotlib
from matplotlib.figure import Figure

from experiments.plots import INK, STYLE

MODULES = (figures_model, figures_tuning)


def draw(name: str, title: str) -> str:
    """The figure of that name as a piece of a page, in the page's own colour of text.

    Raises LookupError if there is none.
    """
    function = next((getattr(one, name) for one in MODULES if name in one.FIGURES), None)
    if function is None:
        raise LookupError(f"there is no figure {name}")
    with matplotlib.rc_context(STYLE):
        figure, text = Figure(figsize=function.size, layout="constrained"), io.StringIO()
        function(figure)
        figure.savefig(text, format="svg", transparent=True)
    return inline(text.getvalue(), title)


def inline(svg: str, title: str) -> str:
    """An SVG file as a part of a page: no prologue, no metadata, with a name for who cannot see it."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
