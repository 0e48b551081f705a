"""The docs: every block of Python on a page runs and says what the page says; the site builds, and needs no network."""

import ast
import contextlib
import io
import re
import runpy
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*(DOCS / "reading").glob("*.md"), DOCS / "index.md"])
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BEGINS = "\x1e"  # printed before each block; no page prints it


class Block(NamedTuple):
    line: int  # of its first line of code in the page
    code: str
    shown: str | None  # what the page says it prints


def blocks(page: str) -> list[Block]:
    """A page's blocks of Python. A block of text right after one is what it prints."""
    found = list(BLOCK.finditer(page))
    after = {one.start(): one for one in found}
    told = []
    for one in found:
        if one[1] == "python":
            rest = page[one.end() :]
            next_one = after.get(one.end() + len(rest) - len(rest.lstrip()))
            shown = next_one[2] if next_one and next_one[1] == "text" else None
            told.append(Block(page[: one.start(2)].count("\n") + 1, one[2], shown))
    return told


def program(page: str) -> str:
    """All blocks as one file, each on the lines that it has in the page, so that an error names them."""
    lines = [""] * (page.count("\n") + 1)
    for block in blocks(page):
        lines[block.line - 2] = f"print({BEGINS!r}, end='')"  # on the line of ```python
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_runs_does_what_the_page_says(path: Path, request, tmp_path: Path):
    page = path.read_text(encoding="utf-8")
    if "all-MiniLM-L6-v2" in "".join(block.code for block in blocks(page)):
        request.getfixturevalue("minilm")
    file = tmp_path / f"{path.stem}.py"
    file.write_text(program(page), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(file))
    printed = out.getvalue().split(BEGINS)[1:]
    assert len(printed) == len(blocks(page))
    for block, got in zip(blocks(page), printed, strict=True):
        assert got == (block.shown or ""), f"{path.name}:{block.line}"


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda path: path.stem)
def test_a_page_of_the_reading_can_be_run_and_each_of_its_blocks_is_checked(path: Path):
    found = blocks(path.read_text(encoding="utf-8"))
    assert found
    for block in found:
        last = ast.parse(block.code).body[-1]
        assert block.shown is not None or isinstance(last, ast.Assert), f"{path.name}:{block.line}"
