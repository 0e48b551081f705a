"""What MkDocs calls while it builds the site: the project's code, figures and equations put into the pages.

In a page's Markdown

    ```source                       ```figure
    lora.layers.LoRALinear          lora: What the figure shows.
    ```                             ```

become the code of that name with its file and lines, and the figure of that name with its caption.
"""

import re
from html import escape

from equations import to_mathml
from figures import draw
from mkdocs.exceptions import PluginError
from source import passage

FENCED = re.compile(r"^```(source|figure)\n(.+?)\n```$", re.MULTILINE)


def on_page_markdown(markdown: str, page, **_) -> str:
    if page.file.src_uri.startswith("reading/"):
        page.meta["hide"] = ["toc"]  # its place is given to the code, whose lines are long

    def put(found: re.Match) -> str:
        kind, inside = found.groups()
        try:
            return code(inside) if kind == "source" else figure(inside)
        except LookupError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from None

    return FENCED.sub(put, markdown)


def on_page_content(html: str, **_) -> str:
    return to_mathml(html)


def code(name: str) -> str:
    file, first, text = passage(name)
    return f'```python title="{file}" linenums="{first}"\n{text}\n```'


def figure(line: str) -> str:
    name, caption = line.split(": ", 1)
    # On one line, as Markdown ends a block of HTML at an empty one.
    svg = draw(name, caption).replace("\n", " ")
    return f'<figure class="drawn" markdown="0">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
