import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_bert import TINY, build_tiny
from tolerances import tolerance
from torch import Tensor

from minibert.model import Bert, BertConfig
from minibert.pooling import POOLINGS
from minibert.sequences import Sequences
from minibert.weights import load_bert, read_config, save_bert

QUERY = "encoder.layer.0.attention.self.query.weight"
IDS = torch.tensor([[2, 7, 30, 9, 3], [2, 40, 3, 50, 3]])
TYPES = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def historical(name: str) -> str:
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return f"bert.{name}"


@torch.no_grad()
def outputs(bert: Bert) -> tuple[Tensor, Tensor | None]:
    sequences = Sequences(lengths=(5, 5))
    hidden = bert.eval()(IDS.flatten(), TYPES.flatten(), sequences)
    return hidden.view(2, 5, -1), bert.pooler and POOLINGS["pooler"](bert, hidden, sequences)


@torch.no_grad()
def their_outputs(model: transformers.BertModel) -> tuple[Tensor, Tensor | None]:
    out = model.eval()(input_ids=IDS, token_type_ids=TYPES)
    return out.last_hidden_state, out.pooler_output


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class TestConfig:
    def test_the_published_fields_are_read_and_all_others_ignored(self, folder: Path):
        change_config(folder, vocab_size=300, hidden_dropout_prob=0, layer_norm_eps=1e-6, of_no_interest=[1])
        expected = replace(TINY, vocab_size=300, hidden_dropout_prob=0, layer_norm_eps=1e-6)
        assert read_config(folder) == expected

    def test_a_config_that_names_no_sizes_is_bert_bases_as_in_transformers(self, tmp_path: Path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        theirs = transformers.BertConfig()
        assert asdict(read_config(tmp_path)) == {f.name: getattr(theirs, f.name) for f in fields(BertConfig)}

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("model_type", "electra"),
            ("model_type", None),
            ("model_type", ["bert"]),
            ("hidden_act", "relu"),
            ("hidden_act", "gelu_new"),
            ("position_embedding_type", "relative_key"),
            ("is_decoder", True),
        ],
    )
    def test_another_architecture_is_refused_by_its_key(self, refusal, folder: Path, key: str, value: object):
        change_config(folder, **{key: value})
        message = refusal(load_bert, folder)
        assert message.startswith(f"{folder / 'config.json'}: expected {key}")
        assert f"got {value!r}" in message

    def test_a_config_that_does_not_say_what_it_is_is_refused(self, refusal, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps(asdict(TINY) | {"model_type": None}))
        assert "or distilbert, got None: not a BERT" in refusal(read_config, tmp_path)

    @pytest.mark.parametrize("key", [f.name for f in fields(BertConfig) if f.type is int])
    @pytest.mark.parametrize(
        "value", [0, -1, 1.5, 32.0, True, "32", None, [32], 2**31, 10**400, float("nan")]
    )
    def test_a_size_that_makes_no_sense_is_refused(self, refusal, folder: Path, key: str, value: object):
        change_config(folder, **{key: value})
        message = refusal(load_bert, folder)
        wanted = "a whole number from 1 to 16777216"
        assert message == f"{folder / 'config.json'}: expected {key} to be {wanted}, got {value!r}"

    @pytest.mark.parametrize("key", [f.name for f in fields(BertConfig) if f.type is float])
    @pytest.mark.parametrize("value", [-0.1, 1, 1.0, True, "0.1", None, float("nan"), float("inf"), 10**400])
    def test_a_rate_that_makes_no_sense_is_refused(self, refusal, folder: Path, key: str, value: object):
        change_config(folder, **{key: value})
        message = refusal(load_bert, folder)
        wanted = "a number from 0 up to 1"
        assert message == f"{folder / 'config.json'}: expected {key} to be {wanted}, got {value!r}"

    def test_heads_that_do_not_divide_are_refused(self, refusal, folder: Path):
        change_config(folder, num_attention_heads=5)
        expected = "hidden_size 32 is not a multiple of num_attention_heads 5"
        assert refusal(load_bert, folder) == f"{folder / 'config.json'}: {expected}"

    @pytest.mark.parametrize("content", ["", "[]", "{", "null"])
    def test_a_file_that_holds_no_object_is_refused(self, refusal, folder: Path, content: str):
        (folder / "config.json").write_text(content)
        assert refusal(load_bert, folder).startswith(f"{folder / 'config.json'}: expected ")

    def test_a_missing_file_is_named(self, refusal, folder: Path):
        (folder / "config.json").unlink()
        assert refusal(load_bert, folder).startswith(f"{folder / 'config.json'}: cannot be read")


