"""Adapters of the size that is trained, to PEFT and back, exactly; and what PEFT's users write is understood.

Six layers: from twenty targets on, PEFT shortens their names, and must then still adapt the same layers.
"""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft_models import (
    FLAGS,
    made_by_peft,
    open_in_peft,
    our_hidden,
    our_logits,
    save,
    their_hidden,
    their_output,
    transformers_model,
)
from safetensors.torch import load_file, save_file
from tiny_bert import TINY
from tolerances import assert_as_near, tolerance
from torch import nn

from lora.adapter_config import SETTINGS
from lora.adapter_io import adapted_names, load_adapter
from lora.methods import METHODS, apply_method
from minibert.model import Bert
from minibert.weights import load_bert, save_bert

ADAPTED = ("lora", "rslora", "dora")
EXACT = tolerance(torch.float64)
HEADS = {"BertModel": None, "BertForSequenceClassification": 3}  # classes

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore:The following .*_pattern keys did not match"
)


def trained(model: nn.Module) -> None:
    """B and m as training leaves them: B was zero, m moved by a few percent."""
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(std=0.03)
        if "magnitude" in name:
            tensor.data *= 1 + 0.02 * torch.randn(tensor.shape)


def assert_equal(bert: Bert, classifier: dict | None, theirs: nn.Module) -> None:
    """Hidden states, and logits where there is a classifier: the same in fp64, and as near to it in fp32."""
    fp32 = our_hidden(bert), their_hidden(theirs)
    bert.double()
    theirs.double()
    exact = their_hidden(theirs)
    torch.testing.assert_close(our_hidden(bert), exact, **EXACT)
    assert_as_near(*fp32, exact)
    if classifier:
        torch.testing.assert_close(our_logits(bert, classifier), their_output(theirs), **EXACT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT of six layers, with weights of the usual size."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bert = Bert(replace(TINY, hidden_size=96, num_hidden_layers=6, intermediate_size=384))
        for parameter in bert.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.05)
    save_bert(bert, folder)
    return folder


@pytest.mark.parametrize("classes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("method", ADAPTED)
def test_peft_computes_what_we_saved(base, tmp_path, method, classes):
    bert = load_bert(base)
    apply_method(bert, METHODS[method])
    trained(bert)
    classifier = {"weight": 0.05 * torch.randn(3, 96), "bias": torch.zeros(3)} if classes else None
    save(bert, tmp_path, method, rank=8, alpha=METHODS[method].alpha(8), classifier=classifier)
    assert_equal(bert, classifier, open_in_peft(transformers_model(base, classes), tmp_path))


@pytest.mark.parametrize("classes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("method", ADAPTED)
@pytest.mark.parametrize(
    "targets",
    [["query", "value"], r".*layer\.[024]\..*(query|dense)", "all-linear", None],
    ids=["list", "pattern", "all-linear", "default"],
)
def test_we_compute_what_peft_saved(base, tmp_path, targets, method, classes):
    """Nothing but the folder says which layers those are."""
    settings = FLAGS[method] | {"task_type": "SEQ_CLS" if classes else "FEATURE_EXTRACTION"}
    model = made_by_peft(
        transformers_model(base, classes), tmp_path, 8, 16, target_modules=targets, **settings
    )
    trained(model)
    model.save_pretrained(tmp_path)
    bert, bare = load_bert(base), our_hidden(load_bert(base))
    classifier = load_adapter(bert, tmp_path)
    assert (classifier is None) == (classes is None)
    assert (our_hidden(bert) - bare).abs().max() > 1e-3  # an adapter that does nothing is equal too
    assert_equal(bert, classifier, model)
    assert ("pooler.dense" in adapted_names(bert)) == (targets == "all-linear")


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"layer.0.attention.self.query": 5, "query": 2}},  # the first that matches counts
        {"rank_pattern": {"output.dense": 3, "^bert.encoder.layer.1.intermediate.dense": 1}},
        {"alpha_pattern": {"dense": 3, "key": 40.5}},
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 7, "value": 1}},
        {"rank_pattern": {r"layer\.\d+\.(attention|out).*t\.dense": 2, "[k-q]+.?y": 3}},
        # PEFT sorts the keys as it saves, and so may itself compute something else once it has loaded them.
        {"alpha_pattern": {r"^bert\.(?!.*\.0\.).*(?<=[lr][uy])e?": 2.5, "que.y|key": 9}},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ADAPTED)
