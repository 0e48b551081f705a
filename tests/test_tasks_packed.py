"""Token ids that are kept on disk are those that the tokenizer would make, or are not used."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import TINY

from minibert.tokenizer import Tokenizer
from tasks import packed
from tasks.packed import PackedTexts, encode_or_recall, key

TEXTS = ["the cat is good", "a zebra", "what", "how is the dog ?"]
PAIRS = [("the cat", "a dog is not good"), ("a", "what is"), ("how", "how")]


class Counting(Tokenizer):
    """Says how often it was asked."""

    asked = 0

    def __call__(self, texts):
        self.asked += 1
        return super().__call__(texts)


@pytest.fixture
def tokenizer(tiny: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(packed, "LEAST", 2)
    return Counting(tiny, 64, TINY.vocab_size)


def files(own_cache: Path) -> list[Path]:
    return sorted(own_cache.glob("tokens/*"))


def assert_same(one: PackedTexts, other: PackedTexts) -> None:
    for name in ("ends", "input_ids", "token_type_ids"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.dtype == right.dtype
        assert np.array_equal(left, right)


@pytest.mark.parametrize("texts", [TEXTS, PAIRS], ids=["sentences", "pairs"])
def test_the_second_time_they_are_read_and_are_the_same(texts: list, tokenizer: Counting, own_cache: Path):
    made = PackedTexts.encode(texts, tokenizer)
    for asked in (2, 2):  # once above, once where there is nothing yet
        assert_same(encode_or_recall(texts, tokenizer), made)
        assert tokenizer.asked == asked
    assert [file.name for file in files(own_cache)] == [f"{key(texts, tokenizer)}.safetensors"]


def test_another_version_of_this_project_makes_its_own(tokenizer: Counting, monkeypatch: pytest.MonkeyPatch):
    before = key(TEXTS, tokenizer)
    monkeypatch.setattr(packed, "VERSION", packed.VERSION + 1)
    assert key(TEXTS, tokenizer) != before


def test_few_texts_leave_no_file(tokenizer: Counting, own_cache: Path):
    assert_same(encode_or_recall(TEXTS[:1], tokenizer), PackedTexts.encode(TEXTS[:1], tokenizer))
    assert files(own_cache) == []


def test_whatever_decides_the_tokens_decides_the_key(tiny: Path):
    one = Tokenizer(tiny, 64, TINY.vocab_size)
    other = Tokenizer(tiny, 64, TINY.vocab_size)
    keys = {
        key(texts, one) for texts in (["a b", "c"], ["a", "b c"], ["a b c"], [("a b", "c")], ["c", "a b"])
    }
    assert len(keys) == 5
    assert key(TEXTS, other) == key(TEXTS, one)
    other.max_length = 63
    assert key(TEXTS, other) != key(TEXTS, one)


def test_another_tokenizer_has_another_identity(tiny: Path, tmp_path: Path):
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    text = (tiny / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    one, same, other = (Tokenizer(folder, 64, TINY.vocab_size) for folder in (tiny, tiny, tmp_path))
    assert one.identity == same.identity != other.identity


@given(data=st.data())
def test_a_damaged_file_is_made_anew(
    data: st.DataObject, tiny: Path, tmp_path_factory: pytest.TempPathFactory
):
    tokenizer = Tokenizer(tiny, 64, TINY.vocab_size)
    made = PackedTexts.encode(PAIRS, tokenizer)
    path = tmp_path_factory.mktemp("kept") / "kept.safetensors"
    packed.keep(made, path)
    assert_same(packed.recall(path, len(PAIRS)), made)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans(), label="cut"):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = packed.recall(path, len(PAIRS))
    if found is not None:  # the flip was in what safetensors does not read: its padding, its own metadata
        assert_same(found, made)


def test_a_damaged_file_is_replaced_by_a_whole_one(tokenizer: Counting, own_cache: Path):
    made = encode_or_recall(TEXTS, tokenizer)
    [path] = files(own_cache)
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole[:-9] + b"\x01" + whole[-8:]):
        path.write_bytes(content)
        assert_same(encode_or_recall(TEXTS, tokenizer), made)
        assert path.read_bytes() == whole


def test_the_tokens_of_another_number_of_texts_are_not_taken(tokenizer: Counting, own_cache: Path):
    encode_or_recall(TEXTS, tokenizer)
    [path] = files(own_cache)
    path.rename(path.with_stem(key(PAIRS, tokenizer)))
    assert_same(encode_or_recall(PAIRS, tokenizer), PackedTexts.encode(PAIRS, tokenizer))


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tokenizer: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path / "file"))
    assert_same(encode_or_recall(TEXTS, tokenizer), PackedTexts.encode(TEXTS, tokenizer))


def test_those_used_last_are_kept(tokenizer: Counting, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed, "MOST_FILES", 2)
    sets = [[text, text] for text in TEXTS]
    (own_cache / "tokens").mkdir(parents=True)
    (own_cache / "tokens" / ".half.safetensors.1").touch()  # of a process that was killed
    os.utime(own_cache / "tokens" / ".half.safetensors.1", (0, 0))
    for age, texts in ((30, sets[0]), (20, sets[1])):
        encode_or_recall(texts, tokenizer)
        path = own_cache / "tokens" / f"{key(texts, tokenizer)}.safetensors"
        os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    encode_or_recall(sets[0], tokenizer)  # used again: now the younger one
    encode_or_recall(sets[2], tokenizer)
    assert {file.stem for file in files(own_cache)} == {key(sets[i], tokenizer) for i in (0, 2)}
    assert {file.name for file in (own_cache / "tokens").iterdir()} == {one.name for one in files(own_cache)}