class TestLoading:
    def test_every_parameter_is_the_files_and_ready_to_train(self, tiny: Path):
        bert = load_bert(tiny)
        assert_equal_states(bert.state_dict(), load_file(tiny / "model.safetensors"))
        assert all(p.requires_grad and p.is_leaf and p.dtype == torch.float32 for p in bert.parameters())

    def test_training_what_was_loaded_does_not_touch_the_file(self, folder: Path):
        before = (folder / "model.safetensors").read_bytes()
        bert = load_bert(folder)
        with torch.no_grad():
            for parameter in bert.parameters():
                parameter.add_(1)
        assert (folder / "model.safetensors").read_bytes() == before

    def test_no_random_number_is_drawn(self, tiny: Path):
        before = torch.random.get_rng_state()
        load_bert(tiny)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_historical_names_are_todays(self, tiny: Path, folder: Path):
        def rename(state: dict[str, Tensor]) -> None:
            old = {historical(name): tensor for name, tensor in state.items()}
            assert sum(name.endswith(("gamma", "beta")) for name in old) == 2 * (
                1 + 2 * TINY.num_hidden_layers
            )
            state.clear()
            state.update(old)
            state["bert.embeddings.position_ids"] = torch.arange(TINY.max_position_embeddings)[None]
            state["cls.predictions.bias"] = torch.zeros(TINY.vocab_size)
            state["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(TINY.hidden_size)
            state["cls.seq_relationship.weight"] = torch.zeros(2, TINY.hidden_size)

        change_weights(folder, rename)
        assert_equal_states(load_bert(folder).state_dict(), load_bert(tiny).state_dict())

    def test_shards_load_as_one_file(self, tiny: Path, folder: Path):
        transformers.AutoModel.from_pretrained(tiny).save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors").unlink()
        shards = sorted(folder.glob("model-*.safetensors"))
        assert len(shards) > 2
        assert (folder / "model.safetensors.index.json").is_file()
        assert_equal_states(load_bert(folder).state_dict(), load_bert(tiny).state_dict())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_checkpoint_of_any_precision_loads_as_fp32(self, folder: Path, dtype: torch.dtype):
        change_weights(folder, lambda state: state.update({n: t.to(dtype) for n, t in state.items()}))
        stored = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {dtype}
        state = load_bert(folder).state_dict()
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        for name, tensor in state.items():
            assert torch.equal(tensor.to(dtype), stored[name]), name  # fp32 holds a half exactly

    def test_without_a_pooler_in_the_file_there_is_none(self, tiny: Path, tmp_path: Path):
        bert = load_bert(build_tiny(tmp_path / "model", with_pooler=False))
        assert bert.pooler is None
        whole = load_file(tiny / "model.safetensors")
        assert_equal_states(
            bert.state_dict(), {name: t for name, t in whole.items() if not name.startswith("pooler")}
        )


class TestRefusing:
    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda s: s.pop(QUERY), f"missing {QUERY!r}"),
            (lambda s: s.pop("pooler.dense.bias"), "missing 'pooler.dense.bias'"),
            (lambda s: s.pop("embeddings.LayerNorm.bias"), "missing 'embeddings.LayerNorm.bias'"),
            (lambda s: s.update({"classifier.weight": torch.zeros(2, 32)}), "unexpected 'classifier.weight'"),
            (lambda s: s.update({QUERY: torch.zeros(32, 31)}), f"{QUERY}: expected [32, 32], got [32, 31]"),
            (lambda s: s.update({QUERY: torch.zeros(1024)}), f"{QUERY}: expected [32, 32], got [1024]"),
            (
                lambda s: s.update({QUERY: s[QUERY].to(torch.int8)}),
                f"{QUERY}: expected floating-point numbers of 16 bits or more, got torch.int8",
            ),
            (lambda s: s[QUERY][3].fill_(math.inf), f"{QUERY}: expected finite numbers in fp32, got inf"),
        ],
    )
    def test_weights_that_do_not_fit_are_refused_by_their_key(
        self, refusal, folder: Path, change, problem: str
    ):
        change_weights(folder, change)
        assert refusal(load_bert, folder) == f"{folder}: the weights do not fit config.json: {problem}"

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"vocab_size": 2**24}, "embeddings.word_embeddings.weight: expected [16777216, 32]"),
            ({"max_position_embeddings": 512}, "embeddings.position_embeddings.weight: expected [512, 32]"),
            ({"num_hidden_layers": 1}, "unexpected 'encoder.layer.1."),
            (
                {"hidden_size": 2**24, "intermediate_size": 2**24, "num_attention_heads": 1},
                "expected [16777216",
            ),
        ],
    )
    def test_a_config_of_other_sizes_is_refused(self, refusal, folder: Path, changes: dict, problem: str):
        change_config(folder, **changes)
        assert problem in refusal(load_bert, folder)

    @pytest.mark.parametrize("also", [[], ["encoder.layer.999999.output.dense.weight"]])
    def test_a_million_layers_are_refused_before_they_are_built(self, refusal, folder: Path, also: list[str]):
        change_config(folder, num_hidden_layers=1_000_000)
        change_weights(folder, lambda state: state.update({name: torch.zeros(32, 64) for name in also}))
        wanted = "expected num_hidden_layers 1000000 as config.json says"
        assert refusal(load_bert, folder) == f"{folder}: {wanted}, the weights have {2 + len(also)}"

    def test_two_tensors_for_one_weight_are_refused(self, refusal, folder: Path):
        name = "embeddings.LayerNorm.weight"
        change_weights(folder, lambda state: state.update({historical(name): state[name].clone()}))
        message = refusal(load_bert, folder)
        assert message.startswith(f"{folder / 'model.safetensors'}: ")
        assert message.endswith(f"is a second {name!r}")

    def test_a_truncated_file_is_refused(self, refusal, folder: Path):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        assert refusal(load_bert, folder).startswith(f"{path}: expected a whole safetensors file")

    def test_missing_weights_are_named(self, refusal, folder: Path):
        (folder / "model.safetensors").unlink()
        path = folder / "model.safetensors"
        assert refusal(load_bert, folder).startswith(f"{path}: cannot be read (No such file")

    def test_a_missing_and_a_damaged_shard_are_named(self, refusal, folder: Path):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weight_map = {name: "one.safetensors" if name != QUERY else "two.safetensors" for name in state}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        query = {QUERY: state.pop(QUERY)}
        save_file(state, folder / "one.safetensors")
        assert refusal(load_bert, folder).startswith(f"{folder / 'two.safetensors'}: cannot be read")
        save_file(query, folder / "two.safetensors")
        assert torch.equal(load_bert(folder).state_dict()[QUERY], query[QUERY])
        (folder / "two.safetensors").write_bytes(b"damaged")
        assert refusal(load_bert, folder).startswith(f"{folder / 'two.safetensors'}: expected a whole")


