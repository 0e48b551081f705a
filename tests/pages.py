"""Pages as a browser would see them: parsed, or opened in one."""

from html.parser import HTMLParser
from pathlib import Path


class Seen(HTMLParser):
    """Every tag with its attributes, and every text, as a browser would see them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


class Opened:
    """A page, with what it said and asked for."""

    def __init__(self, browser, file: Path, width: int, scheme: str):
        self.page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
