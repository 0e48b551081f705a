"""Both sides compute the same vectors and scores before their speed is compared."""

import argparse
import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import call
from tiny_bert import WORDS

from benchmarks import inference, inference_speed
from benchmarks.inference import SIDES, write_folders
from benchmarks.inference_speed import COLUMNS, differences, main, name_of, rows, texts_of
from minibert.files import write_safetensors
from tasks.base import Example

MAX_LENGTH = 12  # so that some texts are cut


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inference")
    write_folders(tiny, folder, MAX_LENGTH)
    return folder


def texts(what: str, count: int = 40) -> list:
    chance = random.Random(1)
    sentences = [" ".join(chance.choices(WORDS, k=chance.randint(1, 20))) for _ in range(count)]
    return sentences if what == "sentences" else list(zip(sentences, sentences[::-1], strict=True))


@pytest.mark.parametrize("what", ["sentences", "pairs"])
def test_both_sides_give_the_same_from_the_same_folder(folders, what):
    pytest.importorskip("sentence_transformers")
    ours, theirs = (
        SIDES[side, what](folders / what, "fp32", MAX_LENGTH)(texts(what)) for side in ("ours", "peer")
    )
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.ptp(ours, axis=0).min() > 1e-3  # they are not all one


@pytest.mark.parametrize("what", ["sentences", "pairs"])
def test_bf16_is_near_fp32(folders, what):
    fp32, bf16 = (SIDES["ours", what](folders / what, p, MAX_LENGTH)(texts(what)) for p in ("fp32", "bf16"))
    assert 0 < np.abs(fp32 - bf16).max() < 0.1


def test_a_sentence_is_encoded_once_and_a_pair_as_it_stands():
    examples = [Example("1", ("a", "b"), 0.0), Example("2", ("b", "c"), 1.0)]
    assert texts_of(examples) == {"sentences": ["a", "b", "c"], "pairs": [("a", "b"), ("b", "c")]}


def test_a_process_times_each_pass_and_saves_what_comes_out(folders, tmp_path):
    given = tmp_path / "texts.json"
    given.write_text(json.dumps({"sentences": texts("sentences", 5), "pairs": []}))
    asked = ["--side", "ours", "--what", "sentences", "--folder", folders, "--texts", given, "--passes", 3]
    ended = call(lambda: inference.main() or 0, *asked, "--save", tmp_path / "out.safetensors")
    told = json.loads(ended.out)
    assert (len(told["seconds"]), told["texts"]) == (3, 5)
    assert min(told["seconds"]) > 0


def test_rates_and_ratios_are_of_the_same_precision_and_round():
    seconds = {"ours": (1.0, 2.0, 1.0), "peer": (3.0, 4.0, 1.5)}
    rounds = [
        {name_of(what, "fp32", side): {"mean": seconds[side][i], "texts": 12}
         for what in ("sentences", "pairs") for side in seconds}
        for i in range(3)
    ]  # fmt: skip
    found = dict.fromkeys(rounds[0], 2.5e-7)
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in rows(rounds, ["fp32"], found)]
    assert [(line["what"], line["side"]) for line in lines[:2]] == [
        ("sentences", "ours"),
        ("sentences", "peer"),
    ]
    assert (lines[1]["texts/s"], lines[1]["ratio"]) == ("4", "2.000 [1.500, 3.000]")
    assert lines[1]["difference"] == "2.5e-07"


def fakes(monkeypatch: pytest.MonkeyPatch, off_by: float) -> None:
    """Processes that all give ones, ours in fp32 off by so much, in so many seconds as there are passes.

    The peer's package need not be there.
    """

    def compute(given, folder, what, precision, side, i, passes, save=None) -> dict:
        if save:
            off = off_by if (precision, side) == ("fp32", "ours") else 0.0
            write_safetensors({"out": torch.ones(2) + off}, save)
        return {"seconds": [1.0] * passes, "texts": 3, "mean": 1.0}

    monkeypatch.setattr(inference_speed, "compute", compute)
    monkeypatch.setattr(inference_speed, "check_installed", lambda *_: None)


def test_sides_that_differ_are_not_timed(monkeypatch, refusal, tmp_path):
    given = argparse.Namespace(precisions=["fp32", "bf16"])
    fakes(monkeypatch, off_by=1e-5)
    found = differences(given, tmp_path)
    assert found[name_of("pairs", "fp32", "ours")] == pytest.approx(1e-5, rel=0.02)
    assert found[name_of("pairs", "bf16", "peer")] == 0
    for wrong in (1e-3, float("nan")):
        fakes(monkeypatch, off_by=wrong)
        assert "sentences, fp32: ours: expected the peer's within 0.0001" in refusal(
            differences, given, tmp_path
        )


def test_the_table_is_shown_and_written(tiny, small_data, tmp_path, monkeypatch):
    fakes(monkeypatch, off_by=0.0)
    out = tmp_path / "inference.csv"
    asked = ["--model", tiny, "--data", small_data, "--precisions", "fp32", "--rounds", 2, "--out", out]
    ended = call(main, *asked)
    assert ended.code == 0, ended.err
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["side"] for line in lines] == ["ours", "peer"] * 2
    assert all(line[name] in ended.out for line in lines for name in COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "sst"], "--task"),
        (["--passes", "0"], "--passes: expected at least 1, got 0"),
        (["--precisions", "fp16"], "--precisions"),
        (["--data", "no/where"], "--data: expected a folder, got 'no/where'"),
        (["--rounds", "0"], "--rounds: expected at least 1"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line
