"""The project's own code by its dotted name, read from its files: a page shows what runs, no copy.

A name is a module's, and after it those of a class, function or assignment in it. `.__doc__` at its end is
the docstring alone, with the line that it stands under: `lora.functions.Merged.__doc__`.
"""

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Passage(NamedTuple):
    file: str  # beside mkdocs.yml
    first: int  # its line there
    text: str


def passage(name: str) -> Passage:
    """Raises LookupError if there is nothing of that name."""
    parts = name.split(".")
    of_docstring = parts[-1] == "__doc__"
    parts = parts[:-1] if of_docstring else parts
    path, rest = _file(parts, name)
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in rest:
        node = _inside(node, part, name)
    first = min([getattr(node, "lineno", 1), *(one.lineno for one in getattr(node, "decorator_list", ()))])
    last = _end_of_docstring(node, name) if of_docstring else getattr(node, "end_lineno", None)
    lines = text.splitlines()[first - 1 : last]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return Passage(str(path.relative_to(ROOT)), first, "\n".join(line[indent:] for line in lines))


def _file(parts: list[str], name: str) -> tuple[Path, list[str]]:
    """The file of the longest beginning that is a module, and what is left of the name."""
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path, parts[count:]
    raise LookupError(f"{name}: no file of the project has it")


def _inside(node: ast.AST, part: str, name: str) -> ast.AST:
    for one in getattr(node, "body", ()):
        if getattr(one, "name", None) == part:
            return one
        targets = getattr(one, "targets", [getattr(one, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == part for target in targets):
            return one
    raise LookupError(f"{name}: nothing is called {part} there")


def _end_of_docstring(node: ast.AST, name: str) -> int:
    if ast.get_docstring(node) is None:
        raise LookupError(f"{name}: there is no docstring")
    return node.body[0].end_lineno
