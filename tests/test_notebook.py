"""The notebook: clean, what its source makes, and run from top to bottom with a tiny model."""

import ast
import base64
import contextlib
import html
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from pages import Opened
from small_runs import call, checkpoints, column, flags, lines_of, strict_json

import predict
from tasks import TASKS

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
ONE, OTHER = "the cat is good", "what a bad dog"


def load_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells() -> list:
    return [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]


def setup_cell() -> str:
    (found,) = [cell.source for cell in code_cells() if "git" in cell.source]
    return found


def run_notebook(folder: Path, last: str = "", **parameters: object) -> "nbformat.NotebookNode":
    """All cells, with other parameters than the notebook's own, and one more cell after the last.

    No network, and none of the user's own settings of IPython.
    """
    notebook = nbformat.read(NOTEBOOK, 4)
    (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    told = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(told))
    notebook.cells.append(nbformat.v4.new_code_cell(last))
    env = os.environ | {"IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1"}
    env.pop("MPLBACKEND", None)  # which would draw nothing into the notebook
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}})
    try:
        client.execute(env=env)
    except nbclient.exceptions.CellExecutionError:
        notebook.failed = True
    return notebook


def text_of(notebook) -> str:
    """All that the cells have printed."""
    streams = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    return "".join(one.text for one in streams if one.output_type == "stream")


def shown(notebook, kind: str) -> list[str]:
    """What the cells have displayed as a MIME type."""
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", [])]
    return [one.data[kind] for one in outputs if one.output_type == "display_data" and kind in one.data]