def test_peft_s_patterns_of_ranks_and_alphas_are_understood(tiny, tmp_path, method, patterns):
    model = made_by_peft(
        transformers_model(tiny, 3), tmp_path, 8, 16, task_type="SEQ_CLS", **FLAGS[method] | patterns,
        target_modules=["query", "key", "value", "dense"],
    )  # fmt: skip
    bert = load_bert(tiny)
    assert_equal(bert, load_adapter(bert, tmp_path), model)


@pytest.mark.parametrize("classes", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [0, 5, 99], "layers_pattern": "layer"},
        {
            "layers_to_transform": [2],
            "layers_pattern": ["blocks", "enc.*er"],
            "exclude_modules": ["self.key"],
        },
        {"exclude_modules": ["dense", "layer.4.attention.self.query"]},
        {"exclude_modules": r".*\.[1-3]\..*|.*dense", "layers_to_transform": []},
        {"target_modules": r"(bert\.)?encoder(\.\w+){2}\.attention\.self\.(query|key)"},
        {"target_modules": "ALL-linear", "exclude_modules": [f"layer.{i}.output.dense" for i in range(6)]},
        {"use_dora": True, "use_rslora": True, "alpha_pattern": {"query": 3}},
    ],
    ids=str,
)
def test_peft_s_choice_of_layers_is_understood_and_saved(base, tmp_path, settings, classes):
    """What we write of it, PEFT and we read alike."""
    settings = {"target_modules": ["query", "key", "dense"]} | settings
    settings["task_type"] = "SEQ_CLS" if classes else "FEATURE_EXTRACTION"
    model = made_by_peft(transformers_model(base, classes), tmp_path / "theirs", 3, 5.0, **settings)
    bert, again = load_bert(base), load_bert(base)
    classifier = load_adapter(bert, tmp_path / "theirs")
    save(bert, tmp_path / "ours", "dora" if "use_dora" in settings else "lora", classifier=classifier)
    load_adapter(again, tmp_path / "ours")
    theirs = open_in_peft(transformers_model(base, classes), tmp_path / "ours")
    assert_equal(bert, classifier, model)
    torch.testing.assert_close(our_hidden(again.double()), their_hidden(model), **EXACT)
    torch.testing.assert_close(their_output(theirs.double()), their_output(model), **EXACT)


@pytest.mark.filterwarnings("ignore:.*eva:UserWarning")
@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva"])
def test_a_start_that_leaves_the_base_as_it_is_does_not_matter(tiny, tmp_path, start):
    settings = {"init_lora_weights": start, "task_type": "FEATURE_EXTRACTION"}
    model = made_by_peft(transformers_model(tiny), tmp_path, 8, 16, target_modules=["query"], **settings)
    bert = load_bert(tiny)
    load_adapter(bert, tmp_path)
    assert_equal(bert, None, model)


