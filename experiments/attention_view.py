"""The parts of a page that show tokens: words coloured by their attributions, and attention to be explored.

Text is escaped here, as in blocks.py. attention.css and attention.js are theirs.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from experiments.blocks import Table


@dataclass(frozen=True)
class Words:
    """A sentence whose words are coloured by what they add or take away, at most `largest`."""

    words: Sequence[tuple[str, float]]
    largest: float

    def html(self) -> str:
        return f'<p class="words">{" ".join(map(self._word_html, self.words))}</p>'

    def _word_html(self, one: tuple[str, float]) -> str:
        word, value = one
        look = "adds" if value > 0 else "takes"
        shade = abs(value) / (self.largest or 1)
        return f'<span class="{look}" style="--shade:{shade:.3f}" title="{value:+.4f}">{escape(word)}</span>'


@dataclass(frozen=True)
class Folded:
    """A table folded away until asked for."""

    title: str
    table: Table

    def html(self) -> str:
        return f"<details><summary>{escape(self.title)}</summary>{self.table.html()}</details>"


@dataclass(frozen=True)
class Attention:
    """A sequence whose tokens show what they attend to, in a layer and a head that are chosen; and as maps.

    Attributes:
        sentences: of each token the sentence that it belongs to, 0 or 1.
        frame: which tokens are the [CLS] and [SEP] around the sentences.
        weights: [L, N, T, T]; in the page each is a byte, 255 for 1.
    """

    title: str
    tokens: Sequence[str]
    sentences: Sequence[int]
    frame: Sequence[bool]
    weights: np.ndarray

    def html(self) -> str:
        layers, heads, count, _ = self.weights.shape
        data = base64.b64encode(np.rint(255 * self.weights).astype(np.uint8).tobytes()).decode()
        tokens = "".join(
            f'<button type="button" data-sentence="{sentence}"{" data-frame" if framed else ""}>'
            f"{escape(token)}</button>"
            for token, sentence, framed in zip(self.tokens, self.sentences, self.frame, strict=True)
        )
        chosen = self._select("layer", layers) + self._select("head", heads, "mean")
        chosen += '<label><input type="checkbox" class="bare"> without [CLS] and [SEP]</label>'
        maps = "".join(self._map_html(*one) for one in self._maps(count))
        return (
            f'<section class="attention" aria-label="{escape(self.title)}" data-heads="{heads}"'
            f' data-weights="{data}"><p class="chosen">{chosen}</p><p class="tokens">{tokens}</p>'
            f'<p class="told" aria-live="polite"></p><div class="maps">{maps}</div></section>'
        )

    def _select(self, name: str, count: int, first: str = "") -> str:
        options = f'<option value="-1">{first}</option>' if first else ""
        options += "".join(f'<option value="{i}">{i + 1}</option>' for i in range(count))
        return f'<label>{name} <select class="{name}">{options}</select></label> '

    def _maps(self, count: int) -> list[tuple[str, slice, slice]]:
        """Title, rows and columns: all tokens, and of two sentences those of each on the other."""
        maps = [("every token (row) to every token (column)", slice(0, count), slice(0, count))]
        first = list(self.sentences).count(0)
        if 0 < first < count:
            a, b = slice(0, first), slice(first, count)
            maps += [("from the first sentence to the second", a, b), ("from the second to the first", b, a)]
        return maps

    def _map_html(self, title: str, rows: slice, columns: slice) -> str:
        places = f'data-rows="{rows.start} {rows.stop}" data-columns="{columns.start} {columns.stop}"'
        return (
            f'<figure><figcaption>{title}<br><span class="darkest"></span></figcaption>'
            '<div class="scroll" tabindex="0">'
            f'<canvas role="img" aria-label="{title}" {places}></canvas></div></figure>'
        )