class TestSaving:
    @pytest.mark.parametrize("with_pooler", [True, False])
    def test_transformers_opens_it_unchanged_and_computes_the_same(self, tmp_path: Path, with_pooler: bool):
        folder = build_tiny(tmp_path / "model", with_pooler)
        bert = load_bert(folder)
        theirs, found = transformers.AutoModel.from_pretrained(
            folder, add_pooling_layer=with_pooler, output_loading_info=True
        )
        assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(theirs) is transformers.BertModel
        assert_equal_states(bert.state_dict(), theirs.state_dict())
        torch.testing.assert_close(outputs(bert), their_outputs(theirs), **tolerance(torch.float32))

    def test_the_config_says_to_transformers_what_it_says_to_us(self, tmp_path: Path):
        config = replace(
            TINY, layer_norm_eps=1e-5, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.0
        )
        save_bert(Bert(config), tmp_path / "model")
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / "model")
        assert {f.name: getattr(theirs, f.name) for f in fields(BertConfig)} == asdict(config)
        assert read_config(tmp_path / "model") == config

    @pytest.mark.parametrize("with_pooler", [True, False])
    def test_a_round_trip_changes_no_bit_and_no_byte(self, tmp_path: Path, with_pooler: bool):
        first = build_tiny(tmp_path / "first", with_pooler)
        save_bert(load_bert(first), tmp_path / "second")
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / "second" / file).read_bytes() == (first / file).read_bytes()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_kept_and_declared(self, tiny: Path, tmp_path: Path, dtype: torch.dtype):
        save_bert(load_bert(tiny).to(dtype), tmp_path / "model")
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "model", dtype="auto")
        assert theirs.dtype == dtype
        assert_equal_states(load_bert(tiny).to(dtype).state_dict(), theirs.state_dict())

    def test_what_transformers_saves_loads(self, tmp_path: Path):
        torch.manual_seed(0)
        theirs = transformers.BertModel(transformers.BertConfig(**asdict(TINY)))
        theirs.save_pretrained(tmp_path)
        bert = load_bert(tmp_path)
        assert_equal_states(bert.state_dict(), theirs.state_dict())
        torch.testing.assert_close(outputs(bert), their_outputs(theirs), **tolerance(torch.float32))

    def test_a_folder_that_cannot_be_made_is_an_oserror(self, tmp_path: Path):
        (tmp_path / "file").write_text("in the way")
        bert = Bert(TINY)
        with pytest.raises(FileExistsError):
            save_bert(bert, tmp_path / "file")
        with pytest.raises(NotADirectoryError):
            save_bert(bert, tmp_path / "file" / "model")
        assert (tmp_path / "file").read_text() == "in the way"
