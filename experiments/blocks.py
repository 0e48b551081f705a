"""What a report is made of, each piece as HTML and as Markdown; text is escaped here and nowhere else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the number it is sorted by, and how strongly it is coloured, 0 to 1."""

    text: str
    value: float | None = None
    shade: float | None = None

    def html(self) -> str:
        value = "" if self.value is None else f' data-value="{self.value!r}"'
        shade = "" if self.shade is None else f' style="--shade:{self.shade:.3f}"'
        return f"<td{value}{shade}>{escape(self.text)}</td>"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2

    def html(self) -> str:
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"

    def markdown(self) -> str:
        return f"{'#' * self.level} {plain(self.text)}"


@dataclass(frozen=True)
class Paragraph:
    text: str

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"

    def markdown(self) -> str:
        return plain(self.text)


@dataclass(frozen=True)
class Table:
    """Rows under a header, sorted by a click on it; a `matrix` has a heading to each row too, and stays."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    matrix: bool = False

    def html(self) -> str:
        head = "".join(map(self._head_html, range(len(self.columns))))
        body = "".join(f"<tr>{self._row_html(row)}</tr>" for row in self.rows)
        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        kind = "matrix" if self.matrix else "sortable"
        table = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        return f'<div class="scroll" tabindex="0"><table class="{kind}">{table}</table></div>'

    def _head_html(self, i: int) -> str:
        name = escape(self.columns[i])
        look = ' class="number"' if any(row[i].value is not None for row in self.rows) else ""
        inner = name if self.matrix else f'<button type="button">{name}</button>'
        return f'<th scope="col"{look}>{inner}</th>'

    def _row_html(self, row: Sequence[Cell]) -> str:
        if not self.matrix:
            return "".join(cell.html() for cell in row)
        return f'<th scope="row">{escape(row[0].text)}</th>' + "".join(cell.html() for cell in row[1:])

    def markdown(self) -> str:
        texts = [self.columns, *([cell.text for cell in row] for row in self.rows)]
        lines = ["| " + " | ".join(plain(text) for text in line) + " |" for line in texts]
        lines.insert(1, "|" + "---|" * len(self.columns))
        return (f"{plain(self.title)}\n\n" if self.title else "") + "\n".join(lines)


@dataclass(frozen=True)
class Commands:
    """Lines for a shell, folded away until asked for."""

    title: str
    lines: Sequence[str]

    def html(self) -> str:
        lines = escape("\n".join(self.lines))
        return f"<details><summary>{escape(self.title)}</summary><pre>{lines}</pre></details>"

    def markdown(self) -> str:
        # Indented, not fenced: whatever a line contains, it cannot end the block.
        return f"{plain(self.title)}:\n\n" + "\n".join(
            f"    {line}" for text in self.lines for line in text.splitlines()
        )


@dataclass(frozen=True)
class Figures:
    """Pictures side by side where there is room: SVG as `experiments.plots` makes it, under one legend."""

    svgs: Sequence[str]
    legend: Sequence[tuple[str, str]]  # (SVG of the line, text)

    def html(self) -> str:
        pictures = "".join(f"<figure>{svg}</figure>" for svg in self.svgs)
        entries = "".join(f"<li>{sample}{escape(text)}</li>" for sample, text in self.legend)
        return f'<div class="figures">{pictures}</div><ul class="legend">{entries}</ul>'

    def markdown(self) -> str:
        return "(The plots are in the page beside this file.)"


@dataclass(frozen=True)
class Row:
    """Small tables side by side where there is room."""

    tables: Sequence[Table]

    def html(self) -> str:
        return '<div class="row">' + "".join(table.html() for table in self.tables) + "</div>"

    def markdown(self) -> str:
        return "\n\n".join(table.markdown() for table in self.tables)


Block = Heading | Paragraph | Table | Commands | Figures | Row


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", escape(" ".join(text.split()), quote=False))


def page(title: str, blocks: Sequence[Block], parts: Sequence[str] = ()) -> str:
    """One HTML file that needs no other, and may fetch none: its own policy forbids it.

    `parts` names the .css and .js beside page's that the blocks need.
    """
    folder, names = files("experiments"), ("page", *parts)
    style, script = (
        "".join(folder.joinpath(f"{name}.{kind}").read_text(encoding="utf-8") for name in names)
        for kind in ("css", "js")
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{chr(10).join(block.html() for block in blocks)}
<script>
{script}</script>
</body>
</html>
"""


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"
