"""A run's adapter folder is enough to use the adapter, and refuses what the adapter does not belong to."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import call, flags, strict_json

import predict
import train
from minibert.hub import HASHES
from training import adapter_folder, provenance
from training.run_folder import load_run

RUNS = {
    "sts": {},
    "sst": {"task": "sst", "method": "dora"},
    "pooler": {"task": "qqp", "method": "lora", "pooling": "pooler", "targets": "dense@1"},
    "siamese": {"pair": "siamese", "features": "uv-diff", "hidden_layers": 1, "pooling": "mean"},
    "several": {"task": "sst+sts"},
}
TEXTS = {"sst": ["a film"], "sts": ["a cat", "not a dog"], "qqp": ["what is a cat", "how good is a dog"]}


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a finished run and of its base model; not to be changed."""
    known: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in known:
            folder = tmp_path_factory.mktemp("finished") / "run"
            arguments = flags(tiny, small_data, out=folder, epochs=1, **RUNS[kind])
            ended = call(train.main, *arguments)
            assert ended.code == 0, ended.err
            known[kind] = folder
        return known[kind]

    return run


@pytest.fixture
def own(finished, tmp_path: Path):
    """A copy of such a folder, to be damaged."""
    return lambda kind: Path(shutil.copytree(finished(kind), tmp_path / "run"))


def read(folder: Path) -> dict:
    return strict_json((folder / "minibert.json").read_text())


def change(folder: Path, edit: Callable[[dict], None]) -> None:
    card = read(folder)
    edit(card)
    (folder / "minibert.json").write_text(json.dumps(card))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", RUNS)
def test_the_folder_says_how_the_adapter_is_used(kind: str, finished, tiny: Path) -> None:
    card, config = read(finished(kind) / "adapter"), strict_json((finished(kind) / "config.json").read_text())
    for name in ("task", "method", "pair", "features", "pooling", "max_length", "hidden_layers", "targets",
                 "model"):  # fmt: skip
        assert card[name] == config[name]
    assert card["sha256"] == {"model.safetensors": digest(tiny / "model.safetensors")}
    tasks = config["task"].split("+")
    assert card["outputs"] == {task: {"sst": 5, "qqp": 2, "sts": 1}[task] for task in tasks}
    assert list(card["golden"]) == tasks
    for task, rows in card["golden"].items():
        assert 2 <= len(rows) <= 4
        for row in rows:
            assert (len(row["texts"]), len(row["logits"])) == (len(TEXTS[task]), card["outputs"][task])


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_the_golden_outputs_are_what_peft_computes_from_the_same_folder(finished, tiny: Path) -> None:
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = finished("sst") / "adapter"
    model = PeftModel.from_pretrained(BertModel.from_pretrained(tiny), folder).eval()
    head, tokenizer = (
        load_file(folder / "head.safetensors"),
        Tokenizer.from_file(str(tiny / "tokenizer.json")),
    )
    for row in read(folder)["golden"]["sst"]:
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(row["texts"][0]).ids])[:, :32]
            ids[:, -1] = 3  # [SEP], also where the text was cut
            first = model(input_ids=ids).last_hidden_state[0, 0]
        logits = head["sst.output.weight"] @ first + head["sst.output.bias"]
        assert logits.tolist() == pytest.approx(row["logits"], abs=1e-5)


@pytest.mark.parametrize("kind", RUNS)
def test_the_folder_alone_predicts_as_the_run_does(kind: str, finished, tmp_path: Path) -> None:
    alone = shutil.copytree(finished(kind) / "adapter", tmp_path / "elsewhere")
    for task in RUNS[kind].get("task", "sts").split("+"):
        ended = [
            call(predict.main, folder, "--task", task, "--text", *TEXTS[task])
            for folder in (finished(kind), alone)
        ]
        assert ended[0].code == 0
        assert ended[0].out
        assert ended[0] == ended[1]


def test_another_base_is_refused(tiny: Path, small_data: Path, tmp_path: Path, refusal) -> None:
    base, run = Path(shutil.copytree(tiny, tmp_path / "base")), tmp_path / "run"
    assert call(train.main, *flags(base, small_data, out=run, max_steps=1)).code == 0
    weights, before = base / "model.safetensors", digest(base / "model.safetensors")
    state = load_file(weights)
    state["embeddings.word_embeddings.weight"][7] += 1e-4  # too little for the golden examples to show
    save_file(state, weights, {"format": "pt"})
    for folder in (run, run / "adapter"):
        message = refusal(load_run, folder)
        belongs = f"expected the base model of {run / 'adapter' / 'minibert.json'}, sha256 {before}"
        assert message == f"{weights}: {belongs}, got {digest(weights)}"


