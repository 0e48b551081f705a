"""Sentence vectors are other libraries', whatever texts stand beside them; the command writes them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from small_runs import Ended, call, finished_runs
from tiny_bert import TINY, WORDS, build_tiny
from tolerances import tolerance

from minibert.errors import InputError
from training import embed
from training.embedding import Encoder

RUNS = {
    "lora": {"method": "lora", "pair": "siamese", "pooling": "mean"},
    "dora cls": {"task": "sst", "method": "dora", "pooling": "cls"},
    "full": {"method": "full", "pair": "siamese", "pooling": "mean", "lr": 0.001},
    "frozen pooler": {"method": "frozen", "pair": "siamese", "pooling": "pooler"},
}
TEXTS = ["the cat is not good", "what", "", "A dog, bad film?", "Café " + "the dog " * 8, "what", "how is it"]
WITHIN = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of RUNS."""
    return finished_runs(tiny, small_data, tmp_path_factory.mktemp("finished"), RUNS, max_steps=3)


@pytest.fixture(scope="module")
def mean_pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as sentence-transformers writes it."""
    folder = build_tiny(tmp_path_factory.mktemp("mean"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return folder


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return file


def by_transformers(model, folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """Each text alone through transformers, its tokens by the tokenizers library."""
    from tokenizers import Tokenizer

    tokenizer, rows = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    tokenizer.no_padding()  # which MiniLM's file asks for
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            out = model.eval()(input_ids=ids)
        hidden = out.last_hidden_state[0]  # [T, H]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "pooler": out.pooler_output[0]}[pooling]
        rows.append(pooled.numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_models_vectors_are_transformers(pooling: str, mean_pooled: Path, tiny: Path) -> None:
    from transformers import BertModel

    folder = mean_pooled if pooling == "mean" else tiny
    vectors = Encoder.load(folder).encode(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), TINY.hidden_size), np.float32)
    expected = by_transformers(BertModel.from_pretrained(folder), folder, TEXTS, pooling)
    np.testing.assert_allclose(vectors, expected, **WITHIN)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("kind", RUNS)
def test_a_runs_vectors_are_those_of_peft_or_transformers(kind: str, finished, tiny: Path) -> None:
    from peft import PeftModel
    from transformers import BertModel

    folder, changes = finished(kind), RUNS[kind]
    base = folder / "model" if changes["method"] == "full" else tiny
    model = BertModel.from_pretrained(base)
    if (folder / "adapter").exists():
        model = PeftModel.from_pretrained(model, folder / "adapter")
        np.testing.assert_array_equal(
            Encoder.load(folder / "adapter").encode(TEXTS), Encoder.load(folder).encode(TEXTS)
        )
    expected = by_transformers(model, tiny, TEXTS, changes["pooling"])
    np.testing.assert_allclose(Encoder.load(folder).encode(TEXTS), expected, **WITHIN)


def test_minilms_vectors_are_those_it_was_published_with(minilm: Path) -> None:
    from transformers import BertModel

    texts = ["A man is playing a guitar.", "It is long, loud and not at all funny.", "Why?"]
    vectors = Encoder.load("all-MiniLM-L6-v2").encode(texts, normalize=True)
    expected = by_transformers(BertModel.from_pretrained(minilm), minilm, texts, "mean")
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-4, rtol=1e-4)


def test_a_text_has_the_same_vector_alone_and_in_any_company(mean_pooled: Path) -> None:
    encoder, chance = Encoder.load(mean_pooled), np.random.default_rng(0)
    texts = [" ".join(chance.choice(WORDS, chance.integers(1, 40))) for _ in range(600)]  # several batches
    vectors, order = encoder.encode(texts), chance.permutation(600)
    np.testing.assert_allclose(encoder.encode([texts[i] for i in order]), vectors[order], **WITHIN)
    for i in (0, 7, 599):
        np.testing.assert_allclose(encoder.encode([texts[i]])[0], vectors[i], **WITHIN)


def test_the_trained_model_alone_gives_the_runs_vectors(finished) -> None:
    run = finished("full")
    alone = Encoder.load(run / "model", "fp32")
    np.testing.assert_allclose(alone.encode(TEXTS), Encoder.load(run, "fp32").encode(TEXTS), **WITHIN)
    assert alone.about.startswith("mean pooling (its 1_Pooling/config.json), at most 32 tokens (its ")


def test_normalized_vectors_have_length_1_and_the_same_direction(mean_pooled: Path) -> None:
    encoder = Encoder.load(mean_pooled)
    plain, normal = encoder.encode(TEXTS), encoder.encode(TEXTS, normalize=True)
    np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, **WITHIN)
    np.testing.assert_allclose(normal * np.linalg.norm(plain, axis=1, keepdims=True), plain, **WITHIN)


def test_a_text_that_is_too_long_is_cut_to_what_the_run_or_the_model_reads(finished, tiny: Path) -> None:
    for folder, length in ((finished("lora"), 32), (tiny, TINY.max_position_embeddings)):
        encoder, longest = Encoder.load(folder), "a " * (length - 2)
        # Each alone: within a batch a library may sum the last rows in another order.
        one, other = (encoder.encode([text])[0] for text in (longest, longest + "b b"))
        np.testing.assert_array_equal(one, other)
        assert not np.array_equal(one, encoder.encode([longest[:-2]])[0])


def test_nothing_gives_no_vectors(tiny: Path) -> None:
    assert Encoder.load(tiny).encode([]).shape == (0, TINY.hidden_size)


@pytest.mark.parametrize(
    ("texts", "got"),
    [("a cat", "got one text"), (["a", None], "got None as number 1"), (["caf\udce9"], "as number 0")],
)
def test_what_is_no_list_of_texts_is_refused(texts: object, got: str, tiny: Path, refusal) -> None:
    message = refusal(Encoder.load(tiny).encode, texts)
    assert message.startswith("texts: expected a list of texts in UTF-8, got ")
    assert got in message


def test_what_has_no_encoder_is_refused(tmp_path: Path, finished, refusal) -> None:
    assert "there is no config.json" in refusal(Encoder.load, tmp_path)
    assert "expected a folder, " in refusal(Encoder.load, "no such/model/x")
    run = Path(shutil.copytree(finished("lora"), tmp_path / "run"))
    (run / "result.json").unlink()
    assert "the run is not finished" in refusal(Encoder.load, run)


# The command


@pytest.mark.parametrize("normalize", [[], ["--normalize"]])
@pytest.mark.parametrize("name", ["vectors.npy", "vectors.safetensors"])
def test_the_command_writes_a_vector_for_each_line(
    name: str, normalize: list[str], finished, lines: Path, tmp_path: Path
) -> None:
    output = tmp_path / name
    ended = call(embed.main, finished("lora"), "--input", lines, "--output", output, *normalize)
    assert ended == Ended(0, f"{output}: {len(TEXTS)} vectors of 32 numbers\n", "")
    vectors = load_file(output)["embeddings"] if name.endswith("safetensors") else read_npy(output)
    expected = Encoder.load(finished("lora")).encode(TEXTS, normalize=bool(normalize))
    np.testing.assert_array_equal(vectors, expected)
    assert vectors.dtype == np.float32


@pytest.mark.parametrize("kind", RUNS)
def test_vectors_come_in_the_precision_that_is_asked_for(
    kind: str, finished, lines: Path, tmp_path: Path
) -> None:
    vectors = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        encoder = Encoder.load(finished(kind), precision)
        assert {p.dtype for p in encoder.model.bert.parameters()} == {dtype}
        assert encoder.model.bert.compute_dtype == dtype
        output = tmp_path / f"{precision}.npy"
        asked = ["--input", lines, "--output", output, "--precision", precision]
        assert call(embed.main, finished(kind), *asked).code == 0
        vectors[precision] = read_npy(output)
        np.testing.assert_array_equal(vectors[precision], encoder.encode(TEXTS))
    assert not np.array_equal(vectors["fp32"], vectors["bf16"])
    np.testing.assert_allclose(vectors["bf16"], vectors["fp32"], **tolerance(torch.bfloat16, "encoder"))


def read_npy(path: Path) -> np.ndarray:
    """By the format's description: magic, version, length of the header, header, numbers."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x93NUMPY\x01\x00"
    start = 10 + int.from_bytes(raw[8:10], "little")
    header = raw[10:start].decode()
    assert "'descr': '<f4', 'fortran_order': False" in header
    return np.frombuffer(raw[start:], np.float32).reshape(
        json.loads(f"[{header.split('(')[1].split(')')[0]}]")
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: RUN, --input, --output"),
        (
            ["run", "--input", "lines.txt", "--output", "v.pt"],
            "--output: expected .npy or .safetensors, got 'v.pt'",
        ),
        (["run", "--input", "none.txt", "--output", "v.npy"], "none.txt: cannot be read (No such file"),
        (
            ["run", "--input", "latin.txt", "--output", "v.npy"],
            "latin.txt:1: expected UTF-8 text, got byte 0xe9",
        ),
        (
            ["run", "--input", "lines.txt", "--output", "no/v.npy"],
            "--output: no/v.npy cannot be written (No such",
        ),
        (["run", "--input", "lines.txt", "--output", "no/v.safetensors"], "cannot be written (No such"),
        (["nowhere", "--input", "lines.txt", "--output", "v.npy"], "got 'nowhere'"),
    ],
)
def test_what_the_command_cannot_do_is_said_in_a_line(
    arguments: list[str], words: str, tiny: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "run")
    Path("latin.txt").write_bytes("café\n".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    ended = call(embed.main, *arguments)
    assert ended.code == 2
    assert words in ended.line
    assert sorted(tmp_path.rglob("*")) == before


def test_line_ends_of_windows_and_a_last_line_without_one_are_read_alike(tiny: Path, tmp_path: Path) -> None:
    for name, text in (
        ("unix", "a cat\na dog\n"),
        ("windows", "a cat\r\na dog\r\n"),
        ("open", "a cat\na dog"),
    ):
        (tmp_path / name).write_bytes(text.encode())
        assert embed.read_lines(tmp_path / name) == ["a cat", "a dog"]
    (tmp_path / "empty").touch()
    assert embed.read_lines(tmp_path / "empty") == []
    with pytest.raises(InputError):
        embed.read_lines(tmp_path)