def test_an_alpha_of_its_own_is_saved_without_a_rank_of_its_own(tiny, tmp_path):
    bert, name = load_bert(tiny), "encoder.layer.0.attention.self.query"
    apply_method(bert, METHODS["lora"], rank=3, alpha=5.0, alphas={name: 9.0})
    trained(bert)
    save(bert, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"] == {name: 9.0}
    assert_equal(bert, None, open_in_peft(transformers_model(tiny), tmp_path))


class TestSettings:
    def test_peft_has_no_setting_that_is_not_judged(self):
        """A PEFT that adds one shows up here: does it change what is computed?"""
        from peft import LoraConfig

        written = {one.name for one in dataclasses.fields(LoraConfig)} - {"runtime_config"}
        assert written == set(SETTINGS)

    def test_a_setting_is_left_out_or_at_its_default_alike(self):
        from peft import LoraConfig

        default = LoraConfig().to_dict()
        for name, values in SETTINGS.items():
            if values:
                assert default[name] == values[0]
                assert type(default[name]) is type(values[0]) or name == "peft_type"

    @pytest.mark.parametrize("name", [name for name, values in SETTINGS.items() if values])
    def test_another_value_is_refused_by_name(self, tiny, tmp_path, refusal, name):
        for value in ("other", {"a": 1}, [0], 7):
            save(self.encoder(tiny), tmp_path)
            self.change(tmp_path, {name: value})
            message = refusal(load_adapter, load_bert(tiny), tmp_path)
            assert message.startswith(f"{tmp_path / 'adapter_config.json'}: expected {name} ")
            assert message.endswith(f", got {value!r}")

    @pytest.mark.parametrize("value", [None, False, 0, {}, "x"])
    def test_one_that_is_not_known_is_refused_by_name(self, tiny, tmp_path, refusal, value):
        save(self.encoder(tiny), tmp_path)
        self.change(tmp_path, {"lora_of_2027": value})
        message = refusal(load_adapter, load_bert(tiny), tmp_path)
        assert "adapter_config.json: unknown setting 'lora_of_2027'" in message

    @pytest.mark.parametrize("value", [["pooler"], ["classifier", "pooler"], "classifier", [["classifier"]]])
    def test_a_saved_module_that_is_no_head_is_refused(self, tiny, tmp_path, refusal, value):
        save(self.encoder(tiny), tmp_path)
        self.change(tmp_path, {"modules_to_save": value})
        message = refusal(load_adapter, load_bert(tiny), tmp_path)
        assert "expected modules_to_save to be classifier or score, got" in message

    @staticmethod
    def encoder(tiny: Path) -> Bert:
        bert = load_bert(tiny)
        apply_method(bert, METHODS["lora"], rank=3, alpha=5.0)
        return bert

    @staticmethod
    def change(folder: Path, changes: dict) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_bias(state: dict) -> None:
    del state["base_model.model.classifier.bias"]


def longer_bias(state: dict) -> None:
    state["base_model.model.classifier.bias"] = torch.zeros(4)


def flat_weight(state: dict) -> None:
    state["base_model.model.classifier.weight"] = torch.zeros(96)


def second_layer(state: dict) -> None:
    state["base_model.model.classifier.1.weight"] = torch.zeros(3, 3)


def no_adapters(state: dict) -> None:
    for name in [name for name in state if "lora_" in name]:
        del state[name]


def embedding(state: dict) -> None:
    state["base_model.model.bert.embeddings.word_embeddings.lora_embedding_A"] = torch.zeros(8, 90)


def other_layer(state: dict) -> None:
    for part in "AB":
        one = state[f"base_model.model.bert.encoder.layer.1.attention.self.query.lora_{part}.weight"]
        state[f"base_model.model.bert.encoder.layer.2.attention.self.query.lora_{part}.weight"] = one + 0


def rank_of_one(state: dict) -> None:
    name = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight"
    state[name] = state[name][:2].contiguous()


def integers(state: dict) -> None:
    name = max(name for name in state if "lora_B" in name)
    state[name] = state[name].int()


@pytest.mark.parametrize(
    "spoil",
    [drop_bias, longer_bias, flat_weight, second_layer, no_adapters, embedding, other_layer, rank_of_one,
     integers],
)  # fmt: skip
def test_a_folder_that_is_refused_leaves_the_encoder_as_it_was(tiny, tmp_path, refusal, spoil):
    made_by_peft(transformers_model(tiny, 3), tmp_path, 8, 16, task_type="SEQ_CLS", target_modules=["query"])
    path, bert = tmp_path / "adapter_model.safetensors", load_bert(tiny)
    load_adapter(load_bert(tiny), tmp_path)  # before it is spoiled it is good
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    before = {name: (id(p), p.requires_grad, p._version) for name, p in bert.named_parameters()}
    modules = list(map(id, bert.modules()))
    assert refusal(load_adapter, bert, tmp_path).startswith(f"{path}: does not fit adapter_config.json")
    assert {name: (id(p), p.requires_grad, p._version) for name, p in bert.named_parameters()} == before
    assert list(map(id, bert.modules())) == modules
