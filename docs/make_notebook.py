"""notebook.py -> notebook.ipynb: `python docs/make_notebook.py`. The same source gives the same bytes.

A cell begins at a line `# %%`, of code, or `# %% [markdown]`, of text that stands in comments; code may carry
`tags=[...]`. The notebook has neither outputs nor execution counts.
"""

import json
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("notebook.py")
MARK = re.compile(r"^# %%(?P<text> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?\n", re.MULTILINE)
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(source: str) -> list[dict]:
    """The cells of a source, as nbformat 4.5 has them."""
    marks = list(MARK.finditer(source))
    ends = [mark.start() for mark in marks[1:]] + [len(source)]
    found = []
    for i, (mark, end) in enumerate(zip(marks, ends, strict=True)):
        body = source[mark.end() : end].strip("\n")
        cell = {"cell_type": "markdown", "id": f"cell-{i:02}", "metadata": {}}
        if mark["text"]:
            body = "\n".join(re.sub("^# ?", "", line) for line in body.splitlines())
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        if mark["tags"]:
            cell["metadata"] = {"tags": json.loads(mark["tags"])}
        found.append(cell | {"source": body.splitlines(keepends=True)})
    return found


def notebook(source: str) -> str:
    """The file's text: sorted keys and an indent of one, as Jupyter saves them."""
    content = {"cells": cells(source), "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> int:
    target = SOURCE.with_suffix(".ipynb")
    temporary = target.with_name(f".{target.name}.new")
    temporary.write_text(notebook(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    temporary.replace(target)
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
