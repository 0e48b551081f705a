"""Adapter folders: the real PEFT opens ours and computes the same, we open PEFT's, and nothing else."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft_models import (
    FLAGS,
    build,
    made_by_peft,
    move,
    open_in_peft,
    our_hidden,
    our_logits,
    save,
    their_output,
    transformers_model,
)
from safetensors.torch import load_file, save_file
from tiny_bert import TINY
from tolerances import tolerance
from torch import Tensor

from lora.adapter_io import adapter_state, load_adapter
from lora.methods import METHODS, apply_method
from minibert.hub import same_weights
from minibert.weights import load_bert

ADAPTED = ("lora", "rslora", "dora")
# Targets as ours, and as a PEFT user writes them: by suffix, so that `output.dense` is attention's too.
TARGETS = {
    ("all",): ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    ("query", "value"): ["query", "value"],
    ("attention",): ["query", "key", "value", "attention.output.dense"],
    ("attention.output", "intermediate", "output"): ["intermediate.dense", "output.dense"],
    ("dense",): ["attention.output.dense", "intermediate.dense", "output.dense"],
    ("output",): r".*layer\.\d+\.output\.dense",
}
# rank, alpha: never alpha = 2r; a whole alpha, a default of rsLoRA's, rank 1
SETTINGS = ((3, 5.0), (8, 2 * math.sqrt(8)), (1, 0.7), (12, 16))
DTYPES = (torch.float64, torch.float32)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore:The following .*_pattern keys did not match"
)


class TestPeftOpensOurs:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rank", "alpha"), SETTINGS)
    @pytest.mark.parametrize("method", ADAPTED)
    def test_hidden_states_are_equal(self, tiny, tmp_path, method, rank, alpha, dtype):
        bert = build(tiny, method, ("all",), rank, alpha)
        save(bert, tmp_path, method, rank=rank, alpha=alpha)
        model = open_in_peft(transformers_model(tiny), tmp_path)
        bare = our_hidden(load_bert(tiny))
        expected = our_hidden(bert.to(dtype))
        assert (expected - bare).abs().max() > 1e-3  # an adapter that does nothing is equal too
        torch.testing.assert_close(their_output(model.to(dtype)), expected, **tolerance(dtype, "encoder"))

    @pytest.mark.parametrize("method", ADAPTED)
    def test_layers_may_have_ranks_of_their_own(self, tiny, tmp_path, method):
        """Not given alphas either: one that follows its layer's rank must reach PEFT as well."""
        names = {"encoder.layer.0.attention.self.query": 5, "encoder.layer.1.output.dense": 1}
        bert, again = load_bert(tiny), load_bert(tiny)
        alphas = dict.fromkeys(names, 7.0)
        apply_method(bert, METHODS[method], rank=3, alpha=5.0, ranks=names, alphas=alphas)
        move(bert)
        save(bert, tmp_path, method)
        expected = our_hidden(bert.double())
        model = open_in_peft(transformers_model(tiny), tmp_path)
        torch.testing.assert_close(
            their_output(model.double()), expected, **tolerance(torch.float64, "encoder")
        )
        load_adapter(again, tmp_path, targets=("all",))
        torch.testing.assert_close(
            our_hidden(again.double()), expected, **tolerance(torch.float64, "encoder")
        )

    @pytest.mark.parametrize("targets", list(TARGETS)[1:])
    @pytest.mark.parametrize("method", ADAPTED)
    def test_it_adapts_the_same_layers(self, tiny, tmp_path, method, targets):
        bert = build(tiny, method, targets, 3, 5.0)
        save(bert, tmp_path, method)
        model = open_in_peft(transformers_model(tiny), tmp_path)
        ours = {name.rpartition(".lora_A")[0] for name in adapter_state(bert) if ".lora_A" in name}
        theirs = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
        assert theirs == {f"base_model.model.{name}" for name in ours}
        torch.testing.assert_close(
            their_output(model.double()), our_hidden(bert.double()), **tolerance(torch.float64, "encoder")
        )

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("targets", [("all",), ("query", "value"), ("output",)])
    @pytest.mark.parametrize("method", ADAPTED)
    def test_with_a_classifier_logits_are_equal(self, tiny, tmp_path, method, targets, dtype):
        bert = build(tiny, method, targets, 3, 5.0)
        classifier = {"weight": torch.randn(5, TINY.hidden_size), "bias": torch.randn(5)}
        save(bert, tmp_path, method, classifier=classifier)
        model = open_in_peft(transformers_model(tiny, classes=5), tmp_path)
        expected = our_logits(bert.to(dtype), classifier)
        torch.testing.assert_close(their_output(model.to(dtype)), expected, **tolerance(dtype, "encoder"))

    @pytest.mark.parametrize("classifier", [None, {"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}])
    def test_it_reads_the_settings_we_were_given(self, tiny, tmp_path, classifier):
        from peft import LoraConfig, PeftConfig, TaskType

        alpha = 2 * math.sqrt(3)  # rsLoRA's default, no whole number, though PEFT's annotation says int
        bert = build(tiny, "rslora", ("query",), 3, alpha)
        save(bert, tmp_path, "rslora", alpha=alpha, classifier=classifier)
        config = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(config, LoraConfig)
        assert config.task_type == (TaskType.SEQ_CLS if classifier else TaskType.FEATURE_EXTRACTION)
        assert (config.r, config.lora_alpha, config.lora_dropout) == (3, alpha, 0.1)
        assert (config.use_rslora, config.use_dora, config.bias) == (True, False, "none")
        assert config.base_model_name_or_path == "some/model"
        assert config.inference_mode

    @pytest.mark.parametrize("classes", [None, 3])
    @pytest.mark.parametrize("method", ADAPTED)
    def test_each_setting_we_write_is_the_one_peft_writes(self, tiny, tmp_path, method, classes):
        """But its list of targets, which would match attention's output too."""
        settings = FLAGS[method] | {"task_type": "SEQ_CLS" if classes else "FEATURE_EXTRACTION"}
        settings |= {"target_modules": ["query"], "lora_dropout": 0.1}
        made_by_peft(transformers_model(tiny, classes), tmp_path / "theirs", 3, 5.0, **settings)
        classifier = {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)} if classes else None
        bert = build(tiny, method, ("query",), 3, 5.0)
        save(bert, tmp_path / "ours", method, base=str(tiny), classifier=classifier)
        ours, theirs = (
            json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")
        )
        assert ours.pop("target_modules") != theirs["target_modules"]
        assert ours == {key: theirs[key] for key in ours}
        keys = [set(load_file(tmp_path / name / "adapter_model.safetensors")) for name in ("ours", "theirs")]
        assert keys[0] == keys[1]

    def test_saving_changes_nothing(self, tiny, tmp_path):
        bert = build(tiny, "dora", ("all",), 3, 5.0)
        before = {name: (p.detach().clone(), p.requires_grad) for name, p in bert.named_parameters()}
        save(bert, tmp_path, "dora")
        for name, parameter in bert.named_parameters():
            assert torch.equal(parameter, before[name][0])
            assert parameter.requires_grad == before[name][1]


class TestWeOpenPefts:
    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("method", ADAPTED)
    def test_hidden_states_are_equal(self, tiny, tmp_path, method, targets):
        settings = FLAGS[method] | {"task_type": "FEATURE_EXTRACTION", "lora_dropout": 0.1}
        settings["target_modules"] = TARGETS[targets]
        model = made_by_peft(transformers_model(tiny), tmp_path, 3, 5.0, **settings)
        bert = load_bert(tiny)
        load_adapter(bert, tmp_path, targets=targets)
        expected = their_output(model.double())
        torch.testing.assert_close(our_hidden(bert.double()), expected, **tolerance(torch.float64, "encoder"))

    @pytest.mark.parametrize(("rank", "alpha"), SETTINGS)
    @pytest.mark.parametrize("method", ADAPTED)
    def test_logits_are_equal(self, tiny, tmp_path, method, rank, alpha):
        settings = FLAGS[method] | {"task_type": "SEQ_CLS", "target_modules": TARGETS[("all",)]}
        model = made_by_peft(transformers_model(tiny, classes=3), tmp_path, rank, alpha, **settings)
        bert = load_bert(tiny)
        load_adapter(bert, tmp_path, targets=("all",))
        expected = their_output(model.double())
        head = model.base_model.model.classifier.modules_to_save["default"].state_dict()
        torch.testing.assert_close(
            our_logits(bert.double(), head), expected, **tolerance(torch.float64, "encoder")
        )

    @pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT is wary of its own lora_bias
    @pytest.mark.parametrize(
        "settings",
        [
            {"alpha_pattern": {"que|x": 9}},
            {"bias": "lora_only"},
            {"lora_bias": True},
            {"init_lora_weights": "pissa"},
            {"init_lora_weights": "olora"},
            {"layers_to_transform": [0]},
            {"target_modules": ["query", "key"]},
            {"target_modules": "all-linear"},
        ],
        ids=str,
    )
    def test_an_adapter_that_computes_something_else_is_refused(self, tiny, tmp_path, refusal, settings):
        settings = {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"} | settings
        made_by_peft(transformers_model(tiny), tmp_path, 3, 5.0, **settings)
        message = refusal(lambda: load_adapter(load_bert(tiny), tmp_path, targets=("query",)))
        assert str(tmp_path) in message


class TestRoundTrip:
    @pytest.mark.parametrize("with_head", [False, True])
    @pytest.mark.parametrize("targets", TARGETS)
    @pytest.mark.parametrize("method", ADAPTED)
    def test_what_was_saved_is_loaded_bitwise(self, tiny, tmp_path, method, targets, with_head):
        bert = build(tiny, method, targets, 3, 5.0)
        classifier = {"weight": torch.randn(2, 32), "bias": torch.randn(2)} if with_head else None
        save(bert, tmp_path, method, classifier=classifier)
        again = load_bert(tiny)
        load_adapter(again, tmp_path, targets=targets)
        assert {n: p.requires_grad for n, p in again.named_parameters()} == {
            n: p.requires_grad for n, p in bert.named_parameters()
        }
        torch.testing.assert_close(again.state_dict(), bert.state_dict(), rtol=0, atol=0)
        assert torch.equal(our_hidden(again), our_hidden(bert))
        assert {m.p for n, m in again.named_modules() if n.endswith("dense.dropout")} <= {0.1}

    def test_the_file_holds_the_adapters_alone(self, tiny, tmp_path):
        save(build(tiny, "dora", ("query",), 3, 5.0), tmp_path, "dora")
        parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
            f"base_model.model.encoder.layer.{i}.attention.self.query.{part}"
            for i in range(TINY.num_hidden_layers)
            for part in parts
        }

    @pytest.mark.parametrize("method", ADAPTED)
    def test_adapters_of_a_base_in_half_precision_are_kept_in_fp32(self, tiny, tmp_path, method):
        bert = load_bert(tiny).bfloat16()
        apply_method(bert, METHODS[method], rank=3, alpha=5.0)
        move(bert)
        save(bert, tmp_path, method)
        state = load_file(tmp_path / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
        again = load_bert(tiny).bfloat16()
        load_adapter(again, tmp_path, targets=("all",))
        torch.testing.assert_close(again.state_dict(), bert.state_dict(), rtol=0, atol=0)


MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.parametrize(
    ("named", "used", "is_said"),
    [
        ("roberta-base", "bert-base-uncased", True),
        (MINILM, "all-MiniLM-L6-v2@main", True),
        ("roberta-base", "TINY", True),
        ("roberta-base", None, True),
        (MINILM, "all-MiniLM-L6-v2", False),
        ("google-bert/bert-base-uncased", "bert-base-uncased", False),
        ("org/own@main", "org/own@main", False),
        ("COPY", "TINY", False),
        (None, None, False),
    ],
)
def test_a_base_that_is_not_known_to_be_the_same_is_said(tiny, tmp_path, caplog, named, used, is_said):
    """By name, and by hash where a folder or a name that this project pins has one."""
    folders = {"TINY": str(tiny), "COPY": shutil.copytree(tiny, tmp_path / "copy").as_posix()}
    named, used = folders.get(named, named), folders.get(used, used)
    save(build(tiny, "lora", ("query",), 3, 5.0), tmp_path, base=named)
    load_adapter(load_bert(tiny), tmp_path, **({"is_base": partial(same_weights, used)} if used else {}))
    said = f"made for the base model {named!r}, which is not known to be this one; the tensors' names and"
    assert caplog.messages == is_said * [f"{tmp_path / 'adapter_config.json'}: {said} shapes fit"]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A good folder, to be spoiled; also the one that shows that spoiling is what is refused."""
    save(build(tiny, "lora", ("query",), 3, 5.0), tmp_path)
    load_adapter(load_bert(tiny), tmp_path, targets=("query",))
    return tmp_path


@pytest.fixture
def refused(tiny: Path, folder: Path, refusal) -> Callable[[], str]:
    def load() -> str:
        message = refusal(lambda: load_adapter(load_bert(tiny), folder, targets=("query",)))
        assert message.startswith(str(folder))
        return message.removeprefix(f"{folder}/")

    return load


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], str], None]:
    return lambda state, one: state.update({one: change(state[one]).clone().contiguous()})


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor], str], None]:
    def rename(state: dict[str, Tensor], one: str) -> None:
        for name in list(state):
            state[name.replace(old, new)] = state.pop(name)

    return rename


class TestErrors:
    @pytest.mark.parametrize(
        ("key", "value", "wanted"),
        [
            *[("r", value, "expected r to be a whole number") for value in
              (math.nan, math.inf, 2.5, 3.0, "3", None, True, [3], 10**12, 10**400, -(10**400))],
            *[("r", value, "rank must be ") for value in (0, -1, 33, 2**31 - 1)],
            *[("lora_alpha", value, "expected lora_alpha to be a number") for value in
              (math.nan, math.inf, -math.inf, "16", None, False, {}, 10**400, 1e300)],
            *[("lora_alpha", value, "scaling must be a positive number") for value in (0, 0.0, -5.0)],
            *[("lora_dropout", value, "expected lora_dropout to be a number") for value in
              (math.nan, "0.1", None, True, 10**400)],
            *[("lora_dropout", value, r"dropout must be in [0, 1)") for value in (1, 1.0, -0.1, 7)],
            *[("peft_type", value, "expected peft_type 'LORA', got ") for value in
              ("ADALORA", "lora", None, 3, [])],
            *[("use_dora", value, "expected use_dora False or True, got ") for value in ("no", None, 2, [])],
            *[("use_rslora", value, "expected use_rslora False or True, got ") for value in ("yes", {})],
            ("use_dora", True, "adapter_model.safetensors: does not fit adapter_config.json and the model"),
            ("bias", "all", "expected bias 'none', got 'all'"),
            ("rank_pattern", {"query": 2}, "does not fit adapter_config.json and the model: "),
            *[(key, {pattern: 2}, f"expected {key} to name layers with an adapter, {pattern!r} matches none")
              for key in ("rank_pattern", "alpha_pattern") for pattern in ("(a+)+$", "(.|.)*!", "uery")],
            *[(key, value, f"expected {key} to be a regular expression, got '{pattern}' (") for key, value,
              pattern in (("target_modules", "(", "("), ("exclude_modules", "(?i:a)", "(?i:a)"),
              ("alpha_pattern", {"a)": 2}, r"(.*\\.)?(a))$"))],
            ("layers_to_transform", [1.5], "expected layers_to_transform to be whole numbers, got [1.5]"),
            ("layers_to_transform", "1", "expected layers_to_transform to be whole numbers, got '1'"),
            ("layers_pattern", "layer", "expected layers_to_transform beside layers_pattern, got None"),
            ("exclude_modules", {"a": 1}, "expected exclude_modules to be names or a regular expression"),
            ("exclude_modules", ["query"], "expected target_modules of the model, got none of its layers"),
            ("target_modules", [["query"]], "expected target_modules to be names or a regular expression"),
            ("target_modules", ["qury"], "expected target_modules of the model, got none of its layers"),
            *[("target_modules", names, "does not fit adapter_config.json and the model: missing 'base_")
              for names in (["key"], ["query", "key"], "all-linear", None)],
            ("target_modules", ["1.attention.self.query"], "unexpected 'base_model.model.encoder.layer.0."),
            ("auto_mapping", {"parent_library": "transformers.models.albert.modeling_albert"},
              "expected an adapter of a BERT, got one of 'transformers.models.albert.modeling_albert'"),
            ("base_model_name_or_path", 3, "expected a base model's name and revision, got 3"),
            *[(key, [3], f"expected {key} to be an object, got [3]") for key in
              ("rank_pattern", "alpha_pattern")],
            ("rank_pattern", {"query": 2.5}, "expected rank_pattern: query to be a whole number, got 2.5"),
            ("alpha_pattern", {"query": "9"}, "query to be a number of at most 1e+10, got '9'"),
            ("alpha_pattern", {"query": -1}, "scaling must be a positive number"),
            ("init_lora_weights", "pissa_niter_16", "expected init_lora_weights True or False or 'gaussian'"),
            ("alora_invocation_tokens", [1], "expected alora_invocation_tokens None, got [1]"),
        ],
    )  # fmt: skip
    def test_a_setting_that_makes_no_sense_is_named(self, folder, refused, key, value, wanted):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        assert wanted in refused()

    def test_layers_of_a_list_the_model_lacks_are_none(self, folder, refused):
        path = folder / "adapter_config.json"
        lists = {"layers_to_transform": [0, 1], "layers_pattern": ["blocks", "lay"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | lists))
        assert refused().endswith("expected target_modules of the model, got none of its layers")

    @pytest.mark.parametrize("key", ["peft_type", "r", "lora_alpha", "lora_dropout"])
    def test_a_setting_that_is_missing_is_named(self, folder, refused, key):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        del config[key]
        path.write_text(json.dumps(config))
        assert refused().startswith(f"adapter_config.json: expected {key} ")

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"r": ' + b"9" * 5000 + b"}"])
    def test_a_damaged_config_is_named(self, folder, refused, content):
        (folder / "adapter_config.json").write_bytes(content)
        assert refused().startswith("adapter_config.json: expected ")

    @pytest.mark.parametrize("keep", [0, 7, 100, -1])
    def test_truncated_weights_are_named(self, folder, refused, keep):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        assert refused().startswith("adapter_model.safetensors: expected a whole safetensors file")

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_missing_file_is_named(self, folder, refused, file):
        (folder / file).unlink()
        assert refused().startswith(f"{file}: cannot be read (")

    @pytest.mark.parametrize(
        ("spoil", "wanted"),
        [
            (lambda state, one: state.pop(one), "missing {one!r}"),
            (lambda state, one: state.clear(), "missing {one!r} and 3 more"),
            (lambda state, one: state.update(extra=state[one].clone()), "unexpected 'extra'"),
            (lambda state, one: state.update({one + ".x": state[one].clone()}), "unexpected '{one}.x'"),
            (changed(lambda tensor: tensor.T), "{one}: expected [3, 32], got [32, 3]"),
            (changed(lambda tensor: tensor[:2]), "{one}: expected [3, 32], got [2, 32]"),
            (changed(lambda tensor: tensor[None]), "{one}: expected [3, 32], got [1, 3, 32]"),
            (changed(lambda tensor: tensor.long()), "{one}: expected floating-point numbers"),
            # the right tensors, but not under PEFT's names, or twice
            (renamed("base_model.model.", ""), "missing {one!r} and 3 more"),
            (renamed("base_model.model.", "base_model."), "missing {one!r} and 3 more"),
            (renamed(".weight", ".default.weight"), "missing {one!r} and 3 more"),
            (lambda state, one: state.update({one.replace(".en", ".bert.en"): state[one] + 0}), "missing "),
        ],
    )  # fmt: skip
    def test_weights_that_do_not_fit_are_named(self, folder, refused, spoil, wanted):
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        one = min(state)
        assert one == "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
        spoil(state, one)
        save_file(state, path)
        expected = "adapter_model.safetensors: does not fit adapter_config.json and the model: "
        assert refused().startswith(expected + wanted.format(one=one))

    @pytest.mark.parametrize("targets", [("key",), ("all",), ("query", "value")])
    def test_an_adapter_of_other_targets_is_refused(self, tiny, folder, refusal, targets):
        message = refusal(lambda: load_adapter(load_bert(tiny), folder, targets=targets))
        assert "does not fit adapter_config.json and the model: missing " in message

    def test_an_encoder_with_adapters_is_refused(self, tiny, folder, refusal):
        bert = build(tiny, "lora", ("query",), 3, 5.0)
        message = refusal(lambda: load_adapter(bert, folder, targets=("query",)))
        assert message.endswith("the encoder has adapters already")