def test_a_base_in_shards_is_known_by_all_of_them(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "b.safetensors")
    shutil.copy(tmp_path / "base" / "b.safetensors", tmp_path / "base" / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    same = digest(tiny / "model.safetensors")
    assert adapter_folder.weights_sha256(tmp_path / "base") == {"a.safetensors": same, "b.safetensors": same}


def test_what_the_cache_has_verified_is_not_hashed_again(
    tiny: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny, own_cache / "some--model@main")
    (folder / HASHES).write_text(json.dumps({"commit": "c", "sha256": {"model.safetensors": "known"}}))
    monkeypatch.delattr(provenance, "sha256")
    assert adapter_folder.weights_sha256(folder) == {"model.safetensors": "known"}


def test_but_a_folder_of_the_users_is_hashed_whatever_it_claims(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / HASHES).write_text(json.dumps({"commit": "c", "sha256": {"model.safetensors": "claimed"}}))
    assert adapter_folder.weights_sha256(folder) == {"model.safetensors": digest(tiny / "model.safetensors")}


def scale(file: Path, part: str, factor: float) -> None:
    """All that `part` is in the name of."""
    state = load_file(file)
    save_file({n: t * factor if part in n else t for n, t in state.items()}, file, {"format": "pt"})


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("file", "part"), [("adapter_model", "lora_B"), ("head", "sts.output")])
def test_other_outputs_than_when_it_was_saved_are_refused(
    file: str, part: str, alone: bool, own, refusal
) -> None:
    run = own("several")
    where = run / "adapter" if alone or file != "head" else run
    folder = run / "adapter" if alone else run
    scale(where / f"{file}.safetensors", part, 1 + 1e-7)  # as another CPU's rounding
    load_run(folder)
    scale(where / f"{file}.safetensors", part, 1.5)
    message = refusal(load_run, folder)
    assert message.startswith(f"{run / 'adapter' / 'minibert.json'}: ")
    card = read(run / "adapter")["golden"]
    task = "sts" if file == "head" else message.split(": ")[1]
    named = [row for row in card[task] if repr(" / ".join(row["texts"])) in message]
    assert len(named) == 1
    assert f"{task}: expected " in message
    assert f"to come out as {named[0]['logits']}, got [" in message


def test_another_tokenizer_is_refused(tiny: Path, small_data: Path, tmp_path: Path, refusal) -> None:
    base, run = Path(shutil.copytree(tiny, tmp_path / "base")), tmp_path / "run"
    assert call(train.main, *flags(base, small_data, out=run, max_steps=1)).code == 0
    text = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(text.replace('"lowercase": true', '"lowercase": false'))
    assert (base / "tokenizer.json").read_text() != text
    assert "to come out as" in refusal(load_run, run)


@pytest.mark.parametrize(
    ("name", "value"), [("pooling", "mean"), ("pair", "siamese"), ("max_length", 16), ("method", "dora")]
)
def test_settings_that_were_changed_in_the_run_are_refused(name: str, value: object, own, refusal) -> None:
    run = own("sts")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {name: value}))
    wanted = f"expected {name} {value!r} as in the run's config.json, got {config[name]!r}"
    assert refusal(load_run, run) == f"{run / 'adapter' / 'minibert.json'}: {wanted}"


NOT_GOLDEN = (
    None, [], {}, {"sst": []}, {"sts": []}, {"sts": None}, {"sts": [3]}, {"sts": [{}]},
    {"sts": [{"texts": ["a"], "logits": [1.0]}]}, {"sts": [{"texts": ["a", 3], "logits": [1.0]}]},
    {"sts": [{"texts": ["a", "\ud800"], "logits": [1.0]}]}, {"sts": [{"texts": ["a", "b"], "logits": ["1"]}]},
    {"sts": [{"texts": ["a", "b"], "logits": [1.0, 2.0]}]}, {"sts": [{"texts": ["a", "b"], "logits": 1.0}]},
    {"sts": [{"texts": ["a", "b"], "logits": [10**400]}]},
)  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        *[("golden", value, "golden: expected examples of sts with 2 texts and 1 logits each") for value in
          NOT_GOLDEN],
        ("golden", {"sts": [{"texts": ["a", "b"], "logits": [math.nan]}]}, "to come out as [nan], got ["),
        ("sha256", None, "expected sha256 to be an object, got None"),
        ("sha256", {}, "sha256 no such file, got "),
        ("sha256", {"model.safetensors": 3}, "sha256 3, got "),
        ("outputs", {"sts": 2}, "expected outputs {'sts': 1}, got {'sts': 2}"),
        ("outputs", None, "expected outputs {'sts': 1}, got None"),
        ("task", "nli", "--task: expected sst, qqp, sts"),
        ("task", 3, "expected task to be "),
        ("pooling", None, "expected a pooling, got none"),
        ("pooling", "max", "--pooling: expected one of cls, pooler, mean; got 'max'"),
        ("pooling", "mean", "to come out as ["),
        ("max_length", "32", "expected max_length to be int | None, got '32'"),
        ("max_length", None, "expected a max_length, got none"),
        ("hidden_layers", 1, "head.safetensors: does not fit the settings: "),
        ("targets", ["query"], "adapter_model.safetensors: does not fit adapter_config.json and the model"),
        ("model", "no/such/model/x", "expected a folder, "),
    ],
)  # fmt: skip
def test_a_description_that_makes_no_sense_is_refused(
    key: str, value: object, wanted: str, own, refusal
) -> None:
    folder = own("sts") / "adapter"
    change(folder, lambda card: card.update({key: value}))
    assert wanted in refusal(load_run, folder)


@pytest.mark.parametrize("key", [*adapter_folder.SETTINGS, "model", "outputs", "sha256", "golden"])
def test_a_description_that_lacks_something_is_refused(key: str, own, refusal) -> None:
    run = own("sts")
    change(run / "adapter", lambda card: card.pop(key))
    for folder in (run, run / "adapter"):
        assert refusal(load_run, folder) == f"{run / 'adapter' / 'minibert.json'}: missing key {key!r}"


def test_a_base_of_another_name_is_said_unless_it_only_moved(own, tiny, tmp_path, caplog) -> None:
    run, moved = own("sts"), shutil.copytree(tiny, tmp_path / "moved")
    for file, change in (
        ("config.json", {"model": str(moved)}),
        ("adapter/adapter_config.json", {"base_model_name_or_path": "roberta-base"}),
    ):
        assert caplog.messages == []
        (run / file).write_text(json.dumps(json.loads((run / file).read_text()) | change))
        load_run(run)
    assert "made for the base model 'roberta-base', which is not known to be this one" in caplog.text
