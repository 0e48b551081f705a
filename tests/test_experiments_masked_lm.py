"""The loss of filling in words, against transformers' BertForMaskedLM on a tiny random checkpoint."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hostile import hostile, read_or_refused, safetensors_files
from hypothesis import given
from safetensors.torch import load_file, save_file
from tiny_bert import TINY

from experiments.masked_lm import Masked, drift, losses, mask, read_masked_head, sentences
from minibert.tokenizer import Tokenizer
from minibert.weights import load_bert

transformers = pytest.importorskip("transformers")


def build_masked(tiny: Path, folder: Path, tied: bool = True) -> Path:
    """A checkpoint that transformers wrote, encoder and head random."""
    shutil.copytree(tiny, folder)
    settings = {name: value for name, value in vars(TINY).items() if name != "layer_norm_eps"}
    config = transformers.BertConfig(**settings, layer_norm_eps=1e-7, tie_word_embeddings=tied)
    torch.manual_seed(5)
    model = transformers.BertForMaskedLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own decoder"])
def masked_model(request, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_masked(tiny, tmp_path_factory.mktemp("masked") / "model", request.param)


def theirs(model, masked: list[Masked]) -> list[float]:
    """Each sentence on its own."""
    sums = []
    for one in masked:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.input_ids])).logits[0, list(one.places)]
        sums.append(F.cross_entropy(logits, torch.tensor(one.words), reduction="sum").item())
    return sums


def change(file: Path, edit: Callable[[dict], None]) -> None:
    state = load_file(file)
    edit(state)
    save_file(state, file, {"format": "pt"})


def masked_texts(folder: Path) -> list[Masked]:
    texts = ["the film is not good", "a cat", "what is a dog, how is a bad cat not good " * 3]
    return mask(texts, Tokenizer(folder, 64, TINY.vocab_size))


def test_the_losses_are_transformers(masked_model: Path):
    masked = masked_texts(masked_model)
    model = transformers.BertForMaskedLM.from_pretrained(masked_model).eval()
    got = losses(load_bert(masked_model).eval(), read_masked_head(masked_model), masked)
    assert got.tolist() == pytest.approx(theirs(model, masked), rel=1e-4)


def test_a_tied_head_reads_the_words_that_training_moved(tiny: Path, tmp_path: Path):
    folder = build_masked(tiny, tmp_path / "tied")
    head, bert = read_masked_head(folder), load_bert(folder).eval()
    model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
    moved = 1.5 * bert.embeddings.word_embeddings.weight.detach()
    bert.embeddings.word_embeddings.weight.data = moved
    model.bert.embeddings.word_embeddings.weight.data.copy_(moved)
    masked = masked_texts(folder)
    assert losses(bert, head, masked).tolist() == pytest.approx(theirs(model, masked), rel=1e-4)


def test_old_names_are_read(masked_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(masked_model, tmp_path / "old"))

    def to_old(state: dict) -> None:
        for name in list(state):
            if "transform.LayerNorm" in name:
                old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
                state[old.replace("LayerNorm.bias", "LayerNorm.beta")] = state.pop(name)

    change(folder / "model.safetensors", to_old)
    masked = masked_texts(folder)
    both = [losses(load_bert(one).eval(), read_masked_head(one), masked) for one in (folder, masked_model)]
    assert (both[0] == both[1]).all()


def test_a_checkpoint_without_a_head_has_none(tiny: Path):
    assert read_masked_head(tiny) is None


def test_half_a_head_is_refused(masked_model: Path, tmp_path: Path, refusal):
    folder = Path(shutil.copytree(masked_model, tmp_path / "half"))
    change(folder / "model.safetensors", lambda state: state.pop("cls.predictions.transform.dense.bias"))
    assert "missing 'transform.dense.bias'" in refusal(read_masked_head, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_any_file_of_weights_is_read_or_refused_in_a_line(masked_model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(masked_model, tmp_path / "any"))
    file = folder / "model.safetensors"

    @hostile
    @given(safetensors_files(file.read_bytes()))
    def read(content: bytes) -> None:
        file.write_bytes(content)
        head = read_or_refused(lambda: read_masked_head(folder))
        assert head is None or head.logits(load_bert(masked_model), torch.ones(1, 32)).shape == (
            1,
            TINY.vocab_size,
        )

    read()


def test_a_share_of_the_tokens_is_masked_and_always_the_same(tiny: Path):
    tokenizer = Tokenizer(tiny, 64, TINY.vocab_size)
    text = "the film is not good and what is a bad dog"
    whole = tokenizer([text])[0].input_ids
    first, again = (mask([text, "a"], tokenizer) for _ in range(2))
    assert first == again
    one, single = first
    assert len(one.places) == round(0.15 * (len(whole) - 2))
    assert [one.input_ids[place] for place in one.places] == [tokenizer.id_of("[MASK]")] * len(one.places)
    rest = [i for i in range(len(whole)) if i not in one.places]
    assert [one.input_ids[i] for i in rest] == [whole[i] for i in rest]
    assert one.words == tuple(whole[place] for place in one.places)
    assert 0 not in one.places
    assert len(whole) - 1 not in one.places
    assert len(single.places) == 1


def test_the_sentences_are_those_of_all_dev_files():
    texts = sentences()
    assert len(texts) == 150 + 2 * 148 + 2 * 144
    assert all(texts)


def test_the_drift_and_its_error_by_hand():
    before, after, counts = (np.array(one, float) for one in ([4, 2, 6], [5, 2, 9], [2, 1, 3]))
    got = drift(before, after, counts)
    assert (got.before, got.after, got.change) == pytest.approx((2.0, 16 / 6, 4 / 6))
    apart = np.array([1, 0, 3]) - 4 / 6 * counts
    assert got.error == pytest.approx(np.sqrt((apart**2).sum() * 3 / 2) / 6)
    assert got.tokens == 6


def test_the_error_is_the_spread_over_many_draws_of_sentences():
    chance = np.random.default_rng(1)
    counts = chance.integers(1, 6, 400)
    change = 0.3 * counts + chance.normal(size=400) * counts
    told = drift(np.zeros(400), change, counts).error
    draws = chance.integers(0, 400, (2000, 400))
    spread = (change[draws].sum(axis=1) / counts[draws].sum(axis=1)).std()
    assert told == pytest.approx(spread, rel=0.1)
