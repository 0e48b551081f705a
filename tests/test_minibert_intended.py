"""What sentence-transformers' files say of a model, in all forms that its releases wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import build_tiny

from minibert.intended import Choice, read_length, read_pooling, write_intended
from training.embedding import Encoder

TYPE = "sentence_transformers.models."  # release 6 has other paths before the same names
OLD = {
    "word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False,
}  # fmt: skip


def write(folder: Path, pooling: object, modules: object = None, within: str = "1_Pooling") -> Path:
    """The path of the pooling's settings."""
    path = folder / within / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(pooling))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    return path


def listed(**paths: str) -> list[dict]:
    return [{"type": f"{TYPE}{kind}", "path": path} for kind, path in paths.items()]


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        (OLD | {"pooling_mode_mean_tokens": True}, "mean"),
        (OLD | {"pooling_mode_cls_token": True}, "cls"),
        (OLD, "mean"),  # as the library reads it
        ({"embedding_dimension": 32}, "mean"),
    ],
)
def test_both_forms_are_read(settings: dict, pooling: str, tmp_path: Path) -> None:
    write(tmp_path, settings)
    assert read_pooling(tmp_path) == Choice(pooling, "its 1_Pooling/config.json")


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        *(({"pooling_mode": one}, f"{one!r}") for one in ("max", "weightedmean", "lasttoken", "Mean", "", 5)),
        ({"pooling_mode": ["mean", "cls"]}, "['mean', 'cls']"),
        ({"pooling_mode": []}, "[]"),
        (OLD | {"pooling_mode_max_tokens": True}, "['pooling_mode_max_tokens']"),
        (OLD | {"pooling_mode_mean_sqrt_len_tokens": True}, "['pooling_mode_mean_sqrt_len_tokens']"),
        ({"pooling_mode_lasttoken": True}, "['pooling_mode_lasttoken']"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "['mean', 'cls']"),
    ],
)
def test_a_pooling_that_is_not_offered_is_refused(settings: dict, got: str, tmp_path: Path, refusal) -> None:
    message = refusal(read_pooling, tmp_path) if write(tmp_path, settings) else ""
    way_out = "train.py --pooling cls, mean or pooler takes the encoder alone"
    wanted = "expected the pooling mode cls or mean"
    assert message == f"{tmp_path / '1_Pooling/config.json'}: {wanted}, got {got}; {way_out}"


def test_the_pooling_is_where_the_modules_say(tmp_path: Path, refusal) -> None:
    path = write(
        tmp_path, {"pooling_mode": "mean"}, listed(Transformer="", Pooling="2_Own", Normalize="3"), "2_Own"
    )
    assert read_pooling(tmp_path) == Choice("mean", "its 2_Own/config.json")
    path.unlink()
    assert refusal(read_pooling, tmp_path).startswith(f"{path}: expected the pooling that modules.json names")


@pytest.mark.parametrize(
    ("modules", "problem"),
    [
        (
            listed(Transformer="", Pooling="1_Pooling", Dense="2_Dense"),
            "got Transformer, Pooling, Dense; train.py --p",
        ),
        (listed(Transformer=""), "got Transformer; train.py --pooling"),
        ([], "got none; train.py --pooling"),
        ([{"type": 5, "path": ""}], "expected modules, each with a type and a path"),
        ([1], "expected modules, each with a type and a path"),
        ({}, "expected a JSON array, got dict"),
    ],
)
def test_other_modules_are_refused(modules: object, problem: str, tmp_path: Path, refusal) -> None:
    write(tmp_path, {"pooling_mode": "mean"}, modules)
    assert problem in refusal(read_pooling, tmp_path)


def test_the_length_is_read_where_each_release_writes_it(tmp_path: Path, refusal) -> None:
    def say(name: str, **content: object) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    assert (read_pooling(tmp_path), read_length(tmp_path)) == (None, None)
    say("tokenizer_config.json", model_max_length=64)
    assert read_length(tmp_path) is None  # any checkpoint's; what it was pooled from is not known
    write(tmp_path, {"pooling_mode": "mean"})
    assert read_length(tmp_path) == Choice(64, "its tokenizer_config.json")
    say("sentence_bert_config.json", max_seq_length=None)
    assert read_length(tmp_path) == Choice(64, "its tokenizer_config.json")
    say("sentence_bert_config.json", max_seq_length=48)
    assert read_length(tmp_path) == Choice(48, "its sentence_bert_config.json")
    for wrong in ("48", True, 3, 48.0):
        say("sentence_bert_config.json", max_seq_length=wrong)
        assert f"expected max_seq_length to be at least 4 tokens, got {wrong!r}" in refusal(
            read_length, tmp_path
        )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_is_written_is_read(pooling: str, tmp_path: Path) -> None:
    write_intended(pooling, 48, 32, tmp_path)
    assert (read_pooling(tmp_path).value, read_length(tmp_path).value) == (pooling, 48)


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
def test_the_librarys_own_folder_gives_its_vectors_or_is_refused(mode: str, tmp_path: Path, refusal) -> None:
    library, models = map(pytest.importorskip, ("sentence_transformers", "sentence_transformers.models"))
    encoder = models.Transformer(str(build_tiny(tmp_path / "base")), max_seq_length=16)
    model = library.SentenceTransformer(modules=[encoder, models.Pooling(32, mode)], device="cpu")
    model.save(str(tmp_path / "model"))
    if mode not in ("cls", "mean"):
        assert "expected the pooling mode cls or mean" in refusal(Encoder.load, tmp_path / "model")
        return
    texts = ["the cat is good", "what", "a film " * 20]  # the last is cut
    vectors = Encoder.load(tmp_path / "model", "fp32").encode(texts)
    np.testing.assert_allclose(vectors, model.encode(texts), atol=1e-5, rtol=1e-5)
