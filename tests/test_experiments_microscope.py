"""What the microscope says of runs is what numpy says of their files, and bad input ends in one line."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pages import Opened, Seen
from safetensors.torch import load_file, save_file
from small_runs import Ended, call, finished_runs, flags, strict_json
from test_experiments_masked_lm import build_masked, theirs
from tiny_bert import TINY

import train
from experiments.masked_lm import losses, mask, read_masked_head, sentences
from experiments.microscope import main
from experiments.microscope_tables import as_json
from experiments.microscopy import magnify
from experiments.updates import read_trained
from lora.placement import linear_names
from minibert.tokenizer import Tokenizer

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

RUNS = {
    "full": {"task": "sst", "method": "full", "lr": 0.001},
    "lora": {"task": "sst", "method": "lora", "rank": 3, "alpha": 5.0},
    "rslora": {"task": "sts", "method": "rslora", "rank": 4, "rank_pattern": "query=2"},
    "dora": {"task": "sst", "method": "dora", "rank": 3},
    "pooler": {"task": "qqp", "method": "lora", "pooling": "pooler", "targets": "query@1"},
    "frozen": {"task": "sst", "method": "frozen"},
    "several": {"task": "sst+sts", "method": "lora"},
    "own": {"task": "sst+sts", "method": "lora", "adapters": "per-task"},
}
METHODS = ("full", "lora", "rslora", "dora")


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return finished_runs(tiny, small_data, tmp_path_factory.mktemp("finished"), RUNS, max_steps=4)


@pytest.fixture
def look(finished, tmp_path: Path) -> Callable[..., tuple[Ended, dict]]:
    """Runs by kind or by path, and further arguments -> how the command ended, and its JSON."""

    def call_it(*runs: str | Path, more: tuple = ()) -> tuple[Ended, dict]:
        folders = [finished(run) if isinstance(run, str) else run for run in runs]
        ended = call(main, *folders, "--out", tmp_path / "seen", *more)
        assert ended.code == 0, ended.err
        return ended, strict_json((tmp_path / "seen" / "microscope.json").read_text())

    return call_it


@pytest.fixture(scope="module")
def measured(finished) -> Callable[..., list[dict]]:
    """The same runs' part of the JSON, without the pictures, which take most of the time."""

    def measure(*runs: str | Path, task: str | None = None, top: int = 10, threshold: float = 0.5) -> list:
        folders = [finished(run) if isinstance(run, str) else run for run in runs]
        return as_json(magnify(folders, task, top)[0], threshold)["runs"]

    return measure


