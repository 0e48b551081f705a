"""Checkpoints of before safetensors and tokenizer.json: pytorch_model.bin and vocab.txt."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from fake_hub import CONTENT, git_id
from safetensors.torch import load_file
from small_runs import call, flags
from tiny_bert import TINY, VOCABULARY

import predict
import train
from minibert.files import read_pickled
from minibert.hub import resolve, same_weights
from minibert.tokenizer import Tokenizer
from minibert.verify import sha256
from minibert.weights import load_bert, read_checkpoint

TEXTS = ["The CAT is not good", "Café naïve 日本語", "[SEP] x ##a", "", ("A film?", "What")]
SETTINGS = {
    "lower": {"do_lower_case": True},
    "cased": {"do_lower_case": False},
    "accents stay": {"do_lower_case": True, "strip_accents": False},
    "Chinese as words": {"do_lower_case": False, "tokenize_chinese_chars": False, "strip_accents": True},
}


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint as it would have been published in 2019, keeping capitals."""
    folder = tmp_path / "older"
    folder.mkdir()
    shutil.copyfile(tiny / "config.json", folder / "config.json")
    state = {f"bert.{name}": tensor for name, tensor in load_file(tiny / "model.safetensors").items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    tokens = [token.replace("cat", "CAT").replace("dog", "é") for token in VOCABULARY]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    return folder


def theirs(tokenizer: transformers.PreTrainedTokenizerBase, text: str | tuple[str, str]) -> tuple:
    sides = (text,) if isinstance(text, str) else text
    encoded = tokenizer(*sides, split_special_tokens=True, return_token_type_ids=True)
    return encoded["input_ids"], encoded["token_type_ids"]


class TestPickled:
    @pytest.mark.parametrize("zipped", [True, False])
    def test_the_tensors_are_those_of_safetensors_and_a_line_says_what_is_safer(
        self, tiny: Path, folder: Path, zipped: bool, caplog: pytest.LogCaptureFixture
    ):
        path = folder / "pytorch_model.bin"
        if zipped:
            torch.save(load_file(tiny / "model.safetensors"), path)
        expected, state = load_bert(tiny).state_dict(), load_bert(folder).state_dict()
        load_bert(folder)
        assert expected.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in expected.items())
        said = f"{path}: a pickle, of which only tensors are read; model.safetensors would be safer"
        assert caplog.messages == [said]

    def test_nothing_in_a_file_is_run(self, refusal, tmp_path: Path):
        path, made = tmp_path / "x.bin", tmp_path / "made"
        path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(made).encode())
        assert "expected a whole file of tensors alone" in refusal(read_pickled, path)
        assert not made.exists()

    @pytest.mark.parametrize(
        "content",
        [
            {"a": 1}, [torch.zeros(2)], {1: torch.zeros(2)}, {"state_dict": {"a": torch.zeros(2)}},
            {"a": torch.zeros(2, device="meta")}, {"a": torch.zeros(2).to_sparse()}, torch.zeros(2),
            {"a": torch.zeros(1).expand(10**6, 10**7)},  # 40 TB, if it were whole
        ],
        ids=repr,
    )  # fmt: skip
    def test_what_is_no_tensor_by_name_is_refused(self, refusal, tmp_path: Path, content: object):
        torch.save(content, tmp_path / "x.bin")
        assert refusal(read_pickled, tmp_path / "x.bin").endswith(
            "expected whole tensors by name, got something else"
        )

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_damaged_file_is_refused(self, refusal, tmp_path: Path, zipped: bool):
        path = tmp_path / "x.bin"
        torch.save({"a": torch.ones(9)}, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for end in range(0, len(whole), 41):
            path.write_bytes(whole[:end])
            assert refusal(read_pickled, path).startswith(f"{path}: expected a whole file of tensors")
        assert "cannot be read" in refusal(read_pickled, tmp_path / "none")

    def test_two_names_for_one_memory_are_two_weights(self, tmp_path: Path):
        one = torch.ones(3)
        torch.save({"a": one, "b": one, "c": torch.ones(2, 3).mT}, tmp_path / "x.bin")
        state = read_pickled(tmp_path / "x.bin")
        assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == 3
        assert state["c"].is_contiguous()


class TestVocabulary:
    @pytest.mark.parametrize("name", SETTINGS)
    def test_texts_are_read_as_by_transformers(self, folder: Path, tmp_path: Path, name: str):
        (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS[name]))
        fast = transformers.BertTokenizer.from_pretrained(folder, **SETTINGS[name])
        ours = Tokenizer(folder, 64, TINY.vocab_size)
        assert ours(TEXTS) == [theirs(fast, text) for text in TEXTS]
        ours.save(tmp_path)
        shutil.copyfile(folder / "config.json", tmp_path / "config.json")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours(TEXTS) == [theirs(again, text) for text in TEXTS]
        assert ours(TEXTS) == Tokenizer(tmp_path, 64, TINY.vocab_size)(TEXTS)

    def test_without_settings_it_is_lower_case_unless_there_are_capitals(self, refusal, folder: Path):
        where = folder / "tokenizer_config.json"
        where.unlink()
        message = refusal(Tokenizer, folder, 64, TINY.vocab_size)
        assert message == f"{where}: expected do_lower_case, as vocab.txt has capitals: 'CAT'"
        (folder / "vocab.txt").write_text("\r\n".join(VOCABULARY), newline="")
        assert Tokenizer(folder, 64, TINY.vocab_size)(["The CAT"])[0].input_ids == [2, 5, 14, 3]

    @pytest.mark.parametrize(
        ("raw", "problem"),
        [
            (
                {"tokenizer_class": "BertJapaneseTokenizer"},
                "BERT's own tokenizer, got 'BertJapaneseTokenizer'",
            ),
            ({"do_basic_tokenize": False}, "BERT's own tokenizer, got do_basic_tokenize false"),
            ({"do_lower_case": "no"}, "expected do_lower_case true or false, got 'no'"),
            ({"strip_accents": 1}, "expected strip_accents true or false, got 1"),
        ],
    )
    def test_other_settings_are_refused(self, refusal, folder: Path, raw: dict, problem: str):
        (folder / "tokenizer_config.json").write_text(json.dumps(raw))
        assert problem in refusal(Tokenizer, folder, 64, TINY.vocab_size)

    def test_another_vocabulary_is_refused(self, refusal, folder: Path):
        (folder / "vocab.txt").write_text("[PAD]\n[CLS]\n[UNK]\nthe\n")
        assert refusal(Tokenizer, folder, 64, 9).endswith("expected BERT's vocabulary, it has no [SEP]")


