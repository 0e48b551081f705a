"""Run the blocks of Python of a page of the guided reading: `python -i docs/run.py lora`.

With -i Python stays, and has all of the page's variables. A block of text that follows a block of Python is
what it prints; tests/test_docs.py holds every page to that.
"""

import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

READING = Path(__file__).parent / "reading"
BLOCK = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


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


def program(page: str, heading: str) -> str:
    """All blocks as one file, each on the lines that it has in the page, so that an error names them.

    Before each block `heading` is printed, with the block's line in the place of LINE.
    """
    lines = [""] * (page.count("\n") + 1)
    for block in blocks(page):
        said = heading.replace("LINE", str(block.line))
        lines[block.line - 2] = f"print({said!r}, end='')"  # on the line of ```python
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines)


def run(page: Path, heading: str) -> dict[str, object]:
    """The variables that a page's blocks leave behind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / page.with_suffix(".py").name
        file.write_text(program(page.read_text(encoding="utf-8"), heading), encoding="utf-8")
        return runpy.run_path(str(file))


if __name__ == "__main__":
    pages = {page.stem: page for page in sorted(READING.glob("*.md"))}
    if len(sys.argv) != 2 or sys.argv[1] not in pages:
        sys.exit(f"usage: python -i docs/run.py PAGE, with PAGE one of {' '.join(pages)}")
    globals().update(run(pages[sys.argv[1]], f"{sys.argv[1]}.md:LINE\n"))
