"""One example explained: predict.py's answer, the nearest of the training file, and nothing as markup."""

import base64
import csv
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pages import Seen
from small_runs import Ended, call, finished_runs, flags
from tiny_bert import TINY

import predict
import train
from experiments.explain import main
from experiments.explanation import Explanation, Read, explain
from experiments.nearest import drawn
from lora.methods import METHODS
from minibert.tokenizer import Tokenizer
from tasks.base import Example
from training.embedding import Encoder

RUNS = {
    "sst": {"task": "sst", "method": "full", "pooling": "mean", "lr": 0.001},
    "concat": {"task": "sts", "method": "dora", "pooling": "pooler"},
    "siamese": {"task": "sts", "method": "lora", "pair": "siamese", "pooling": "mean"},
    "uv": {"task": "qqp", "method": "rslora", "pair": "siamese", "features": "uv", "hidden_layers": 1},
    "frozen": {"task": "qqp", "method": "frozen", "pooling": "cls"},
    "several": {"task": "sst+sts", "method": "lora"},
    "own": {"task": "sst+sts", "method": "lora", "adapters": "per-task"},
}  # fmt: skip
ONE, OTHER = "the film is not good, unaffable", "what a bad dog"
HOSTILE = "</script><img src=x onerror=alert(1)> & \"a\" 'b' <b>"


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of RUNS."""
    return finished_runs(tiny, small_data, tmp_path_factory.mktemp("finished"), RUNS, max_steps=3)


def train_rows(small_data: Path, name: str) -> dict[tuple[str, ...], list[float]]:
    """The sentences of each row of a training file, and the labels that they have there."""
    rows: dict[tuple[str, ...], list[float]] = {}
    with open(small_data / name, newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            columns = ("sentence",) if "sentence" in row else ("sentence1", "sentence2")
            label = next(
                row[column] for column in ("sentiment", "similarity", "is_duplicate") if column in row
            )
            rows.setdefault(tuple(row[column] for column in columns), []).append(float(label))
    return rows


def page_of(run: Path, tmp_path: Path, *arguments: object) -> tuple[str, Ended]:
    ended = call(main, run, *arguments, "--out", tmp_path / "page.html")
    assert ended.code == 0, ended.err
    return (tmp_path / "page.html").read_text(encoding="utf-8"), ended


def test_every_method_is_among_the_runs() -> None:
    assert {run["method"] for run in RUNS.values()} == METHODS.keys()


@pytest.mark.parametrize(
    ("kind", "task"), [(kind, None) for kind in RUNS if "+" not in RUNS[kind]["task"]]
    + [(kind, task) for kind in ("several", "own") for task in ("sst", "sts")]
)  # fmt: skip
def test_the_page_says_what_predict_says_and_what_the_words_add(
    kind: str, task: str | None, finished, tmp_path: Path
) -> None:
    is_pair, of_task = (task or RUNS[kind]["task"]) != "sst", ["--task", task] if task else []
    pair = ["--pair", OTHER] if is_pair else []
    page, ended = page_of(finished(kind), tmp_path, "--text", ONE, *pair, *of_task)
    assert ended.err == ""
    texts = [ONE, OTHER] if is_pair else [ONE]
    told = call(predict.main, finished(kind), "--text", *texts, *of_task).out.split()
    seen = Seen(page)
    if len(told) > 1:
        shares = dict(share.split("=") for share in told[1:])
        assert f"Class {told[0]}." in seen.text
        rows = re.findall(r"<tr><td[^>]*>(\d)</td><td[^>]*>([\d.]+)</td></tr>", page)
        assert {f"p{c}": float(p) for c, p in rows} == pytest.approx(
            {c: float(p) for c, p in shares.items()}, abs=1e-4
        )
    else:
        score = float(re.search(r"A score of (-?[\d.]+)", seen.text)[1])
        assert score == pytest.approx(float(told[0]), abs=2e-4)
    found = explain(finished(kind), task, texts, count=0)
    output, baseline = map(
        float, re.search(r"f\(x\) = ([-\d.]+), f\(baseline\) = ([-\d.]+);", seen.text).groups()
    )
    adds = [float(value) for value in re.findall(r'title="([+-][\d.]+)"', page)]
    words = [value for words in found.sentences for _, value in words]
    assert adds == pytest.approx(words, abs=1e-4)
    assert sum(adds) == pytest.approx(output - baseline, abs=1e-3 + 1e-4 * len(adds))
    assert "within the tolerance of 0.001" in ended.out
    assert ("from the first sentence to the second" in seen.text) == (is_pair and "pair" not in RUNS[kind])
    assert seen.text.count("which the encoder reads on its own") == (
        2 if is_pair and "pair" in RUNS[kind] else 0
    )


@pytest.mark.parametrize(("kind", "sequences"), [("sst", 1), ("concat", 1), ("siamese", 2)])
def test_the_page_holds_the_weights_of_every_token_layer_and_head(
    kind: str, sequences: int, finished, tmp_path: Path
) -> None:
    texts = [ONE] if kind == "sst" else [ONE, OTHER]
    page, _ = page_of(finished(kind), tmp_path, "--text", ONE, *(["--pair", OTHER] if texts[1:] else []))
    sections = [attributes for tag, attributes in Seen(page).tags if tag == "section"]
    found = explain(finished(kind), None, texts, count=0)
    assert len(sections) == len(found.sequences) == sequences
    for section, read in zip(sections, found.sequences, strict=True):
        count = len(read.tokens)
        shape = (TINY.num_hidden_layers, TINY.num_attention_heads, count, count)
        weights = np.frombuffer(base64.b64decode(section["data-weights"]), np.uint8).reshape(shape) / 255
        np.testing.assert_allclose(weights, read.attention, atol=0.51 / 255)
        np.testing.assert_allclose(read.attention.sum(-1), 1, atol=1e-5)
        assert [read.tokens[0], read.tokens[-1]] == ["[CLS]", "[SEP]"]


def test_pieces_are_put_together_and_their_attributions_summed(finished) -> None:
    (read,) = explain(finished("sst"), None, [ONE], count=0).sequences
    words = read.words(0)
    assert [word for word, _ in words] == ["the", "film", "is", "not", "good", ",", "unaffable"]
    of_last = {"u", *(f"##{letter}" for letter in "nafble")}
    pieces = [i for i, token in enumerate(read.tokens) if token in of_last]
    assert words[-1][1] == pytest.approx(sum(read.attributions[pieces]), abs=1e-9)
    assert sum(value for _, value in words) == pytest.approx(read.attributions.sum(), abs=1e-9)


def test_words_of_two_sentences_do_not_run_together() -> None:
    tokens = ("[CLS]", "a", "##b", "[SEP]", "##c", "d", "[SEP]")
    frame = tuple(token in ("[CLS]", "[SEP]") for token in tokens)
    read = Read(tokens, (0, 0, 0, 0, 1, 1, 1), frame, np.array([0, 1, 2, 0, 4, 8, 0.0]), np.zeros(()))
    assert read.words(0) == [("ab", 3)]
    assert read.words(1) == [("##c", 4), ("d", 8)]


def test_of_one_sentence_the_nearest_are_those_of_its_vectors_by_the_embedding(
    finished, small_data: Path
) -> None:
    rows = train_rows(small_data, "ids-sst-train.csv")
    found = explain(finished("sst"), None, [ONE], count=5).neighbours
    encoder = Encoder.load(finished("sst"))
    cosines = (
        encoder.encode([text for (text,) in rows], normalize=True) @ encoder.encode([ONE], normalize=True)[0]
    )
    assert [cosine for _, cosine in found.examples] == pytest.approx(sorted(cosines)[:-6:-1], abs=1e-5)
    for example, cosine in found.examples:
        assert cosine == pytest.approx(cosines[list(rows).index(example.texts)], abs=1e-5)
        assert example.label in rows[example.texts]
    assert (found.read, found.total) == (24, 24)


def test_of_siamese_pairs_the_nearest_are_so_in_the_mean_of_both_sides(finished, small_data: Path) -> None:
    rows = train_rows(small_data, "sts-train.csv")
    found = explain(finished("siamese"), None, [ONE, OTHER], count=3).neighbours
    encoder = Encoder.load(finished("siamese"))
    sides = [encoder.encode([pair[i] for pair in rows], normalize=True) for i in (0, 1)]
    own = encoder.encode([ONE, OTHER], normalize=True)
    cosines = (sides[0] @ own[0] + sides[1] @ own[1]) / 2
    assert [cosine for _, cosine in found.examples] == pytest.approx(sorted(cosines)[:-4:-1], abs=1e-5)
    assert all(example.label in rows[example.texts] for example, _ in found.examples)


def test_of_concatenated_pairs_the_nearest_are_those_of_transformers_vectors(
    finished, tiny: Path, small_data: Path
) -> None:
    rows = train_rows(small_data, "quora-train.csv")
    found = explain(finished("frozen"), None, [ONE, OTHER], count=24).neighbours
    bert = transformers.BertModel.from_pretrained(tiny).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))
    vectors = []
    for pair in [*rows, (ONE, OTHER)]:
        encoded = tokenizer(*pair, return_tensors="pt", return_token_type_ids=True)
        with torch.no_grad():
            vectors.append(bert(**encoded).last_hidden_state[0, 0].numpy())
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    cosines = np.array(units[:-1]) @ units[-1]
    for example, cosine in found.examples:
        assert cosine == pytest.approx(cosines[list(rows).index(example.texts)], abs=1e-5)
    assert [cosine for _, cosine in found.examples] == sorted(
        (one for _, one in found.examples), reverse=True
    )


def test_a_training_example_is_its_own_nearest(finished, small_data: Path, tmp_path: Path) -> None:
    (text,), labels = list(train_rows(small_data, "ids-sst-train.csv").items())[7]
    page, _ = page_of(finished("sst"), tmp_path, "--text", text)
    first = page[page.index("Nearest training examples") :]
    row = re.search(r"<tr><td[^>]*>([\d.]+)</td><td[^>]*>(\d)</td><td>([^<]*)</td></tr>", first)
    assert (row[1], float(row[2]) in labels, row[3]) == ("1.0000", True, text)


def test_of_many_training_examples_the_same_ones_are_drawn_each_time() -> None:
    many = [Example(str(i), (str(i),), 0) for i in range(50)]
    assert drawn(many, 50) == many
    assert drawn(many, 10) == drawn(many, 10)
    assert len({one.id for one in drawn(many, 10)}) == 10


def test_hostile_text_stays_text(finished, tmp_path: Path) -> None:
    page, _ = page_of(finished("concat"), tmp_path, "--text", HOSTILE, "--pair", f"{HOSTILE} x")
    seen = Seen(page)
    tags = Counter(tag for tag, _ in seen.tags)
    assert tags["script"] == 1
    assert tags["img"] == tags["b"] == tags["a"] == 0
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert f"“{HOSTILE}”" in seen.text


def test_the_page_needs_no_other_file(finished, tmp_path: Path) -> None:
    page, _ = page_of(finished("sst"), tmp_path, "--text", ONE)
    assert not [v for _, attributes in Seen(page).tags for v in attributes.keys() & {"src", "href", "action"}]
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(|fetch\(|https?:", page)


def test_the_same_example_makes_the_same_page_and_leaves_the_run_as_it_was(finished, tmp_path: Path) -> None:
    run = finished("siamese")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    pages = [page_of(run, tmp_path, "--text", ONE, "--pair", OTHER)[0] for _ in range(2)]
    assert pages[0] == pages[1]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("kind", "texts", "tokens", "kept"),
    [("sst", ["the cat " * 20], 40, 30), ("concat", ["dog " * 40, "cat " * 9], 49, 29),
     ("siamese", ["dog " * 40, "cat " * 9], 49, 39)],
)  # fmt: skip
def test_what_is_longer_than_the_runs_limit_is_cut_and_said_to_be(
    kind: str, texts: list[str], tokens: int, kept: int, finished, tmp_path: Path
) -> None:
    page, ended = page_of(
        finished(kind), tmp_path, "--text", texts[0], *(f"--pair={text}" for text in texts[1:])
    )
    told = f"Cut to the run's 32 tokens: of {tokens} of the text {kept} are read."
    assert ended.line == told
    assert told in Seen(page).text
    found: Explanation = explain(finished(kind), None, texts, count=0)
    assert sum(len(words) for words in found.sentences) == kept
    whole, _ = page_of(finished(kind), tmp_path, "--text", ONE, *(["--pair", OTHER] if texts[1:] else []))
    assert "Cut to" not in Seen(whole).text


def test_attributions_that_are_not_complete_are_said_not_to_be(finished, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("experiments.attribution.TOLERANCE", 0)
    monkeypatch.setattr("experiments.attribution.attribute_example.__defaults__", (1e-12, 1024))
    page, ended = page_of(finished("siamese"), tmp_path, "--text", ONE, "--pair", OTHER, "--nearest", 0)
    assert "This is NOT within the tolerance of 1e-12, and more steps are not tried." in Seen(page).text
    assert "1024 steps" in ended.out
    assert "NOT within" in ended.out


def test_without_neighbours_the_data_is_not_read(finished, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("experiments.explanation.find_neighbours", None)
    page, _ = page_of(finished("sst"), tmp_path, "--text", ONE, "--nearest", 0)
    assert "Nearest" not in page


def test_neighbours_that_cannot_be_had_are_left_out_with_the_reason(
    finished, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    arguments = flags(tiny, data, out=tmp_path / "run", task="sst", method="lora", max_steps=1)
    assert call(train.main, *arguments).code == 0
    (data / "ids-sst-train.csv").unlink()
    page, _ = page_of(tmp_path / "run", tmp_path, "--text", ONE)
    assert f"Left out: {data}: there is no ids-sst-train.csv any more" in Seen(page).text
    page, _ = page_of(finished("siamese") / "adapter", tmp_path, "--text", ONE, "--pair", OTHER)
    assert "an adapter folder does not say what it was trained on" in Seen(page).text


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        (None, [], "the following arguments are required: RUN, --text"),
        (None, ["no/such/run", "--text", "a"], "no/such/run/config.json: cannot be read"),
        ("sst", [], "the following arguments are required: --text"),
        ("sst", ["--text", " "], "--text: expected 1 for sst (sentence), got an empty one"),
        ("sst", ["--text", "caf\udce9"], "--text: expected UTF-8, got 'caf"),
        ("sst", ["--text", "a", "--pair", "b"], "--pair: expected none, sst is a task of one sentence"),
        ("sst", ["--text", "a", "--task", "qqp"], "--task: expected one of the run's tasks, sst; got 'qqp'"),
        ("sst", ["--text", "a", "--nearest", "-1"], "--nearest: expected a whole number of at least 0"),
        ("sst", ["--text", "a", "--out", "page.txt"], "--out: expected a file that ends in .html"),
        ("sst", ["--text", "a", "--out", "no/page.html"], "--out: no/page.html cannot be written ("),
        ("concat", ["--text", "a"], "--pair: expected the second sentence, sts is a task of pairs; got none"),
        ("concat", ["--text", "a", "--pair", ""], "--text: expected 2 for sts (sentence1 and sentence2)"),
        ("several", ["--text", "a"], "--task: expected one of the run's tasks, sst, sts; got none"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_the_old_page(
    kind: str | None, arguments: list[str], says: str, finished, tmp_path: Path, monkeypatch
) -> None:
    run = [finished(kind)] if kind else []
    monkeypatch.chdir(tmp_path)
    Path("explanation.html").write_text("old")
    ended = call(main, *run, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.line
    assert [path.name for path in tmp_path.iterdir()] == ["explanation.html"]
    assert Path("explanation.html").read_text() == "old"


def test_a_run_that_is_not_finished_or_was_changed_is_refused(finished, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished("sst"), tmp_path / "run"))
    other = finished("several") / "head.safetensors"
    shutil.copy(other, run / "head.safetensors")
    assert "head.safetensors: does not fit" in call(main, run, "--text", "a").line
    (run / "result.json").unlink()
    assert f"{run}: the run is not finished; train.py --resume" in call(main, run, "--text", "a").line


def test_tokens_and_their_number_are_those_of_the_ids(tiny: Path) -> None:
    tokenizer = Tokenizer(tiny, 6, TINY.vocab_size)
    (encoded,) = tokenizer(["The cat: unaffable 日"])
    assert tokenizer.tokens(encoded.input_ids) == ["[CLS]", "the", "cat", ":", "u", "[SEP]"]
    assert tokenizer.count("The cat: unaffable 日") == 13
    assert tokenizer.count("") == 0
