r"""Equations in TeX -> MathML, which browsers draw themselves: no script, no fonts, no network.

They come from pymdownx.arithmatex as `\(...\)` in a span and `\[...\]` in a div.
"""

import html
import re

from latex2mathml.converter import convert

MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def to_mathml(page: str) -> str:
    """The page's HTML with each equation in MathML; a long one scrolls within its own box."""
    return MARKED.sub(_convert, page)


def _convert(found: re.Match) -> str:
    tag, opening, tex = found.groups()
    display = "block" if opening == "[" else "inline"
    tex = html.unescape(tex).strip()
    # Without a font for mathematics a browser has no brackets as high as a matrix: site.css draws them.
    tex = tex.replace("{pmatrix}", "{matrix}")
    return f'<{tag} class="equation" title="{html.escape(tex)}">{convert(tex, display=display)}</{tag}>'
