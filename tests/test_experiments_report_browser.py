"""The report in a real browser: nothing fetched, no error, no sideways scrolling, tables sorted."""

from pathlib import Path

import pytest
from pages import Opened
from small_runs import call
from written_runs import write_run

from experiments.report import main

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
LONG = "a_very_long_name_of_a_run_" * 4


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """A report with all of its parts: a grid, confusions, two tasks, an unfinished run with a long name."""
    folder = tmp_path_factory.mktemp("report")
    told, folders = [(f"dev{i}", i % 5) for i in range(10)], []
    for i, dev in enumerate([0.9, 0.095, 0.5, 0.61]):
        settings = {"rank": 4 * (1 + i // 2), "lr": (1e-4, 1e-3)[i % 2], "data": str(small_data)}
        result = {"dev": dev, "train_seconds": 9.0 + i}
        folders.append(write_run(folder / f"<i>{LONG}{i}", told, result=result, **settings))
    folders += [write_run(folder / f"sts{seed}", task="sts", seed=seed) for seed in range(3)]
    folders.append(write_run(folder / f"{LONG}-begun", finished=False))
    assert call(main, *folders, "--out", folder / "report.html").code == 0
    return folder / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_alone_without_errors_and_fits_the_screen(browser, page_file, width, scheme, tmp_path):
    opened = Opened(browser, page_file, width, scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    for picture in opened.page.locator("figure svg").all():
        box = picture.bounding_box()
        assert box["height"] > 100
        assert box["x"] + box["width"] <= width
    opened.page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert opened.asked == [page_file.as_uri()]
    assert opened.said == []
    opened.page.close()


def test_the_text_can_be_read_on_either_background(browser, page_file):
    light, dark = (Opened(browser, page_file, 390, scheme).page for scheme in ("light", "dark"))
    colours = "e => [getComputedStyle(e).fill, getComputedStyle(document.body).backgroundColor]"
    for page, dark_on_light in ((light, True), (dark, False)):
        ink, paper = page.locator("figure svg text").first.evaluate(colours)
        brightness = [sum(map(int, colour[4:-1].split(","))) for colour in (ink, paper)]
        assert (brightness[0] < brightness[1]) is dark_on_light
        assert abs(brightness[0] - brightness[1]) > 400


def test_a_click_on_a_column_sorts_its_table_as_numbers_and_a_second_turns_it(browser, page_file):
    page = Opened(browser, page_file, 1280, "light").page
    table = page.locator("table.sortable").first
    place = table.locator("th").all_inner_texts().index("dev")

    def column() -> list[str]:
        return [row.locator("td").nth(place).inner_text() for row in table.locator("tbody tr").all()]

    assert column() == ["0.9000", "0.0950", "0.5000", "0.6100"]
    button = table.get_by_role("button", name="dev", exact=True)
    button.click()
    assert column() == ["0.0950", "0.5000", "0.6100", "0.9000"]
    assert table.locator("th").nth(place).get_attribute("aria-sort") == "ascending"
    button.press("Enter")  # by the keyboard too
    assert column() == ["0.9000", "0.6100", "0.5000", "0.0950"]


def test_names_are_shown_as_text(browser, page_file):
    page = Opened(browser, page_file, 390, "light").page
    assert page.locator("i").count() == 0
    assert page.get_by_text(f"<i>{LONG}0", exact=True).count() == 1
