"""A run's model card: its snippets run in its folder and say what the run says; no text breaks out of it."""

import csv
import importlib
import json
import math
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from small_runs import FILES, LABELS, call, finished_runs, flags, strict_json, write_data

import train
from lora.methods import METHODS
from tasks import SST
from tasks.bootstrap import interval, score_of
from training import data_notes
from training.adapter_folder import SENTENCES, example_texts, logits_of
from training.cli import parse
from training.config import Config, to_dict
from training.embedding import Encoder
from training.model_card import code, indented, quoted
from training.run_folder import load_run
from training.snippets import snippets

RUNS = {
    "sst": {"task": "sst", "method": "lora", "pooling": "mean"},
    "hidden": {"task": "sts", "method": "dora", "pooling": "cls", "hidden_layers": 1},
    "classifier": {"task": "qqp", "method": "lora", "pooling": "pooler", "targets": "dense@1"},
    "pooler": {"task": "sst", "method": "rslora", "pooling": "pooler", "hidden_layers": 2},
    "siamese": {"task": "sts", "method": "rslora", "pair": "siamese", "pooling": "mean"},
    "full": {"task": "qqp", "method": "full", "pair": "siamese", "features": "uv-diff-prod", "pooling": "cls",
             "hidden_layers": 1, "lr": 0.001},
    "linear": {"task": "sst", "method": "full", "pooling": "pooler", "lr": 0.001},
    "frozen": {"task": "qqp", "method": "frozen", "pair": "siamese", "features": "uv-diff"},
    "several": {"task": "sst+sts", "method": "lora", "pair": "siamese", "features": "uv"},
    "own": {"task": "sst+qqp", "method": "lora", "adapters": "per-task"},
}  # fmt: skip
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^### (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return finished_runs(tiny, small_data, tmp_path_factory.mktemp("finished"), RUNS, max_steps=4)


def card_of(run: Path) -> str:
    return (run / "README.md").read_text(encoding="utf-8")


def pieces(card: str) -> list[tuple[str, str, str]]:
    """Of the part on use: under which heading, in which language, and the code."""
    use = card[card.index("## Use") : card.index("## Settings")]
    starts = [("", 0), *((one[1], one.start()) for one in HEADING.finditer(use))]
    return [
        (next(name for name, start in reversed(starts) if start < one.start()), one[1], one[2])
        for one in BLOCK.finditer(use)
    ]


def in_shell(line: str) -> str:
    """A command of a card, in this process."""
    python, dash_m, module, *arguments = shlex.split(line)
    assert (python, dash_m) == ("python", "-m")
    ended = call(importlib.import_module(module).main, *arguments)
    assert ended.code == 0, ended.err
    return ended.out


def test_every_method_is_among_the_runs():
    assert {run["method"] for run in RUNS.values()} == METHODS.keys()


@pytest.mark.parametrize("kind", RUNS)
def test_every_snippet_runs_in_the_folder_and_says_what_the_run_says(
    kind: str, finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    run = Path(shutil.copytree(finished(kind), tmp_path / "run"))
    config = Config(**{name: tuple(one) if isinstance(one, list) else one
                       for name, one in strict_json((run / "config.json").read_text()).items()})  # fmt: skip
    monkeypatch.chdir(run)
    ran = set()
    for number, (heading, language, text) in enumerate(pieces(card_of(run))):
        if language == "bash":
            out = in_shell(text.strip())
            assert out.strip()
            continue
        kind_of, _, named = heading.partition(" (")
        task = {one.name: one for one in config.tasks}[named.rstrip(")") or config.task]
        if kind_of == "sentence-transformers":
            pytest.importorskip("sentence_transformers")
        file = tmp_path / f"piece{number}.py"
        file.write_text(text, encoding="utf-8")
        told = runpy.run_path(str(file))
        own = config.adapters == "per-task"
        if kind_of == "sentence-transformers":
            expected = Encoder.load(f"adapter-{task.name}" if own else ".").encode(list(SENTENCES[:2]))
            assert np.allclose(told["vectors"], expected, atol=1e-5)
            u, v = expected
            assert told["cosine"] == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)), abs=1e-5)
        else:
            used, model, tokenizer = load_run(run, task.name if own else None)
            expected = logits_of(used, model, tokenizer, task, [example_texts(task)[0]])
            assert torch.allclose(told["logits"], expected, atol=1e-4), heading
            assert expected.shape == (1, task.num_outputs)
            read = told["tokenizer"]("a [SEP] b", add_special_tokens=False)["input_ids"]
            assert tokenizer.id_of("[SEP]") not in read
        ran.add((kind_of, task.name))
    method = METHODS[config.method]
    for task in config.tasks:
        assert (("PEFT", task.name) in ran) == (method.layer is not None)
        assert ("transformers", task.name) in ran
        siamese = config.siamese(task) and config.pooling != "pooler"
        assert (("sentence-transformers", task.name) in ran) == siamese


