"""The BERT family's other architectures: computed, read, trained, saved as transformers does."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import call, flags
from tokenizers import Tokenizer as Rust
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import nn

import predict
import train
from experiments.attribution import framing
from lora import merge
from minibert.family import FAMILIES
from minibert.sequences import Sequences
from minibert.tokenizer import Tokenizer
from minibert.weights import load_bert, save_bert
from tasks import TASKS
from tasks.base import Example
from tasks.data import Dataset
from training.embedding import Encoder
from training.run_folder import load_run

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WORDS = [
    "▁the",
    "▁cat",
    "▁is",
    "▁good",
    "▁not",
    "▁",
    "a",
    "s",
    "<",
    ">",
    "/",
    "un",
    "k",
    "▁film",
    "é",
    "p",
    "d",
]
MODELS = {
    "bert": transformers.BertModel,
    "roberta": transformers.RobertaModel,
    "xlm-roberta": transformers.XLMRobertaModel,
    "distilbert": transformers.DistilBertModel,
}
OTHERS = [name for name in MODELS if name != "bert"]
TEXTS = [
    "the cat is good",
    "the film <s>, not </s> a <mask> cat é 日本",
    "",
    ("the cat", "is not good"),
    ("", "a"),
]
WITHIN = {"atol": 1e-5, "rtol": 1e-5}


def write_model(name: str, folder: Path, vocab_size: int = 80, **sizes: float) -> nn.Module:
    """A random one, as transformers saves it."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    given = small | {"max_position_embeddings": 40} | sizes
    keys = FAMILIES[name].keys
    torch.manual_seed(0)
    kind = MODELS[name]
    model = kind(
        kind.config_class(vocab_size=vocab_size, **{keys.get(key, key): v for key, v in given.items()})
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def write_tokenizer(name: str, folder: Path, template: bool = True) -> None:
    """Of the architecture's kind: Unigram for XLM-R, byte-level BPE for RoBERTa, WordPiece for the rest."""
    if name == "xlm-roberta":
        pieces = [(token, 0.0) for token in SPECIAL] + [(word, -2.0 - len(word) / 9) for word in WORDS]
        made = Rust(models.Unigram(pieces, unk_id=3))
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    elif name == "roberta":
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("o", "o")]
        vocab = [*SPECIAL, *letters, *(a + b for a, b in merges)]
        made = Rust(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        vocab = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "the",
            "cat",
            "is",
            "good",
            "not",
            "<",
            ">",
            "s",
        ]
        made = Rust(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ends = ("</s>", 2), ("<s>", 0)
    if name in ("roberta", "xlm-roberta") and template:
        made.post_processor = processors.RobertaProcessing(*ends)
    elif template:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.add_special_tokens(SPECIAL if name in ("roberta", "xlm-roberta") else vocab[:5])
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An architecture, and a folder of a model of it with its tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    write_model(request.param, folder, vocab_size=300)
    write_tokenizer(request.param, folder)
    return request.param, folder


def texts_of(lengths: list[int], vocab_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids, none of them a padding's, and the sentence that each is of."""
    ids = [torch.randint(3, vocab_size, (length,)) for length in lengths]
    return ids, [(torch.arange(length) > length // 2).long() for length in lengths]


def run_theirs(
    model: nn.Module, name: str, ids: list[torch.Tensor], types: list[torch.Tensor]
) -> torch.Tensor:
    """In one padded rectangle; the hidden states of the real tokens [M, H]."""
    pad = 1 if "roberta" in name else 0
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    inputs = {"input_ids": padded, "attention_mask": mask}
    if name == "bert":
        inputs["token_type_ids"] = nn.utils.rnn.pad_sequence(types, batch_first=True)
    return model(**inputs).last_hidden_state[mask.bool()]


@pytest.mark.parametrize("name", MODELS)
@given(
    lengths=st.lists(st.integers(1, 36), min_size=1, max_size=5),
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    head_size=st.sampled_from([4, 8]),
    types=st.integers(1, 3),
)
@settings(max_examples=8, deadline=None)
def test_hidden_states_and_gradients_are_transformers(
    name: str, lengths: list[int], layers: int, heads: int, head_size: int, types: int, tmp_path_factory
):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": heads * head_size}
    if name != "distilbert":
        sizes |= {"type_vocab_size": max(types, 2) if name == "bert" else types, "layer_norm_eps": 1e-5}
    folder = tmp_path_factory.mktemp("random")
    theirs, ours = write_model(name, folder, **sizes), load_bert(folder)
    ids, sentences = texts_of(lengths, 80)
    expected = run_theirs(theirs, name, ids, sentences)
    hidden = ours.eval()(torch.cat(ids), torch.cat(sentences), Sequences(tuple(lengths)))
    torch.testing.assert_close(hidden, expected, **WITHIN)
    weight = torch.randn_like(expected)
    (expected * weight).mean().backward()
    (hidden * weight).mean().backward()
    family, gradients = ours.config.family, dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        of_theirs = gradients.pop(family.published(key))
        assert (parameter.grad is None) == (of_theirs.grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, of_theirs.grad, **WITHIN)
    assert not gradients


def test_dropout_is_where_transformers_has_it(made: tuple[str, Path]):
    """At a rate of 1 nothing of a dropped branch is left, so there is no chance in it."""
    name, folder = made
    theirs, ours = MODELS[name].from_pretrained(folder).train(), load_bert(folder).train()
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    ids, types = texts_of([5, 9], 300)
    with torch.no_grad():
        hidden = ours(torch.cat(ids), torch.cat(types), Sequences((5, 9)))
        torch.testing.assert_close(hidden, run_theirs(theirs, name, ids, types), **WITHIN)


def test_a_saved_model_is_transformers_again(made: tuple[str, Path], tmp_path: Path):
    name, folder = made
    save_bert(load_bert(folder), tmp_path / "saved")
    theirs, found = transformers.AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert type(theirs) is MODELS[name]
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids, types = texts_of([7, 3], 300)
    expected = run_theirs(MODELS[name].from_pretrained(folder).eval(), name, ids, types)
    assert torch.equal(run_theirs(theirs.eval(), name, ids, types), expected)


@pytest.mark.parametrize("name", MODELS)
def test_defaults_are_transformers(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
    from minibert.weights import read_config

    ours, theirs = read_config(tmp_path), MODELS[name].config_class()
    for key in (
        "vocab_size",
        "max_position_embeddings",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (
            {"model_type": "albert"},
            "expected model_type bert, roberta, xlm-roberta or distilbert, got 'albert'",
        ),
        ({"model_type": "roberta", "pad_token_id": 0}, "expected pad_token_id 1, got 0"),
        ({"model_type": "distilbert", "activation": "relu"}, "expected activation 'gelu', got 'relu'"),
        ({"model_type": "distilbert", "dim": "x"}, "expected dim to be a whole number"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(refusal, tmp_path: Path, raw: dict, problem: str):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert problem in refusal(load_bert, tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_head_is_left_out_with_a_line(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_model(name, tmp_path / "bare")
    kind = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}[
        name
    ]
    whole = getattr(transformers, f"{kind}ForSequenceClassification").from_pretrained(tmp_path / "bare")
    whole.save_pretrained(tmp_path / "whole")
    bare, found = load_bert(tmp_path / "bare").state_dict(), load_bert(tmp_path / "whole").state_dict()
    head = "classifier, pre_classifier" if name == "distilbert" else "classifier"
    assert caplog.messages[-1:] == [f"{tmp_path / 'whole'}: the encoder is taken alone, without {head}"]
    assert found.keys() == {key for key in bare if "roberta" not in name or "pooler" not in key}
    assert all(torch.equal(tensor, bare[key]) for key, tensor in found.items())


class TestTokenizer:
    def theirs(self, name: str, folder: Path, text: str | tuple[str, str]) -> list[int]:
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        sides = (text,) if isinstance(text, str) else text
        return fast(*sides, truncation="longest_first", max_length=16, split_special_tokens=True)["input_ids"]

    def test_texts_are_read_as_by_transformers(self, made: tuple[str, Path], tmp_path: Path):
        name, folder = made
        ours = Tokenizer(folder, 16, 300)
        plain = [text for text in TEXTS if "<s>" not in text or name != "xlm-roberta"]
        assert [one.input_ids for one in ours(plain)] == [self.theirs(name, folder, text) for text in plain]
        ours.save(tmp_path)  # and what is saved reads a special token as text in transformers too
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text, one in zip(TEXTS, ours(TEXTS), strict=True):
            sides = (text,) if isinstance(text, str) else text
            encoded = saved(*sides, truncation="longest_first", max_length=16)
            assert encoded["input_ids"] == one.input_ids
            assert ("token_type_ids" in encoded) == (name == "bert")

    def test_a_special_token_in_a_text_is_its_characters(self, made: tuple[str, Path]):
        name, folder = made
        ours = Tokenizer(folder, 64, 300)
        family = FAMILIES[name]
        ids = ours([" ".join(family.special.values())])[0].input_ids
        special = {ours.id_of(token) for key, token in family.special.items() if key != "unk_token"}
        assert not special & set(ids[1:-1])

    @pytest.mark.parametrize(
        ("name", "pieces"),
        [("roberta", ["t", "##h", "##e", "cat", "##s"]), ("xlm-roberta", ["the", "cat", "##s"])],
    )
    def test_a_piece_that_goes_on_with_a_word_is_marked_as_berts(
        self, name: str, pieces: list, tmp_path: Path
    ):
        write_model(name, tmp_path, vocab_size=300)
        write_tokenizer(name, tmp_path)
        ours = Tokenizer(tmp_path, 64, 300)
        shown = ours.tokens(ours([("the cats", "the cats")])[0].input_ids)
        assert shown == ["<s>", *pieces, "</s>", "</s>", *pieces, "</s>"]

    def test_the_frame_is_known_whatever_the_family(self, made: tuple[str, Path]):
        name, folder = made
        tokenizer = Tokenizer(folder, 64, 300)
        data = Dataset(TASKS["qqp"], [Example("x", ("the cat", "is good"), 0)], tokenizer)
        frame = framing(data, FAMILIES[name]).numpy()
        marks = {tokenizer.id_of(token) for token in FAMILIES[name].special.values()}
        expected = [one in marks for one in data.sides[0].input_ids.tolist()]
        assert frame.tolist() == expected
        assert sum(expected) == (4 if "roberta" in name else 3)

    def test_another_template_is_refused(self, refusal, tmp_path: Path):
        write_model("roberta", tmp_path, vocab_size=300)
        write_tokenizer("roberta", tmp_path)
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        raw["post_processor"] = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert "expected its model's template, '<s> a </s> </s> b </s>'" in refusal(
            Tokenizer, tmp_path, 16, 300
        )


@pytest.mark.parametrize("name", OTHERS)
class TestRuns:
    def test_full_and_lora_leave_what_others_open(self, name: str, small_data: Path, tmp_path: Path):
        base = tmp_path / "base"
        write_model(name, base, vocab_size=300)
        write_tokenizer(name, base, template=False)
        for method in ("full", "dora"):
            run, out = tmp_path / method, tmp_path / f"{method}-out"
            changes = {"task": "sts", "method": method, "pooling": "mean", "max_steps": 3, "max_length": 38}
            ended = call(train.main, *flags(base, small_data, out=run, **changes))
            assert (ended.code, ended.err) == (0, "")
            assert call(predict.main, run, "--text", "the cat", "is good").code == 0
            assert call(merge.main, run, out).code == 0
            config, model, tokenizer = load_run(run)
            encoded = tokenizer([("the cat", "is good")])[0]
            ids, types = torch.tensor(encoded.input_ids), torch.tensor(encoded.token_type_ids)
            with torch.no_grad():
                hidden = model.bert(ids, types, Sequences((len(ids),)))
                opened = [transformers.AutoModel.from_pretrained(out)]
                if method == "full":
                    opened.append(transformers.AutoModel.from_pretrained(run / "model"))
                else:
                    theirs = MODELS[name].from_pretrained(base)
                    opened.append(peft.PeftModel.from_pretrained(theirs, run / "adapter"))
                for one in opened:
                    batch = transformers.AutoTokenizer.from_pretrained(out)(
                        "the cat", "is good", return_tensors="pt"
                    )
                    assert batch["input_ids"][0].tolist() == encoded.input_ids
                    assert isinstance(getattr(one, "base_model", one), (MODELS[name], peft.LoraModel))
                    torch.testing.assert_close(one.eval()(**batch).last_hidden_state[0], hidden, **WITHIN)

    def test_positions_are_the_models_own_number(self, name: str, small_data: Path, tmp_path: Path):
        write_model(name, tmp_path / "base", vocab_size=300)
        write_tokenizer(name, tmp_path / "base")
        most = 40 if name == "distilbert" else 38
        ended = call(
            train.main, *flags(tmp_path / "base", small_data, out=tmp_path / "run", max_length=most + 1)
        )
        assert ended.line.endswith(f"expected at most the model's {most} positions, got {most + 1}")
        vectors = Encoder.load(tmp_path / "base").encode(["the cat " * 99])
        assert np.isfinite(vectors).all()
