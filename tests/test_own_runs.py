"""A run on one's own data goes through every command, though nothing in the project knows its task's name."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from own_files import SHAPES
from small_runs import call, flags, left_behind
from stopped_runs import Killed, stopping

import predict
import train
from experiments import compare, evaluate, explain, grid, microscope, report, summary
from experiments.scored import read_scored
from lora import merge, verify
from training import embed
from training.run_folder import load_run

KINDS = {
    "twenty": {"method": "lora"},
    "three": {"method": "full", "lr": 0.001, "pooling": "pooler"},
    "scores": {"method": "dora", "pair": "siamese"},
}
SMALL = {"max_length": 32, "batch_size": 8, "max_steps": 6, "precision": "fp32"}


def words(kind: str, model: Path, file: Path, /, **changes) -> list[str]:
    settings = SMALL | KINDS[kind] | changes
    given = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["--model", str(model), "--train", str(file), *SHAPES[kind].flags, *given]


def succeed(main, *arguments: object) -> str:
    ended = call(main, *arguments)
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    return ended.out


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def file(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SHAPES[kind].write(tmp_path_factory.mktemp(f"{kind}-data"))


@pytest.fixture(scope="module")
def run(kind: str, file: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    out = tmp_path_factory.mktemp(kind) / "run"
    test = ["--test", file]
    succeed(train.main, *words(kind, tiny, file), *test, "--out", out)
    return out


def predictions(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as opened:
        return list(csv.DictReader(opened))


def test_predictions_have_the_names_of_the_classes(kind: str, run: Path) -> None:
    classes = SHAPES[kind].classes
    rows = predictions(run / "predictions-dev.csv")
    assert list(rows[0]) == ["id", "prediction", *(f"p_{name}" for name in classes)]
    for row in rows if classes else []:
        shares = {name: float(row[f"p_{name}"]) for name in classes}
        assert row["prediction"] == max(shares, key=shares.get)


def test_a_run_stopped_and_gone_on_with_is_the_same(
    kind: str, run: Path, file: Path, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = [*words(kind, tiny, file), "--test", file, "--out", out]
    with stopping(4), pytest.raises(Killed):
        call(train.main, *arguments, "--checkpoint-steps", 2)
    succeed(train.main, *arguments, "--resume")
    assert left_behind(out) == left_behind(run)


def test_the_file_in_the_folder_and_the_card_make_the_run_again(kind: str, run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    for again in (["--config", run / "config.json"], ["--task", run / f"{config['task']}.toml"]):
        shown = {
            "--task": ["--model", config["model"], "--dry-run"],
            "--config": ["--out", tmp_path / "again"],
        }
        succeed(train.main, *again, *shown[again[0]])
    assert left_behind(tmp_path / "again") == left_behind(run)


def test_predict_says_what_the_run_did_without_the_data_and_without_ids(
    kind: str, run: Path, file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (folder := tmp_path / "data").mkdir()
    source = SHAPES[kind].write(folder)
    succeed(predict.main, copy, "--input", source, "--output", tmp_path / "out.csv")
    made, known = predictions(tmp_path / "out.csv"), predictions(run / "predictions-test.csv")
    assert [row["prediction"] for row in made if not SHAPES[kind].classes] == pytest.approx(
        [row["prediction"] for row in known if not SHAPES[kind].classes]
    )
    assert [row["id"] for row in made] == [row["id"] for row in known]
    texts = ["good film"] * len(load_run(run)[0].tasks[0].text_columns)
    said = succeed(predict.main, run, "--text", *texts)
    if (adapter := run / "adapter").is_dir():
        assert succeed(predict.main, adapter, "--text", *texts) == said
        assert "files" not in json.loads((adapter / "minibert.json").read_text())["own"][0]
    if classes := SHAPES[kind].classes:
        assert said.split(" p_")[0] in classes


def test_every_command_reads_the_run(kind: str, run: Path, file: Path, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    succeed(train.main, *words(kind, tiny, file, seed=1), "--out", other)
    reported = json.loads((run / "result.json").read_text())["dev"]
    assert read_scored(run).score == pytest.approx(reported, abs=1e-6)
    assert not list((run / "evaluation").glob("*-output.csv"))
    said = succeed(evaluate.main, run, "--out", tmp_path / "evaluation.json")
    assert all(name in said for name in SHAPES[kind].classes)
    succeed(compare.main, run, other)
    succeed(summary.main, run, other)
    page = tmp_path / "page.html"
    succeed(report.main, run, other, "--out", page)
    assert all(name in page.read_text() for name in SHAPES[kind].classes)
    pair = ["--pair", "bad film"] * (len(load_run(run)[0].tasks[0].text_columns) - 1)
    succeed(explain.main, run, "--text", "good film", *pair, "--out", tmp_path / "why.html")
    succeed(microscope.main, run, other, "--out", tmp_path / "seen")
    (tmp_path / "texts.txt").write_text("good\nbad\n")
    succeed(embed.main, run, "--input", tmp_path / "texts.txt", "--output", tmp_path / "v.npy")
    succeed(merge.main, run, tmp_path / "merged")
    if KINDS[kind]["method"] != "full":
        succeed(verify.main, run)


def test_a_grid_runs_over_own_data(kind: str, run: Path, tiny: Path, tmp_path: Path) -> None:
    if kind != "three":
        pytest.skip("one kind is enough")
    config = json.loads((run / "config.json").read_text())
    (own,) = config["own"]
    table = {"task": config["task"], "own": json.dumps(own), "data": config["data"], "model": str(tiny)}
    table |= {"max_steps": 1, "max_length": 32, "batch_size": 8, "precision": "fp32"}
    settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
    (tmp_path / "grid.toml").write_text(settings + "[axes]\nseed = [0]\n")
    succeed(grid.main, tmp_path / "grid.toml", "--out", tmp_path / "cells", "--jobs", "1")
    assert len(list((tmp_path / "cells").glob("*/result.json"))) == 1


def test_own_and_built_in_tasks_share_an_encoder(
    file: Path, kind: str, tiny: Path, run: Path, tmp_path
) -> None:
    toml = next(run.glob("*.toml"))
    words = flags(tiny, "demo", task=f"sst+{toml}", max_steps=2, out=tmp_path / "run", method="rslora")
    succeed(train.main, *words)
    assert (tmp_path / "run" / f"predictions-dev-{toml.stem}.csv").is_file()
    assert read_scored(tmp_path / "run", toml.stem).examples
    succeed(evaluate.main, tmp_path / "run", "--task", toml.stem)