def test_a_known_model_is_loaded_by_its_revision():
    for one in snippets(Config(task="sst", method="lora", pooling="mean"), False)[:1]:
        assert "sentence-transformers/all-MiniLM-L6-v2" in one.code
        assert "1110a243fdf4706b3f48f1d95db1a4f5529b4d41" in one.code


@pytest.mark.parametrize("kind", ["sst", "hidden", "several"])
def test_the_hub_reads_its_head_and_the_scores_are_the_runs(kind: str, finished) -> None:
    run = finished(kind)
    result = strict_json((run / "result.json").read_text())
    card = ModelCard(card_of(run), ignore_metadata_errors=False)
    told = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results}
    expected = {
        (task, metric): pytest.approx(value, abs=1e-6)
        for task, metrics in result["metrics"]["dev"].items()
        for metric, value in metrics.items()
    }
    assert told == expected
    assert card.data.license is None
    assert card.data.library_name == "peft"
    assert card.data.language is None  # of one's own files nothing is known
    assert set(RUNS[kind]["task"].split("+")) < set(card.data.tags)


def dev_of(run: Path, data: Path, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels, from the files."""
    with open(data / FILES[task].format("dev"), newline="") as file:
        labels = [float(row[LABELS[task][0]]) for row in csv.DictReader(file, delimiter="\t")]
    with open(run / "predictions-dev.csv", newline="") as file:
        predictions = [float(row["prediction"]) for row in csv.DictReader(file)]
    return np.array(predictions), np.array(labels)


@pytest.mark.parametrize("kind", ["sst", "hidden"])
def test_the_interval_is_the_bootstraps_over_the_files(kind: str, finished, small_data: Path) -> None:
    task = RUNS[kind]["task"]
    predictions, labels = dev_of(finished(kind), small_data, task)
    metric = {"sst": "accuracy", "sts": "pearson"}[task]
    low, high = interval(score_of(metric, predictions[None], labels), len(labels))
    result = strict_json((finished(kind) / "result.json").read_text())
    row = f"| {task} | {metric} | {result['dev']:.4f} | {low:.4f} to {high:.4f} | {len(labels)} |"
    assert row in card_of(finished(kind))


def test_the_command_in_it_makes_the_same_run(finished) -> None:
    for kind in ("hidden", "own", "classifier"):
        card = card_of(finished(kind))
        line = next(line for line in card.splitlines() if line.startswith("    python train.py"))
        config, _ = parse(shlex.split(line)[2:])
        assert to_dict(config) == strict_json((finished(kind) / "config.json").read_text())


def test_files_are_named_with_their_hashes_and_no_text_of_theirs_is_shown(finished, small_data) -> None:
    run = finished("several")
    card, hashes = card_of(run), strict_json((run / "result.json").read_text())["sha256"]["data"]
    assert len(hashes) == 6
    for name, digest in hashes.items():
        assert f"| `{name}` | `{digest}` |" in card
    for file in FILES.values():
        for split in ("train", "dev"):
            with open(small_data / file.format(split), newline="") as rows:
                for row in csv.DictReader(rows, delimiter="\t"):
                    texts = [text for column, text in row.items() if (column or "").startswith("sentence")]
                    assert not [text for text in texts if len(text) > 12 and text in card]


def test_what_is_counted_is_right(tiny: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    file = data / FILES["sst"].format("dev")
    train_rows = (data / FILES["sst"].format("train")).read_text().splitlines()
    rows = file.read_text().splitlines()
    known = train_rows[1].split("\t")
    changed = [rows[0], *("\t".join([*row.split("\t")[:2], known[2], "2.0"]) for row in rows[1:4]), *rows[4:]]
    file.write_text("\n".join(changed) + "\n")
    out = tmp_path / "run"
    assert call(train.main, *flags(tiny, data, out=out, task="sst", method="frozen")).code == 0
    card = card_of(out)
    assert "3 of the 10 dev examples have the texts of a training example." in card
    train_labels = [int(float(row.split("\t")[3])) for row in train_rows[1:]]
    dev_labels = [int(float(row.split("\t")[3])) for row in changed[1:]]
    for labels in (train_labels, dev_labels):
        assert ", ".join(f"{labels.count(c) / len(labels):.0%} of {c}" for c in range(5)) in card
    commonest = max(range(5), key=lambda label: (train_labels.count(label), -train_labels.index(label)))
    assert f"Always {commonest} gets {dev_labels.count(commonest) / 10:.1%} of dev right." in card
    assert data_notes.NOT_KNOWN in card


def test_the_courses_files_are_known_wherever_they_lie(tiny, small_data, tmp_path, monkeypatch) -> None:
    ids = {path.name: data_notes.git_blob_id(path) for path in small_data.iterdir()}
    monkeypatch.setattr(data_notes, "BLOB_IDS", ids)
    out = tmp_path / "run"
    assert call(train.main, *flags(tiny, small_data, out=out, task="sst", method="frozen")).code == 0
    card = card_of(out)
    assert data_notes.ORIGINS["cs224n"] in card
    assert SST.course_limits[0] in card
    assert ModelCard(card).data.language == "en"


def test_the_built_in_data_is_known(tiny, tmp_path) -> None:
    out = tmp_path / "run"
    settings = {"task": "qqp", "method": "frozen", "max_steps": 1}
    assert call(train.main, *flags(tiny, "demo", out=out, **settings)).code == 0
    card = card_of(out)
    assert data_notes.DEMO_LIMITS[0] in card
    assert "600 train, 148 dev, 152 test" in card


def test_so_few_dev_examples_have_no_interval(tiny: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", {"train": 24, "dev": 3, "test": 2})
    out = tmp_path / "run"
    assert call(train.main, *flags(tiny, data, out=out, task="sst", method="frozen")).code == 0
    assert re.search(r"^\| sst \| accuracy \| [\d.]+ \|  \| 3 \|", card_of(out), re.MULTILINE)


def test_hostile_names_of_folders_stay_text(tiny: Path, tmp_path: Path) -> None:
    name = "```\n---\nlicense: mit\n# x <script>alert(1) | \"'\\ é\u2028"
    data = write_data(tmp_path / name)
    model = Path(shutil.copytree(tiny, tmp_path / f"m{name}"))
    out = tmp_path / "run"
    assert call(train.main, *flags(model, data, out=out, task="sst", method="lora", max_steps=2)).code == 0
    card = card_of(out)
    read = ModelCard(card)
    assert read.data.license is None
    assert read.data.eval_results[0].dataset_name == f"sst, {name}, dev"
    headings = [line for line in card.splitlines() if line.startswith("#")]
    assert not [line for line in headings if line.startswith("# x")]
    assert [line for line in card.splitlines() if line.startswith("---")] == ["---", "---"]
    assert [one[1] for one in pieces(card)] == ["bash", "python", "bash", "python"]
    assert not [line for line in card.splitlines() if line.lstrip().startswith("license") and line[0] != " "]


@given(st.text())
def test_any_text_is_one_scalar_of_yaml(text: str) -> None:
    line = quoted(text)
    assert line.isascii()
    assert "\n" not in line
    assert yaml.safe_load(f"a: {line}") == {"a": text}


@given(st.text())
def test_any_text_is_code_within_its_line(text: str) -> None:
    line = code(text)
    assert len(line.splitlines()) == 1
    fence = re.match("`+", line)[0]
    assert line.endswith(fence)
    inner = line[len(fence) : -len(fence)]
    assert fence not in re.findall("`+", inner)
    assert "|" not in inner.replace("\\|", "")
    line.encode("utf-8")


@given(st.text() | st.just("\ud800 lone"))
def test_any_text_stays_in_its_block(text: str) -> None:
    lines = indented(text).splitlines()
    assert all(line.startswith("    ") for line in lines)
    indented(text).encode("utf-8")


def test_the_card_may_be_changed_and_the_run_still_opens(finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished("sst"), tmp_path / "run"))
    (run / "README.md").write_text("---\nlicense: mit\n---\nmine")
    assert "README.md" not in json.loads((run / "result.json").read_text())["files"]
    assert call(importlib.import_module("predict").main, run, "--text", "a film").code == 0
    assert math.isfinite(strict_json((run / "result.json").read_text())["dev"])
