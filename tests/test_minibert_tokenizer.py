import csv
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bert import SPECIAL, TINY, VOCABULARY
from tokenizers import processors
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from minibert.tokenizer import Encoded, Tokenizer

MINILM_VOCAB = 30522
NASTY = [
    "", " ", "\t\r\n", "\x00\x01\x02 a\x7fb\x85\ufffd\ufeff", "\u200b\u200d\u00ad\u2028\u2029\u00a0a\u202eb",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ❤️", "日本語のテキスト 中文字符 한국어 𠀀",
    "АБВГД ελληνικά עברית العربية हिन्दी ไทย", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ ß İstanbul ﷺ ½ ² ①",
    "cafe\u0301 café naïve Ångström", "a\u0300\u0301\u0302" * 50, "\u0301", "\ue000 private",
    "x" * 100, "x" * 101, "x" * 5000, "unaffable " * 3 + "antidisestablishmentarianism",
    "[CLS] [SEP] [MASK] [PAD] [UNK]", "[cls] a[SEP]b ##ing",
    "don't stop!!! (a-b_c) $5.00 #tag @me http://x.y/z?q=1&r=2",
    '"\'`´‘’“”…—', "A\tB\nC\rD\x0bE\x0cF", "<s> </s> &lt; %s {0} \\n",
    "naïve café, " * 5_000,
]  # fmt: skip
LONG, SHORT = NASTY[-1], "A short one."
PAIRS = [
    ("", ""), (SHORT, SHORT), (SHORT, ""), ("", SHORT), (LONG, SHORT), (SHORT, LONG),
    *zip(NASTY[:-1], NASTY[1:-1] + NASTY[:1], strict=True),
]  # fmt: skip
TEXT = st.text(st.sampled_from("abcde .,'é日[]") | st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def fast(minilm: Path) -> transformers.BertTokenizerFast:
    return transformers.BertTokenizerFast(tokenizer_file=str(minilm / "tokenizer.json"))


@pytest.fixture(scope="module")
def slow(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerLegacy:
    """The original tokenizer's algorithm in Python: it shares nothing but the vocabulary."""
    vocab = json.loads((minilm / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n", encoding="utf-8")
    legacy = BertTokenizerLegacy(str(path), split_special_tokens=True)
    legacy._tokenize = partial(legacy._tokenize, split_special_tokens=True)  # which it does not pass on
    return legacy


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(folder: Path, damage: Callable[[dict], object]) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    damage(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def theirs(tokenizer: Callable, texts: list[str] | list[tuple[str, str]], max_length: int) -> list[Encoded]:
    sides = zip(*texts, strict=True) if isinstance(texts[0], tuple) else [texts]
    encoded = tokenizer(
        *map(list, sides),
        truncation="longest_first",
        max_length=max_length,
        return_token_type_ids=True,
        split_special_tokens=True,
    )
    return [Encoded(*both) for both in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)]


class TestParity:
    @pytest.mark.parametrize("max_length", [4, 16, 128, 512])
    @pytest.mark.parametrize("texts", [NASTY, PAIRS], ids=["single", "pairs"])
    def test_nasty_input_is_encoded_as_by_transformers(
        self, minilm: Path, fast, texts: list, max_length: int
    ):
        ours = Tokenizer(minilm, max_length, MINILM_VOCAB)(texts)
        assert ours == theirs(fast, texts, max_length)
        assert max(len(one.input_ids) for one in ours) == max_length

    def test_nasty_input_is_encoded_as_by_the_original_algorithm(self, minilm: Path, slow):
        """Not so truncation: of two sides cut alike, that one gives the odd token to the first."""
        texts = NASTY[:-1]
        pairs = list(product(texts[:8], texts[5:12]))
        assert Tokenizer(minilm, 512, MINILM_VOCAB)(texts) == theirs(slow, texts, 512)
        assert Tokenizer(minilm, 512, MINILM_VOCAB)(pairs) == theirs(slow, pairs, 512)

    @given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), max_length=st.integers(4, 30))
    @settings(max_examples=60, deadline=None)
    def test_any_pair_is_encoded_as_by_transformers(self, tiny: Path, texts: list, max_length: int):
        fast = transformers.BertTokenizerFast(tokenizer_file=str(tiny / "tokenizer.json"))
        assert Tokenizer(tiny, max_length, TINY.vocab_size)(texts) == theirs(fast, texts, max_length)

    @pytest.mark.skipif("CS224N_DATA" not in os.environ, reason="needs CS224N_DATA, the course data's folder")
    def test_the_course_data_is_encoded_as_by_transformers(self, minilm: Path, fast):
        files = sorted(Path(os.environ["CS224N_DATA"]).glob("*.csv"))
        assert len(files) == 9
        singles, pairs = [], []
        for path in files:
            with path.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, delimiter="\t"):
                    if "sentence" in row:
                        singles.append(row["sentence"])
                    else:
                        pairs.append((row["sentence1"] or "", row["sentence2"] or ""))
        assert min(len(singles), len(pairs)) > 5000
        tokenizer = Tokenizer(minilm, 48, MINILM_VOCAB)  # short enough to cut some of both kinds
        for texts in (singles, pairs):
            ours = tokenizer(texts)
            assert ours == theirs(fast, texts, 48)
            assert max(len(one.input_ids) for one in ours) == 48


class TestEncoding:
    def test_a_pair_is_two_sentences_of_two_types(self, tiny: Path):
        (one,) = Tokenizer(tiny, 16, TINY.vocab_size)([("the cat", "is good")])
        cls, sep = 2, 3
        the, cat, is_, good = 5, 14, 7, 9
        assert one == Encoded([cls, the, cat, sep, is_, good, sep], [0, 0, 0, 0, 1, 1, 1])

    def test_the_longer_side_is_cut_first(self, tiny: Path):
        long, short = "good " * 20, "bad cat"
        tokenizer = Tokenizer(tiny, 8, TINY.vocab_size)
        first, second = tokenizer([(long, short), (short, long)])
        assert first.input_ids == [2, 9, 9, 9, 3, 10, 14, 3]
        assert second.input_ids == [2, 10, 14, 3, 9, 9, 9, 3]

    @pytest.mark.parametrize("max_length", [4, 16, 128])
    def test_of_two_very_long_sides_the_beginnings_stay(self, minilm: Path, max_length: int):
        """In time and memory that grow with their length, where the library's grow with its square."""
        tokenizer = Tokenizer(minilm, max_length, MINILM_VOCAB)
        assert tokenizer([("word " * 20_000, "café " * 20_000)]) == tokenizer(
            [("word " * 130, "café " * 130)]
        )

    def test_what_the_file_says_of_padding_and_truncation_is_put_aside(self, tiny: Path, folder: Path):
        def pad_and_cut(raw: dict) -> None:
            raw["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "OnlyFirst", "stride": 1}
            raw["padding"] = {
                "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": 4,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
            }  # fmt: skip

        change(folder, pad_and_cut)
        texts = ["good " * 20, "", ("good " * 20, "bad cat")]
        assert Tokenizer(folder, 8, TINY.vocab_size)(texts) == Tokenizer(tiny, 8, TINY.vocab_size)(texts)

    @pytest.mark.parametrize("token", SPECIAL)
    @pytest.mark.parametrize("marked", [True, False])
    def test_a_special_token_in_a_text_is_its_characters(self, folder: Path, token: str, marked: bool):
        change(folder, lambda raw: [one.update(special=marked) for one in raw["added_tokens"]])
        tokenizer = Tokenizer(folder, 32, TINY.vocab_size)
        letters = token[1:-1].lower()
        read = ["good", "[", letters[0], *(f"##{letter}" for letter in letters[1:]), "]", "bad"]
        text = f"good {token} bad"
        one, pair = tokenizer([text, (text, text)])
        assert tokenizer.tokens(one.input_ids) == ["[CLS]", *read, "[SEP]"]
        assert tokenizer.tokens(pair.input_ids) == ["[CLS]", *read, "[SEP]", *read, "[SEP]"]
        assert pair.token_type_ids == [0] * (len(read) + 2) + [1] * (len(read) + 1)
        assert tokenizer.count(text) == len(read)

    def test_a_file_without_a_template_gets_its_models(self, tiny: Path, folder: Path):
        change(folder, lambda raw: raw.update(post_processor=None))
        texts = ["good", ("good", "bad cat")]
        assert Tokenizer(folder, 8, TINY.vocab_size)(texts) == Tokenizer(tiny, 8, TINY.vocab_size)(texts)

    def test_no_texts_are_no_sequences(self, tiny: Path):
        assert Tokenizer(tiny, 8, TINY.vocab_size)([]) == []


def template(single: str, pair: str) -> dict:
    special = [("[CLS]", 2), ("[SEP]", 3)]
    made = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return json.loads(made.__getstate__())


SINGLE, PAIR = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
SECOND = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


class TestRefusing:
    @pytest.mark.parametrize(
        ("own", "got"),
        [
            (template("[CLS] $A", PAIR), "'[CLS] a' of types '0 0'"),
            (template("$A", PAIR), "'a' of types '0'"),
            (SECOND, "'a' of types '0'"),
            (template(SINGLE, "[CLS] $A [SEP] $B [SEP]"), "'[CLS] a [SEP] b [SEP]' of types '0 0 0 0 0'"),
            (template(SINGLE, "[CLS] $A [SEP] [SEP] $B:1 [SEP]:1"), "'[CLS] a [SEP] [SEP] b [SEP]' of types"),
            (template(SINGLE, "[CLS] $B [SEP] $A:1 [SEP]:1"), "'[CLS] b [SEP] a [SEP]' of types '0 0 0 1 1'"),
        ],
    )
    def test_a_template_that_is_not_its_models_is_refused(self, refusal, folder: Path, own: dict, got: str):
        change(folder, lambda raw: raw.update(post_processor=own))
        message = refusal(Tokenizer, folder, 16, TINY.vocab_size)
        assert message.startswith(
            f"{folder / 'tokenizer.json'}: expected its model's template, '[CLS] a [SEP]"
        )
        assert f", got {got}" in message

    @pytest.mark.parametrize("family", ["electra", None, ["bert"]])
    def test_a_family_whose_template_is_not_known_is_refused(self, refusal, folder: Path, family: object):
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        message = (
            f"{folder / 'config.json'}: expected model_type bert, roberta, xlm-roberta or distilbert, got"
        )
        assert refusal(Tokenizer, folder, 16, TINY.vocab_size).startswith(f"{message} {family!r}: ")

    @pytest.mark.parametrize(
        ("model", "problem"),
        [
            (
                {"type": "Unigram", "unk_id": None, "vocab": [[one, -1.0] for one in VOCABULARY]},
                "`unk_id` is",
            ),
            (
                {"type": "BPE", "merges": [], "vocab": {one: i for i, one in enumerate(VOCABULARY)}},
                "got none",
            ),
        ],
    )
    def test_what_cannot_read_every_text_is_refused(self, refusal, folder: Path, model: dict, problem: str):
        change(folder, lambda raw: raw.update(model=model))
        message = refusal(Tokenizer, folder, 16, TINY.vocab_size)
        assert message.startswith(f"{folder / 'tokenizer.json'}: expected a token")
        assert problem in message

    def test_lower_case_by_another_file_is_refused_where_it_matters(self, refusal, tiny: Path, folder: Path):
        (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
        assert Tokenizer(folder, 16, TINY.vocab_size)(["A Cat"]) == Tokenizer(tiny, 16, TINY.vocab_size)(
            ["A Cat"]
        )
        change(folder, lambda raw: raw["normalizer"].update(lowercase=False))
        assert "expected do_lower_case false" in refusal(Tokenizer, folder, 16, TINY.vocab_size)

    def test_what_reads_a_special_token_as_one_is_refused(self, refusal, folder: Path):
        words = {"pre_tokenizer": {"type": "WhitespaceSplit"}, "normalizer": None}
        change(folder, lambda raw: raw.update(words))
        message = refusal(Tokenizer, folder, 16, TINY.vocab_size)
        assert message.endswith("expected to read a text's [CLS] as characters, it is one token")

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", "[CLS]\n[SEP]\n", "\x00\xff"])
    def test_a_file_that_holds_no_object_is_refused(self, refusal, folder: Path, content: str):
        path = folder / "tokenizer.json"
        path.write_text(content, encoding="latin-1")
        assert refusal(Tokenizer, folder, 16, TINY.vocab_size).startswith(f"{path}: expected ")

    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw.clear(),
            lambda raw: raw.pop("model"),
            lambda raw: raw["model"].pop("vocab"),
            lambda raw: raw["model"].update(type="Word2Vec"),
            lambda raw: raw["model"].update(vocab=[]),
            lambda raw: raw["model"]["vocab"].update(x=-1),
            lambda raw: raw["model"]["vocab"].update(x=2**32),
            lambda raw: raw["model"]["vocab"].update(x="1"),
            lambda raw: raw.update(normalizer=5),
            lambda raw: raw.update(added_tokens={}),
            lambda raw: raw.update(version="2.0"),
            lambda raw: raw["model"]["vocab"].pop("[UNK]"),
            lambda raw: raw["model"]["vocab"].clear(),
        ],
    )
    def test_a_damaged_tokenizer_is_refused(self, refusal, folder: Path, damage: Callable):
        change(folder, damage)
        assert refusal(Tokenizer, folder, 16, TINY.vocab_size).startswith(f"{folder / 'tokenizer.json'}: ")

    def test_every_truncation_is_refused(self, refusal, folder: Path):
        path = folder / "tokenizer.json"
        whole = path.read_bytes().rstrip()
        for length in range(0, len(whole), 23):
            path.write_bytes(whole[:length])
            assert refusal(Tokenizer, folder, 16, TINY.vocab_size).startswith(f"{path}: expected JSON")

    def test_a_missing_file_is_named(self, refusal, tmp_path: Path):
        path = tmp_path / "tokenizer.json"
        assert refusal(Tokenizer, tmp_path, 16, TINY.vocab_size).startswith(f"{path}: cannot be read")

    def test_more_tokens_than_the_model_has_are_refused(self, refusal, folder: Path):
        path, most = folder / "tokenizer.json", TINY.vocab_size
        message = f"{path}: has token ids up to {most - 1}, the model's vocab_size is {most - 1}"
        assert refusal(Tokenizer, folder, 16, most - 1) == message
        change(folder, lambda raw: raw["model"]["vocab"].update(one_more=most))
        assert f"has token ids up to {most}" in refusal(Tokenizer, folder, 16, most)

    def test_an_id_beyond_the_model_is_refused_however_few_tokens_there_are(self, refusal, folder: Path):
        change(folder, lambda raw: raw["model"]["vocab"].update(far=5000))
        assert "has token ids up to 5000" in refusal(Tokenizer, folder, 16, 5000)
        Tokenizer(folder, 16, 5001)

    def test_added_tokens_count_too(self, refusal, folder: Path):
        added = {"id": TINY.vocab_size, "content": "<new>", "special": True, "single_word": False,
                 "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip

        def add(raw: dict) -> None:
            vocab = raw["model"][
                "vocab"
            ]  # without a gap: the library gives an added token the id after its number
            vocab.update({f"gap{i}": i for i in {*range(TINY.vocab_size)} - {*vocab.values()}})
            raw["added_tokens"].append(added)

        change(folder, add)
        message = f"has token ids up to {TINY.vocab_size}"
        assert message in refusal(Tokenizer, folder, 16, TINY.vocab_size)