def after_of(run: Path, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every trained linear's weight in fp64, from the run's files alone."""
    if (run / "model").is_dir():
        state = load_file(run / "model" / "model.safetensors")
        return {name: state[f"{name}.weight"].double().numpy() for name in linear_names(2, False)}
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): one.double().numpy() for name, one in state.items()}
    after = {}
    for key, lora_A in state.items():
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight")
        rank = len(lora_A)
        assert settings["rank_pattern"].get(name, settings["r"]) == rank
        alpha = settings["alpha_pattern"].get(name, settings["lora_alpha"])
        scaling = alpha / (rank**0.5 if settings["use_rslora"] else rank)
        weight = (
            base[f"{name.removeprefix('bert.')}.weight"] + scaling * state[f"{name}.lora_B.weight"] @ lora_A
        )
        if settings["use_dora"]:
            wanted = state[f"{name}.lora_magnitude_vector"]
            weight *= (wanted / np.linalg.norm(weight, axis=1))[:, None]
        after[name.removeprefix("bert.")] = weight
    return after


@pytest.fixture(scope="module")
def base(tiny: Path) -> dict[str, np.ndarray]:
    return {name: one.double().numpy() for name, one in load_file(tiny / "model.safetensors").items()}


@pytest.mark.parametrize("kind", METHODS)
def test_every_module_is_measured_as_numpy_measures_the_dense_difference(kind, measured, finished, base):
    after = after_of(finished(kind), base)
    modules = measured(kind, top=4, threshold=0.9)[0]["modules"]
    assert [one["name"] for one in modules] == [name for name in linear_names(2, False) if name in after]
    assert len(modules) == 12
    for one in modules:
        old, new = base[f"{one['name']}.weight"], after[one["name"]]
        values = np.linalg.svd(new - old, compute_uv=False)
        tiny_share = 1e-9 * values[0]
        assert np.allclose(one["values"], values, rtol=1e-6, atol=tiny_share)
        shares = values / values.sum()
        entropy = -(shares[shares > 1e-12] * np.log(shares[shares > 1e-12])).sum()
        assert one["effective_rank"] == pytest.approx(np.exp(entropy), rel=1e-6)
        energy = np.cumsum(values**2) / (values**2).sum()
        assert one["rank_90"] == np.searchsorted(energy, 0.9) + 1
        assert one["change"] == pytest.approx(np.linalg.norm(new - old), rel=1e-9)
        lengths = [np.linalg.norm(w, axis=1) for w in (old, new)]
        cosines = (old * new).sum(axis=1) / (lengths[0] * lengths[1])
        assert one["magnitude"] == pytest.approx(np.abs(lengths[1] - lengths[0]).mean(), rel=1e-6)
        assert one["direction"] == pytest.approx((1 - cosines).mean(), rel=1e-5)
        vectors = [np.linalg.svd(w, full_matrices=False)[0] for w in (old, new)]
        closest = np.abs(vectors[0].T @ vectors[1][:, :4]).max(axis=0)
        assert np.allclose(one["closest"], closest, atol=1e-9)
        assert one["intruders"] == (closest < 0.9).sum()


@pytest.mark.parametrize(("kind", "ranks"), [("lora", {3}), ("rslora", {2, 4})])
def test_an_adapter_has_the_rank_it_was_given_and_its_norm(kind, ranks, measured, finished, base):
    modules = measured(kind)[0]["modules"]
    assert {one["rank"] for one in modules} == ranks
    after = after_of(finished(kind), base)
    for one in modules:
        assert one["effective_rank"] <= one["rank"] + 1e-9
        difference = after[one["name"]] - base[f"{one['name']}.weight"]
        assert one["adapter_norm"] == pytest.approx(np.linalg.norm(difference))


def test_doras_adapter_norm_is_that_before_its_magnitudes(measured):
    for one in measured("dora")[0]["modules"]:
        assert one["adapter_norm"] > 0
        assert one["adapter_norm"] != pytest.approx(one["change"], rel=1e-4)
        assert one["rank"] > 3


def test_the_table_has_a_row_for_each_run_and_layer_with_their_totals(look):
    ended, told = look(*METHODS, more=["--by-layer"])
    runs, layers = (part.splitlines() for part in ended.out.split("\n\n")[:2])
    assert [line.split(" | ")[1] for line in runs[2:6]] == list(METHODS)
    assert len(layers[2:]) >= 2 * len(METHODS)
    for run, line in zip(told["runs"], runs[2:], strict=False):
        modules = run["modules"]
        total = sum(one["change"] ** 2 for one in modules) ** 0.5
        assert run["change"] == pytest.approx(total)
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        assert cells[3] == f"{total:.3f}"
        norms = sum(one["norm"] ** 2 for one in modules) ** 0.5
        assert cells[4] == f"{total / norms:.2%}"
        assert cells[6] == f"{np.mean([one['effective_rank'] for one in modules]):.1f}"
        pairs = np.array([(one["magnitude"], one["direction"]) for one in modules])
        assert run["correlation"] == pytest.approx(np.corrcoef(pairs.T)[0, 1])
        assert cells[11] == f"{run['correlation']:+.2f}"
        for layer in run["layers"]:
            own = [one["change"] ** 2 for one in modules if one["layer"] == layer["layer"]]
            assert layer["change"] == pytest.approx(sum(own) ** 0.5)


def test_what_full_fine_tuning_changed_elsewhere_is_its_share(measured, finished, base):
    full, lora = measured("full", "lora")
    state = load_file(finished("full") / "model" / "model.safetensors")
    squares = {name: ((one.double().numpy() - base[name]) ** 2).sum() for name, one in state.items()}
    inside = sum(squares[f"{name}.weight"] for name in linear_names(2, False))
    assert full["outside"] == pytest.approx(1 - inside / sum(squares.values()))
    assert 0 < full["outside"] < 1
    assert lora["outside"] == 0


def test_the_csv_files_have_every_module_and_singular_value(look, tmp_path):
    _, told = look("full", "lora")
    with open(tmp_path / "seen" / "modules.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    modules = [one for run in told["runs"] for one in run["modules"]]
    assert [row["name"] for row in rows] == [one["name"] for one in modules]
    for row, one in zip(rows, modules, strict=True):
        assert float(row["effective_rank"]) == one["effective_rank"]
        assert int(row["intruders"]) == one["intruders"]
    with open(tmp_path / "seen" / "spectra.csv", newline="") as file:
        values = [float(row["singular_value"]) for row in csv.DictReader(file)]
    assert values == [value for one in modules for value in one["values"] if value]


def test_a_frozen_run_changed_nothing_and_that_is_said(look, finished, tmp_path):
    ended, told = look("frozen")
    assert f"{finished('frozen')}: nothing was changed, frozen trains the head alone" in ended.out
    assert told["runs"][0]["modules"] == []
    ended, told = look("frozen", "lora")
    assert "nothing was changed" in ended.out
    assert [len(run["modules"]) for run in told["runs"]] == [0, 12]
    assert "<svg" in (tmp_path / "seen" / "microscope.html").read_text()


def test_adapters_on_few_layers_are_measured_alone(measured):
    (told,) = measured("pooler")
    assert [one["name"] for one in told["modules"]] == ["encoder.layer.1.attention.self.query"]
    assert told["correlation"] is None


def test_the_pooler_is_measured_where_it_trains(tiny, small_data, tmp_path, look):
    out = tmp_path / "run"
    settings = {"task": "sst", "method": "full", "pooling": "pooler", "max_steps": 2, "lr": 0.001}
    assert call(train.main, *flags(tiny, small_data, out=out, **settings)).code == 0
    ended, told = look(out, more=["--by-layer"])
    last = told["runs"][0]["modules"][-1]
    assert (last["name"], last["layer"]) == ("pooler.dense", None)
    assert last["change"] > 0
    assert re.search(r"\| full \| pooler \|", ended.out)


def test_a_shared_adapter_needs_no_task_and_one_of_many_does(measured, finished, tmp_path):
    assert len(measured("several")[0]["modules"]) == 12
    ended = call(main, finished("own"), "--out", tmp_path / "none")
    assert ended.code == 2
    assert "--task" in ended.line
    assert "sst, sts" in ended.line
    assert not (tmp_path / "none").exists()
    found, (left_out,) = magnify([finished("own"), finished("several")], None, 10)
    assert (found[0].path, left_out.folder) == (finished("several"), finished("own"))
    assert "--task chooses, of sst, sts" in left_out.reason
    (chosen,), (other,) = (measured("own", task=task) for task in ("sts", "sst"))
    (alone,) = measured(finished("own") / "adapter-sts")
    assert chosen["modules"] == alone["modules"]
    assert chosen["modules"] != other["modules"]


def test_a_run_of_another_base_is_not_used(finished, tiny, small_data, tmp_path):
    model = Path(shutil.copytree(tiny, tmp_path / "other"))
    state = load_file(model / "model.safetensors")
    state["pooler.dense.bias"] += 1
    save_file(state, model / "model.safetensors", {"format": "pt"})
    out = tmp_path / "run"
    assert call(train.main, *flags(model, small_data, out=out, method="lora", max_steps=2)).code == 0
    ended = call(main, finished("lora"), out, "--out", tmp_path / "seen")
    assert ended.code == 0
    assert f"not used: {out}: expected a run of the same base model" in ended.line
    (shown,) = strict_json((tmp_path / "seen" / "microscope.json").read_text())["runs"]
    assert shown["run"] == str(finished("lora"))


def test_a_full_run_whose_base_is_no_longer_what_it_was_is_refused(tiny, small_data, tmp_path):
    model, out = Path(shutil.copytree(tiny, tmp_path / "base")), tmp_path / "run"
    assert call(train.main, *flags(model, small_data, out=out, method="full", max_steps=2)).code == 0
    state = load_file(model / "model.safetensors")
    state["pooler.dense.bias"] += 1
    save_file(state, model / "model.safetensors", {"format": "pt"})
    ended = call(main, out, "--out", tmp_path / "none")
    assert ended.code == 2
    assert "expected sha256" in ended.line


DAMAGE = {
    "unfinished": (lambda run: (run / "result.json").unlink(), "not finished"),
    "no config": (lambda run: (run / "config.json").unlink(), "config.json"),
    "cut adapter": (
        lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 40),
        "adapter_model.safetensors",
    ),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), "adapter"),
    "result is no JSON": (lambda run: (run / "result.json").write_text("{"), "result.json"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_ends_in_one_line(kind, finished, tmp_path):
    run = Path(shutil.copytree(finished("lora"), tmp_path / "run"))
    damage, word = DAMAGE[kind]
    damage(run)
    ended = call(main, run, "--out", tmp_path / "none")
    assert ended.code == 2
    assert word in ended.line
    assert not (tmp_path / "none").exists()
    with pytest.MonkeyPatch.context() as patch:  # pictures take most of the time
        patch.setattr("experiments.microscope_page.parts_of", lambda *_: [])
        ended = call(main, run, finished("full"), "--out", tmp_path / "seen")
    assert (ended.code, ended.line[:10]) == (0, "not used: ")
    assert word in ended.line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["RUN", "RUN"], "given twice"),
        (["nowhere"], "nowhere"),
        (["RUN", "--task", "qqp"], "one of the run's tasks"),
        (["RUN", "--top", "0"], "--top"),
        (["RUN", "--threshold", "0"], "--threshold"),
        (["RUN", "--threshold", "nan"], "--threshold"),
        (["RUN", "--out", "FILE"], "--out"),
    ],
    ids=str,
)
def test_bad_usage_ends_in_one_line(arguments, word, finished, tmp_path):
    (tmp_path / "file").write_text("")
    places = {"RUN": finished("lora"), "FILE": tmp_path / "file" / "folder"}
    out = [] if "--out" in arguments else ["--out", tmp_path / "none"]
    ended = call(main, *(places.get(one, one) for one in arguments), *out)
    assert ended.code == 2
    assert word in ended.line


def test_the_runs_stay_as_they_are(look, finished):
    run = finished("dora")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    look("dora")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_drift_of_the_masked_loss_is_transformers(tiny, small_data, tmp_path, measured):
    transformers = pytest.importorskip("transformers")
    model = build_masked(tiny, tmp_path / "model")
    runs = []
    for method in ("full", "lora"):
        out = tmp_path / method
        settings = {"task": "sst", "method": method, "max_steps": 3, "pooling": "mean"}
        assert call(train.main, *flags(model, small_data, out=out, **settings)).code == 0
        runs.append(out)
    full, lora = (run["masked_language_model"] for run in measured(*runs))
    masked = mask(sentences(), Tokenizer(model, 128, TINY.vocab_size))[:40]
    before = transformers.BertForMaskedLM.from_pretrained(model).eval()
    after = transformers.BertForMaskedLM.from_pretrained(model).eval()
    state = load_file(runs[0] / "model" / "model.safetensors")
    after.bert.load_state_dict(state)

    assert full["before"] == lora["before"]
    assert full["change"] == pytest.approx(full["after"] - full["before"])
    assert full["error"] > 0
    trained = read_trained(runs[0])
    head = read_masked_head(model)
    for one, bert in ((before, trained.start), (after, trained.merged)):
        assert losses(bert, head, masked).tolist() == pytest.approx(theirs(one, masked), rel=1e-3)


def test_the_table_and_the_page_have_the_drift(tiny, small_data, tmp_path, look):
    pytest.importorskip("transformers")
    model, out = build_masked(tiny, tmp_path / "model"), tmp_path / "run"
    settings = {"task": "sst", "method": "lora", "max_steps": 3, "pooling": "mean"}
    assert call(train.main, *flags(model, small_data, out=out, **settings)).code == 0
    ended, told = look(out)
    drift = told["runs"][0]["masked_language_model"]
    assert "not measured" not in ended.out
    assert f"| {drift['after']:.3f} ({drift['change']:+.3f}) |" in ended.out
    page = (tmp_path / "seen" / "microscope.html").read_text(encoding="utf-8")
    assert f"{drift['change']:+.4f} ± {drift['error']:.4f}" in page


NASTY = "<i onclick=alert(1)>|$x$ `a` &amp; "


@pytest.fixture(scope="module")
def page_file(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every method, and of a run with a name that would be markup."""
    folder = tmp_path_factory.mktemp("page")
    odd = shutil.copytree(finished("several"), folder / NASTY)
    runs = [*map(finished, (*METHODS, "pooler", "frozen")), odd]
    assert call(main, *runs, "--out", folder / "seen").code == 0
    return folder / "seen" / "microscope.html"


def test_names_are_text_and_all_runs_are_in_the_legends(page_file):
    seen = Seen(page_file.read_text(encoding="utf-8"))
    assert not [attributes for _, attributes in seen.tags if "onclick" in attributes]
    assert NASTY in seen.text
    for number, kind in enumerate(METHODS, 1):
        assert f"{number} {kind} ({kind})" in seen.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_alone_without_errors_and_fits_the_screen(browser, page_file, width, scheme):
    opened = Opened(browser, page_file, width, scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    pictures = opened.page.locator("figure svg").all()
    assert len(pictures) == 6 + 4 + 1 + 2
    for picture in pictures:
        box = picture.bounding_box()
        assert box["height"] > 100
        assert box["x"] + box["width"] <= width
    assert opened.asked == [page_file.as_uri()]
    assert opened.said == []
    opened.page.close()


def test_the_ticks_are_numbers(browser, page_file):
    page = Opened(browser, page_file, 1280, "light").page
    texts = page.locator("figure svg text").all_text_contents()
    assert not [text for text in texts if "math" in text or "$" in text]