def test_the_hub_gives_older_files_too_and_their_hashes_are_kept(fake_hub, own_cache: Path):
    fake_hub.files["pytorch_model.bin"] = fake_hub.files.pop("model.safetensors")
    fake_hub.files["vocab.txt"] = fake_hub.files.pop("tokenizer.json")
    fake_hub.files["tokenizer_config.json"] = b"{}"
    fake_hub.published |= {name: git_id(content) for name, content in fake_hub.files.items()}
    folder = resolve("org/tiny")
    record = json.loads((folder / "hashes.json").read_text())["sha256"]
    assert record == {name: sha256(folder / name) for name in fake_hub.files}
    assert sorted(fake_hub.downloads) == sorted(fake_hub.files)
    assert len(record) == len(CONTENT) + 1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_on_older_files_stands_as_any_other(
    folder: Path, small_data: Path, tmp_path: Path, method: str
):
    run = tmp_path / "run"
    ended = call(train.main, *flags(folder, small_data, out=run, method=method, task="sst", max_steps=2))
    assert (ended.code, ended.err) == (0, "")
    assert call(predict.main, run, "--text", "The CAT").code == 0
    made_of = json.loads((run / "result.json").read_text())["sha256"]["model"]
    assert made_of.keys() == {"config.json", "vocab.txt", "tokenizer_config.json", "pytorch_model.bin"}
    if method == "lora":
        card = json.loads((run / "adapter" / "minibert.json").read_text())
        assert card["sha256"] == {"pytorch_model.bin": sha256(folder / "pytorch_model.bin")}
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")  # lower case is its default
        assert tokenizer.tokenize("The CAT é") == ["[UNK]", "CAT", "é"]
        assert read_checkpoint(run / "model").keys() == read_checkpoint(folder).keys()
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert same_weights(str(folder), str(copy))
