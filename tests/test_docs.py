"""The docs: what a page runs does what the page says; the site builds strictly, and needs no network."""

import ast
import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pages import Opened, Seen

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
READING = sorted((DOCS / "reading").glob("*.md"))
sys.path += [str(DOCS), str(DOCS / "hooks")]

from run import blocks, run  # noqa: E402
from source import passage  # noqa: E402

BEGINS = "\x1e"  # printed before each block; no page prints it
WIDE, PHONE = 1280, 390


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", READING, ids=by_name)
def test_what_a_page_runs_does_what_the_page_says(path: Path, request):
    found = blocks(path.read_text(encoding="utf-8"))
    if "all-MiniLM-L6-v2" in "".join(block.code for block in found):
        request.getfixturevalue("minilm")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(path, BEGINS)
    printed = out.getvalue().split(BEGINS)[1:]
    for block, got in zip(found, printed, strict=True):
        assert got == (block.shown or ""), f"{path.name}:{block.line}"


@pytest.mark.parametrize("path", READING, ids=by_name)
def test_a_page_of_the_reading_has_its_four_parts_and_every_block_is_checked(path: Path):
    page = path.read_text(encoding="utf-8")
    assert "\n```source\n" in page
    assert page.count("\n```figure\n") == 1
    assert "\n$$\n" in page
    found = blocks(page)
    assert found
    for block in found:
        last = ast.parse(block.code).body[-1]
        assert block.shown is not None or isinstance(last, ast.Assert), f"{path.name}:{block.line}"


def test_a_passage_is_the_source_as_it_stands():
    whole = (ROOT / "lora" / "layers.py").read_text(encoding="utf-8").splitlines()
    for name, first in (
        ("lora.layers", '"""Linear layers'),
        ("lora.layers.LoRALinear.forward", "    def forward(self, x: Tensor)"),
        ("lora.layers.LoRALinear.together", "    @staticmethod"),
        ("lora.layers.DoRALinear.__doc__", "class DoRALinear(LoRALinear):"),
    ):
        found = passage(name)
        assert found.file == "lora/layers.py"
        assert whole[found.first - 1].startswith(first)
        lines = found.text.splitlines()
        indent = len(whole[found.first - 1]) - len(whole[found.first - 1].lstrip())
        assert lines == [line[indent:] for line in whole[found.first - 1 : found.first - 1 + len(lines)]]
    assert passage("lora.layers.DoRALinear.__doc__").text.endswith('"""')
    assert passage("lora.methods.METHODS").text.startswith("METHODS = {")
    assert passage("tasks.bootstrap.LEVEL").text == "LEVEL = 0.05"


@pytest.mark.parametrize("name", ["lora.nothing", "lora.layers.LoRALinear.nothing", "nothing.at.all"])
def test_a_name_that_is_not_there_is_an_error(name: str):
    with pytest.raises(LookupError, match="nothing"):
        passage(name)


@pytest.mark.parametrize("block", ["source\nlora.nothing", "figure\nnothing: A caption."])
def test_a_page_that_asks_for_what_is_not_there_stops_the_build(block: str):
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    exceptions = pytest.importorskip("mkdocs.exceptions", reason="the docs extra is not installed")
    from reading import on_page_markdown

    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with pytest.raises(exceptions.PluginError, match=r"^index\.md: .*nothing"):
        on_page_markdown(f"Before.\n\n```{block}\n```\n", page=page)


def test_a_page_can_be_run_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "docs/run.py", "rslora"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("s = 5.66 against 2.00\n")
    wrong = subprocess.run(
        [sys.executable, "docs/run.py", "../tables"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("usage: ")
    assert len(wrong.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of the site, built with every warning an error."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml", "matplotlib"):
        pytest.importorskip(package, reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site_and_no_program_of_the_docs(site: Path):
    made = {file.relative_to(site).with_suffix(".md") for file in site.rglob("*.html")}
    assert {page.relative_to(DOCS) for page in DOCS.rglob("*.md")} <= made
    assert list(site.rglob("*.py")) == []


def test_no_page_fetches_anything_from_elsewhere(site: Path):
    for file in sorted(site.rglob("*.html")):
        for tag, attributes in Seen(file.read_text(encoding="utf-8")).tags:
            loads = attributes.get("src") or (attributes.get("href") if tag == "link" else None) or ""
            assert not re.match(r"(https?:)?//", loads), f"{file.name}: {loads}"
    for file in sorted(site.rglob("*.css")):
        assert not re.search(r"url\([\"']?(https?:)?//", file.read_text(encoding="utf-8")), file.name


def test_equations_code_and_figures_have_become_what_a_browser_draws(site: Path):
    for path in READING:
        html = (site / "reading" / f"{path.stem}.html").read_text(encoding="utf-8")
        seen = Seen(html)
        tags = [tag for tag, _ in seen.tags]
        assert tags.count("math") >= 1
        assert "arithmatex" not in html
        assert "$" not in re.sub(r"<(pre|code|script)\b.*?</\1>", "", html, flags=re.DOTALL), path.name
        named = [attributes.get("aria-label") for tag, attributes in seen.tags if tag == "svg"]
        assert sum(name is not None and len(name) > 20 for name in named) == 1, path.name
    assert "class LoRALinear(nn.Linear):" in Seen((site / "reading/lora.html").read_text("utf-8")).text
    assert "lora.functions.Merged" in (site / "api/lora.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, WIDE])
@pytest.mark.parametrize("page", ["index", "reading/gradients", "reading/heads", "api/lora"])
def test_a_page_opens_from_its_folder_and_fits_the_screen(browser, site: Path, page: str, width: int, scheme):
    opened = Opened(browser, site / f"{page}.html", width, scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    for picture in opened.page.locator("figure.drawn svg").all():
        box = picture.bounding_box()
        assert box["height"] > 100
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    for equation in opened.page.locator("div.equation math").all():
        assert equation.bounding_box()["height"] > 10
    assert opened.said == []
    assert all(url.startswith(site.as_uri()) for url in opened.asked), opened.asked
    opened.page.close()


def test_the_search_works_in_a_page_opened_from_its_folder(browser, site: Path):
    opened = Opened(browser, site / "index.html", WIDE, "light")
    opened.page.locator(".md-search__input").click()
    opened.page.locator(".md-search__input").press_sequentially("magnitude")
    found = opened.page.locator(".md-search-result__link")
    found.first.wait_for(timeout=20_000)
    assert any("reading/dora.html" in one.get_attribute("href") for one in found.all())
    assert opened.said == []
    assert all(url.startswith((site.as_uri(), "about:", "blob:")) for url in opened.asked), opened.asked
    opened.page.close()