@pytest.fixture(scope="module")
def ran(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The notebook after a run, the folder it wrote to, and some of the values that it ended with."""
    folder = tmp_path_factory.mktemp("notebook")
    names = ["score", "merged_score", "peft_score", "errors", "precision"]
    values = str(folder / "values")
    last = f"Path({values!r}).write_text(json.dumps({{name: globals()[name] for name in {names}}}))"
    notebook = run_notebook(
        folder, last, MODEL=str(tiny), DATA=str(small_data), COURSE_DATA=str(small_data), EPOCHS=2,
        BATCH_SIZE=8, MAX_LENGTH=32, OUT=str(folder / "out"), ONE=ONE, OTHER=OTHER,
    )  # fmt: skip
    assert "failed" not in notebook, text_of(notebook)
    values = strict_json((folder / "values").read_text())
    return SimpleNamespace(notebook=notebook, out=folder / "out", values=SimpleNamespace(**values))


def test_the_notebook_is_what_its_source_makes() -> None:
    maker = load_maker()
    assert NOTEBOOK.read_text(encoding="utf-8") == maker.notebook(maker.SOURCE.read_text(encoding="utf-8"))


def test_its_json_is_valid_and_holds_no_output() -> None:
    raw = strict_json(NOTEBOOK.read_text(encoding="utf-8"))
    nbformat.validate(raw, relax_add_props=False)
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in raw["cells"]}) == len(raw["cells"])
    for cell in raw["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert set(raw["metadata"]) == {"accelerator", "colab", "kernelspec", "language_info"}


def test_every_cell_is_short_plain_python_with_a_sentence_before_it() -> None:
    cells = nbformat.read(NOTEBOOK, 4).cells
    for before, cell in zip(cells, cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert before.source.rstrip().endswith(".")
            assert len(cell.source.splitlines()) <= 25
            ast.parse(cell.source)  # no magics: what a cell does can be pasted into a script


def test_the_maker_knows_cells_apart() -> None:
    source = '# no cell\n# %% [markdown]\n# One.\n#\n# Two.\n\n# %% tags=["parameters"]\nx = 1\n\n\n'
    source += "# %%\ny = 2  # %% no\n"
    text, tagged, plain = load_maker().cells(source)
    assert (text["cell_type"], "".join(text["source"])) == ("markdown", "One.\n\nTwo.")
    assert ("".join(tagged["source"]), tagged["metadata"]) == ("x = 1", {"tags": ["parameters"]})
    assert ("".join(plain["source"]), plain["metadata"]) == ("y = 2  # %% no", {})


def test_both_runs_are_finished_at_the_size_that_was_asked_for(ran) -> None:
    for method, kept in (("lora", "adapter/adapter_model.safetensors"), ("full", "model/model.safetensors")):
        result = strict_json((ran.out / method / "result.json").read_text())
        assert (result["method"], result["epochs"], result["steps"]) == (method, 2, 6)
        assert -1 <= result["dev"] <= 1
        assert result["precision"] == ran.values.precision
        assert (ran.out / method / kept).is_file()
        assert len(column(ran.out / method / "predictions-dev.csv", "prediction")) == 10
        assert f"$ python train.py --method {method} " in text_of(ran.notebook)


def test_the_table_has_a_row_for_each_run_with_its_score(ran) -> None:
    (table,) = shown(ran.notebook, "text/markdown")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert len(rows) == 4
    for row, method in zip(rows[2:], ("lora", "full"), strict=True):
        told = dict(zip(rows[0], row, strict=True))
        dev = strict_json((ran.out / method / "result.json").read_text())["dev"]
        assert (told["method"], told["dev"]) == (method, f"{dev:.4f}")


def test_the_plot_is_a_picture_of_both(ran) -> None:
    (picture,) = shown(ran.notebook, "image/png")
    content = base64.b64decode(picture)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5_000
    for method in ("lora", "full"):  # what it is drawn from
        assert [line["epoch"] for line in lines_of(ran.out / method / "metrics.jsonl")] == [1, 2]


def test_by_hand_merged_and_in_peft_the_numbers_are_those_of_predict(ran) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    told = call(predict.main, ran.out / "lora", "--text", ONE, OTHER).out.strip()
    assert f"\n{told}\n" in text_of(ran.notebook)
    assert ran.values.score == pytest.approx(float(told), abs=1e-4)
    assert ran.values.merged_score == pytest.approx(ran.values.score, abs=1e-5)
    assert ran.values.peft_score == pytest.approx(ran.values.score, abs=1e-5)


def test_lora_is_the_dense_layer_to_the_last_digits(ran) -> None:
    assert list(ran.values.errors) == ["y", "dA = s Bᵀ dW", "dB = s dW Aᵀ"]
    assert all(0 <= error < 1e-10 for error in ran.values.errors.values())


def test_the_page_of_an_example_stands_in_a_frame_as_it_was_written(ran) -> None:
    (frame,) = shown(ran.notebook, "text/html")
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])
    assert page == (ran.out / "explanation.html").read_text(encoding="utf-8")
    assert f"“{ONE}”" in page


def test_the_frame_is_a_page_in_a_browser(ran, browser, tmp_path: Path) -> None:
    (frame,) = shown(ran.notebook, "text/html")
    (tmp_path / "cell.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}", encoding="utf-8")
    opened = Opened(browser, tmp_path / "cell.html", 1000, "light")
    inside = opened.page.frame_locator("iframe")
    assert inside.locator("h1").first.is_visible()
    assert inside.get_by_text("Nearest training examples").first.inner_text()
    assert opened.said == []
    opened.page.close()


def test_the_course_s_files_are_trained_on_by_their_folder(ran, small_data: Path) -> None:
    result = strict_json((ran.out / "course" / "result.json").read_text())
    assert (result["data"], result["rows"]["sts"]["train"]) == (str(small_data), 24)


def test_without_own_files_the_names_that_they_need_are_said() -> None:
    source = code_cells()[-1].source
    assert source.startswith("if COURSE_DATA:")
    command = f"from tasks import TASKS\nCOURSE_DATA = ''\n{source}"
    told = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for task in TASKS.values():
        assert all(name in told.stdout for name in task.files.values())


def test_a_command_that_fails_stops_the_notebook_and_its_line_is_seen(tiny: Path, tmp_path: Path) -> None:
    notebook = run_notebook(tmp_path, MODEL=str(tiny), DATA=f"{tmp_path}/none", OUT=f"{tmp_path}/out")
    assert notebook.failed
    assert "error: --data: " in text_of(notebook)
    last = [cell for cell in notebook.cells if cell.get("outputs")][-1]
    (error,) = [one for one in last.outputs if one.output_type == "error"]
    assert (error.ename, error.evalue) == (
        "RuntimeError", "train.py ended with exit code 2; the line above says why."
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_cell_that_is_stopped_leaves_a_run_that_goes_on(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    """Jupyter's stop button is SIGINT to the kernel and all that it has started."""
    (cell,) = [cell.source for cell in code_cells() if "def run(" in cell.source]
    arguments = ["train.py", *flags(tiny, small_data, out=tmp_path / "run", epochs=10**6)]
    script = f"""
import contextlib, os, shlex, subprocess, sys
{cell}
try:
    run(*{arguments!r})
except KeyboardInterrupt:
    with contextlib.suppress(ChildProcessError):  # if it has been waited for
        os.waitpid(-1, 0)
    sys.exit(7)
"""
    group = {"start_new_session": True, "stdout": subprocess.DEVNULL, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", script], **group) as kernel:
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / "run" / "steps.jsonl").exists():
                assert kernel.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.killpg(kernel.pid, signal.SIGINT)
            assert kernel.wait(timeout=120) == 7
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(kernel.pid, signal.SIGKILL)
    assert checkpoints(tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


class TestSetUp:
    """The cell that finds the project, or fetches it."""

    @staticmethod
    def run(
        folder: Path, repository: str, tmp_path: Path
    ) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        """The cell as a script in a folder; and what pip, which is not the real one, was called with."""
        fake, asked = tmp_path / "fake", tmp_path / "asked"
        fake.mkdir()
        (fake / "pip.py").write_text(f"import sys\nprint(sys.argv[1:], file=open({str(asked)!r}, 'a'))\n")
        script = f"REPOSITORY = {repository!r}\n{setup_cell()}\nprint(os.getcwd(), sys.path[0], sep='\\n')\n"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, env=os.environ | {"PYTHONPATH": str(fake)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        lines = asked.read_text().splitlines() if asked.exists() else []
        return done, [ast.literal_eval(line) for line in lines]

    def test_inside_the_project_nothing_is_fetched(self, tmp_path: Path) -> None:
        done, asked = self.run(ROOT / "docs", "", tmp_path)
        assert done.stdout.split() == [str(ROOT)] * 3
        assert asked == []

    def test_elsewhere_it_is_cloned_and_installed_once(self, tmp_path: Path) -> None:
        origin, place = tmp_path / "origin", tmp_path / "place"
        (origin / "minibert").mkdir(parents=True)
        place.mkdir()
        for file in ("train.py", "minibert/__init__.py"):
            (origin / file).write_text("")
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a"]):
            subprocess.run([*git, *command], check=True)
        done, asked = self.run(place, origin.as_uri(), tmp_path)
        root = place / "minibert-project"
        assert done.stdout.split() == [str(root)] * 3, done.stderr
        assert asked == [["install", "-q", "-e", f"{root}[notebook]"]]
        assert (root / "train.py").is_file()

    def test_without_an_address_it_says_what_is_missing(self, tmp_path: Path) -> None:
        done, asked = self.run(tmp_path, "", tmp_path)
        assert done.returncode == 1
        told = "Open this inside the project, or set REPOSITORY to the address you clone it from."
        assert done.stderr.splitlines()[-1] == f"RuntimeError: {told}"
        assert (asked, list(tmp_path.glob("minibert*"))) == ([], [])
