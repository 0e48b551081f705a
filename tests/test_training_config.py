"""A run's settings: every flag, its default, what is refused, and the way through JSON and back."""

import json
import math
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora.methods import METHODS
from minibert.errors import InputError
from training.cli import build_parser, chosen, command_of, parse
from training.config import SIDE_LOSSES, Config, check, from_dict, to_dict

ROOT = Path(__file__).parents[1]

OWN = '{"name": "mine", "text": ["a"], "label": "b", "range": [0, 1], "files": {"train": "c", "dev": 0.2}}'
# A flag of the contract, words to give it (and to go with it), and what Config then holds.
FLAGS = {
    "task": (["--task", "sst+qqp"], "sst+qqp"),
    "method": (["--method", "dora"], "dora"),
    "pair": (["--pair", "siamese"], "siamese"),
    "features": (["--features", "uv", "--pair", "siamese"], "uv"),
    "model": (["--model", "bert-base-uncased"], "bert-base-uncased"),
    "data": (["--data", "some/folder"], "some/folder"),
    "max_length": (["--max-length", "77"], 77),
    "pooling": (["--pooling", "pooler"], "pooler"),
    "loss": (["--loss", "cross-entropy", "--task", "qqp"], "cross-entropy"),
    "rank": (["--rank", "3"], 3),
    "alpha": (["--alpha", "7.5"], 7.5),
    "lora_dropout": (["--lora-dropout", "0.25"], 0.25),
    "targets": (["--targets", "query", "dense"], ("query", "dense")),
    "rank_pattern": (["--rank-pattern", "query=16", "all@0-2=4"], ("query=16", "all@0-2=4")),
    "adapters": (["--adapters", "per-task", "--task", "sst+sts", "--method", "dora"], "per-task"),
    "sampling": (["--sampling", "sqrt", "--task", "sst+sts"], "sqrt"),
    "temperature": (["--temperature", "3", "--sampling", "temperature", "--task", "sst+sts"], 3),
    "task_lr": (["--task-lr", "sts=2e-3", "sst=.1", "--task", "sst+sts"], ("sts=2e-3", "sst=.1")),
    "loss_weight": (["--loss-weight", "sts=.5"], ("sts=.5",)),
    "task_dropout": (["--task-dropout", "sts=0"], ("sts=0",)),
    "epochs": (["--epochs", "4"], 4),
    "max_steps": (["--max-steps", "9"], 9),
    "best": (["--best", "per-task", "--task", "sst+sts"], "per-task"),
    "patience": (["--patience", "3"], 3),
    "patience_of": (["--patience-of", "per-task", "--patience", "3", "--task", "sst+sts"], "per-task"),
    "batch_size": (["--batch-size", "5"], 5),
    "micro_batch_size": (["--micro-batch-size", "3"], 3),
    "recompute": (["--recompute"], True),
    "order": (["--order", "like-length"], "like-length"),
    "lr": (["--lr", "3e-4"], 3e-4),
    "weight_decay": (["--weight-decay", "0.1"], 0.1),
    "max_grad_norm": (["--max-grad-norm", "0"], 0),
    "dropout": (["--dropout", "0"], 0),
    "encoder_dropout": (["--encoder-dropout", "0.2"], 0.2),
    "hidden_layers": (["--hidden-layers", "2"], 2),
    "schedule": (["--schedule", "cosine"], "cosine"),
    "warmup": (["--warmup", "0.06"], 0.06),
    "seed": (["--seed", "11"], 11),
    "device": (["--device", "cuda:1"], "cuda:1"),
    "precision": (["--precision", "bf16"], "bf16"),
    "strict": (["--strict"], True),
    "quotes": (["--quotes", "plain", "--data", "some/folder"], "plain"),
    "own": (["--own", OWN, "--task", "mine"], (OWN,)),
}

NOT_A_FIELD = {"out": "runs/mine", "resume": True, "overfit_batch": False}


def test_every_field_of_config_is_tried_below() -> None:
    assert FLAGS.keys() == {one.name for one in fields(Config)}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_reaches_config(name: str) -> None:
    arguments, value = FLAGS[name]
    config, _ = parse(arguments)
    assert getattr(config, name) == value
    assert getattr(parse([])[0], name) != value


def test_what_is_no_part_of_config_is_given_beside_it() -> None:
    _, given_beside = parse(["--out", "runs/mine", "--resume"])
    assert {name: getattr(given_beside, name) for name in NOT_A_FIELD} == NOT_A_FIELD | {
        "out": Path("runs/mine")
    }


def test_help_shows_every_default() -> None:
    words = re.split(r"\s(?=--)", re.sub(r"\s+", " ", build_parser().format_help().split("options:")[1]))
    shown = {text.split()[0]: text for text in words}
    for one in fields(Config):
        text = shown["--" + one.name.replace("_", "-")]
        if isinstance(one.default, bool):
            continue
        if one.default is None:
            assert re.search(r"\[.+\]$", text), text  # what decides it
        else:
            default = " ".join(one.default) or "none" if isinstance(one.default, tuple) else str(one.default)
            assert text.replace("- ", "-").endswith(f"({default})"), text


REFUSED = {
    "--task: expected sst, qqp, sts": ["--task", "mnli"],
    "--task: expected sst, qqp, sts, or": ["--task", ""],
    "--task: expected sst, qqp": ["--task", "sts+"],
    "--task: expected each task once": ["--task", "sts+sst+sts"],
    "--method: expected one of frozen, full": ["--method", "adapter"],
    "--pair: expected one of": ["--pair", "cross"],
    "--pooling: expected one of": ["--pooling", "max"],
    "--loss: expected mse or pearson or cosent for sts; got": ["--loss", "cross-entropy"],
    "--features: only a Siamese head": ["--features", "uv"],
    "--loss: cosine compares two vectors; add --pair siamese --features cosine": ["--loss", "cosine"],
    "--loss: simcse compares two vectors": ["--loss", "simcse", "--pair", "siamese", "--features", "uv-diff"],
    "--loss: expected mse or pearson or cosent or cosine or simcse or simcse-unsup for sts; got": [
        "--loss",
        "contrastive",
        "--pair",
        "siamese",
    ],
    "--loss: expected cross-entropy or cosine or contrastive or simcse or simcse-unsup for qqp; got mse": [
        "--loss",
        "mse",
        "--pair",
        "siamese",
        "--features",
        "cosine",
        "--task",
        "qqp",
    ],
    "--loss: expected cross-entropy for sst, mse or": [
        "--loss",
        "cosine",
        "--pair",
        "siamese",
        "--task",
        "sst+sts",
    ],
    "--loss simcse: trains the encoder alone": [
        "--loss",
        "simcse",
        "--pair",
        "siamese",
        "--method",
        "frozen",
    ],
    "--hidden-layers: a cosine is": ["--features", "cosine", "--pair", "siamese", "--hidden-layers", "1"],
    "--loss: expected mse or pearson or cosent for sts, cross-entropy for sst": [
        "--task",
        "sts+sst",
        "--loss",
        "mse",
    ],
    "--schedule: expected one of": ["--schedule", "step"],
    "--precision: expected one of": ["--precision", "fp8"],
    "--precision fp16: expected a GPU": ["--precision", "fp16", "--device", "cpu"],
    "--pair siamese: expected a task of sentence pairs": ["--pair", "siamese", "--task", "sst"],
    "--rank: expected a whole number of at least 1, got 0": ["--rank", "0"],
    "--rank: expected a whole number of at least 1, got -1": ["--rank", "-1"],
    "argument --rank: invalid int value": ["--rank", "eight"],
    "--rank: --method full has no adapters": ["--method", "full", "--rank", "4"],
    "--alpha: --method frozen has no adapters": ["--method", "frozen", "--alpha", "4"],
    "--targets: --method full has no adapters": ["--method", "full", "--targets", "query"],
    "--lora-dropout: --method full has no": ["--method", "full", "--lora-dropout", "0.1"],
    "--encoder-dropout: the frozen encoder": ["--method", "frozen", "--encoder-dropout", "0.1"],
    "--alpha: expected a number above 0 and at most 1e+10, got 0": ["--alpha", "0"],
    "--alpha: expected a number above 0 and at most 1e+10, got -": ["--alpha", "-3"],
    "--lora-dropout: expected a number from 0": ["--lora-dropout", "1"],
    "--dropout: expected a number from 0": ["--dropout", "-0.1"],
    "--encoder-dropout: expected a number from 0": ["--encoder-dropout", "nan"],
    "--epochs: expected a whole number of at least 1": ["--epochs", "0"],
    "--max-steps: expected a whole number": ["--max-steps", "0"],
    "--batch-size: expected a whole number": ["--batch-size", "0"],
    "--max-length: expected at least 4": ["--max-length", "3"],
    "--lr: expected a number above 0, got nan": ["--lr", "nan"],
    "--lr: expected a number above 0, got inf": ["--lr", "inf"],
    "--lr: expected a number above 0, got 0": ["--lr", "0"],
    "--weight-decay: expected": ["--weight-decay", "-1"],
    "--max-grad-norm: expected": ["--max-grad-norm", "inf"],
    "--warmup: expected a share": ["--warmup", "1.5"],
    "--hidden-layers: expected": ["--hidden-layers", "-1"],
    "--seed: expected": ["--seed", "-1"],
    "--targets: expected targets among": ["--targets", "pooler"],
    "--rank-pattern: expected TARGET=RANK": ["--rank-pattern", "query"],
    "--rank-pattern: --method full has no adapters": ["--method", "full", "--rank-pattern", "query=2"],
    "--sampling: expected one of round-robin, proportional, sqrt, temperature; got": ["--sampling", "root"],
    "--sampling sqrt: expected several tasks, got --task sts": ["--sampling", "sqrt"],
    "--temperature: expected together with --sampling": ["--temperature", "2"],
    "--temperature: expected together with": ["--sampling", "temperature", "--task", "sst+sts"],
    "--temperature: expected a number of at least 1, got 0.5": ["--temperature", "0.5"],
    "--temperature: expected a number of at least 1, got nan": ["--temperature", "nan"],
    "--task-lr: expected TASK=NUMBER, as in sts=0.5, got 'sts'": ["--task-lr", "sts"],
    "--task-lr: expected tasks of the run, sts; got 'sst'": ["--task-lr", "sst=1e-3"],
    "--task-lr: expected tasks of the run, sts; got ''": ["--task-lr", "=1e-3"],
    "--task-lr: expected each task once, got 'sts' twice": ["--task-lr", "sts=1", "sts=1"],
    "--task-lr: expected a number above 0 for sts, got '-1'": ["--task-lr", "sts=-1"],
    "--task-lr: expected a number above 0 for sts, got ''": ["--task-lr", "sts="],
    "--loss-weight: expected a number above 0 for sts, got '0'": ["--loss-weight", "sts=0"],
    "--loss-weight: expected a number above 0 for sts, got 'inf'": ["--loss-weight", "sts=inf"],
    "--task-dropout: expected a number from 0 to 0.999 for sts, got '1'": ["--task-dropout", "sts=1"],
    "--task-dropout: expected a number from 0 to 0.999 for sts, got 'x=1'": ["--task-dropout", "sts=x=1"],
    "--best: expected one of mean, per-task; got 'last'": ["--best", "last"],
    "--best per-task: expected several tasks and a method with adapters, got --task sts --method rslora": [
        "--best",
        "per-task",
    ],
    "--best per-task: expected several tasks and a method with adapters, got --task sst+sts --method full": [
        "--best",
        "per-task",
        "--task",
        "sst+sts",
        "--method",
        "full",
    ],
    "--patience: expected a whole number of at least 1, got 0": ["--patience", "0"],
    "--adapters per-task: expected several tasks and a method with adapters, got --task sts --method lora": [
        "--adapters",
        "per-task",
        "--task",
        "sts",
        "--method",
        "lora",
    ],
    "--adapters per-task: expected several tasks and a method with adapters, "
    "got --task sst+sts --method full": [
        "--adapters",
        "per-task",
        "--task",
        "sst+sts",
        "--method",
        "full",
    ],
    "--loss simcse-unsup: reads a batch twice, --adapters per-task reads it once": [
        "--adapters",
        "per-task",
        "--task",
        "qqp+sts",
        "--pair",
        "siamese",
        "--features",
        "cosine",
        "--loss",
        "simcse-unsup",
    ],
    "--patience-of per-task: expected several tasks and --patience, got --task sst+sts, --patience None": [
        "--patience-of",
        "per-task",
        "--task",
        "sst+sts",
    ],
    "--patience-of per-task: expected several tasks and --patience, got --task sts, --patience 2": [
        "--patience-of",
        "per-task",
        "--patience",
        "2",
    ],
    "--resume: expected --out": ["--resume"],
    "--overfit-batch: writes nothing": ["--overfit-batch", "--out", "x"],
    "unrecognized arguments: --learning-rate": ["--learning-rate", "1"],
    "unrecognized arguments: --epoch": ["--epoch", "1"],  # no abbreviations
    "unrecognized arguments: sts": ["sts"],
}


@pytest.mark.parametrize(("message", "arguments"), REFUSED.items(), ids=map(" ".join, REFUSED.values()))
def test_a_setting_that_makes_no_sense_is_refused_by_name(
    message: str, arguments: list[str], refusal
) -> None:
    assert refusal(parse, arguments).startswith(message)


@pytest.mark.parametrize("arguments", [["--help"], ["--rank", "0"]])
def test_help_and_usage_errors_answer_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['tokenizers'] = None\n"
        "import train; from training.exit import run_command; sys.exit(run_command(train.main))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == (0 if arguments == ["--help"] else 2), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("rank", [1, 8, 13])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_the_default_alpha_makes_an_effective_scale_of_2(method: str, rank: int) -> None:
    assert math.isclose(check(Config(method=method, rank=rank)).scaling, 2)


@pytest.mark.parametrize(
    ("method", "scale"), [("lora", 12 / 9), ("dora", 12 / 9), ("rslora", 4.0), ("full", None)]
)
def test_the_effective_scale_is_alpha_by_rank_or_its_root(method: str, scale: float | None) -> None:
    adapters = {"rank": 9, "alpha": 12.0} if scale else {}
    assert check(Config(method=method, **adapters)).scaling == (scale and pytest.approx(scale, rel=1e-12))


def test_the_default_learning_rates_are_those_help_shows() -> None:
    text = re.sub(r"\s+", " ", build_parser().format_help())
    for method in METHODS:
        assert f"{method} {check(Config(method=method)).lr:g}" in text


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any settings that `check` takes."""
    method = draw(st.sampled_from(sorted(METHODS)))
    tasks = draw(st.lists(st.sampled_from(["sst", "qqp", "sts"]), min_size=1, max_size=3, unique=True))
    share = st.floats(0, 0.999)
    some = {
        "method": method,
        "task": "+".join(tasks),
        "model": draw(st.text()),
        "data": draw(st.text()),
        "max_length": draw(st.integers(4, 2**31 - 1)),
        "pooling": draw(st.sampled_from([None, "cls", "pooler", "mean"])),
        "epochs": draw(st.none() | st.integers(1, 2**31 - 1)),
        "max_steps": draw(st.none() | st.integers(1, 2**31 - 1)),
        "batch_size": draw(st.integers(1, 2**31 - 1)),
        "lr": draw(st.none() | st.floats(1e-12, 1e3)),
        "weight_decay": draw(st.floats(0, 1e6)),
        "dropout": draw(share),
        "warmup": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "strict": draw(st.booleans()),
    }
    if len(tasks) > 1:
        some["sampling"] = draw(st.sampled_from(["round-robin", "proportional", "sqrt", "temperature"]))
        some["temperature"] = draw(st.floats(1, 1e9)) if some["sampling"] == "temperature" else None
    some["task_lr"] = tuple(f"{task}={draw(st.floats(1e-12, 1e3))}" for task in tasks if draw(st.booleans()))
    if METHODS[method].layer:
        some["rank"] = draw(st.integers(1, 2**31 - 1))
        some["alpha"] = draw(st.none() | st.floats(1e-9, 1e9) | st.integers(1, 10**9))
        some["lora_dropout"] = draw(share)
        some["targets"] = tuple(draw(st.lists(st.sampled_from(["all", "query", "dense"]), min_size=1)))
    if method != "frozen":
        some["encoder_dropout"] = draw(st.none() | share)
    if tasks != ["sst"] and draw(st.booleans()):
        features = draw(st.sampled_from([None, "uv", "uv-diff", "uv-diff-prod", "cosine"]))
        some |= {"pair": "siamese", "features": features}
    if tasks == ["sts"]:
        trains = method != "frozen" and some.get("features") == "cosine"
        losses = ["mse", "pearson", "cosent", *(SIDE_LOSSES if trains else ())]
        some["loss"] = draw(st.none() | st.sampled_from(losses).filter(lambda name: name != "contrastive"))
    return check(Config(**some))


@given(configs())
def test_a_config_comes_back_from_json_as_it_was(config: Config) -> None:
    assert from_dict(json.loads(json.dumps(to_dict(config), allow_nan=False)), "here") == config
    assert check(config) == config


@given(configs())
def test_the_command_of_a_config_makes_that_config_through_a_shell_too(config: Config) -> None:
    assume("--" not in (config.model, config.data))  # which argparse itself cannot be given
    python, script, *arguments = shlex.split(shlex.join(command_of(config)))
    assert (python, script) == ("python", "train.py")
    assert parse(arguments)[0] == config


@pytest.mark.parametrize("name", sorted(FLAGS.keys() - {"loss"}))  # which follows from the task
def test_the_command_of_a_config_names_a_setting_that_was_given(name: str) -> None:
    config, _ = parse(FLAGS[name][0])
    assert getattr(config, name) == chosen(config)[name] == FLAGS[name][1]
    assert parse(command_of(config)[2:])[0] == config


def test_the_command_of_a_config_is_silent_about_what_follows_from_the_rest() -> None:
    config, _ = parse(["--method", "lora", "--rank", "16", "--alpha", "32", "--lr", "1e-3", "--loss", "mse"])
    assert command_of(config) == ["python", "train.py", "--method", "lora", "--rank", "16"]
    assert command_of(check(Config())) == ["python", "train.py"]


def test_the_command_of_an_unfinished_run_goes_on_with_it() -> None:
    config, given = parse(command_of(check(Config(seed=3)), Path("my runs/a"), resume=True)[2:])
    assert (config.seed, given.out, given.resume) == (3, Path("my runs/a"), True)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)


@given(st.dictionaries(st.sampled_from(sorted(FLAGS)), anything, min_size=1, max_size=3))
def test_a_damaged_config_is_read_or_refused_with_its_place(damage: dict) -> None:
    said = "here: read"
    try:
        from_dict(to_dict(check(Config())) | damage, "here")
    except InputError as error:  # and no other
        said = str(error)
    assert said.startswith("here: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("colour", 1, "unknown key 'colour'"),
        ("rank", "8", "expected rank to be int, got '8'"),
        ("rank", 8.0, "expected rank to be int, got 8.0"),
        ("rank", True, "expected rank to be int, got True"),
        ("strict", 1, "expected strict to be bool, got 1"),
        ("lr", "fast", "expected lr to be float | None, got 'fast'"),
        ("task", None, "expected task to be str, got None"),
        ("targets", "all", "expected targets to be a list of names, got 'all'"),
        ("rank", 0, "--rank: expected a whole number of at least 1, got 0"),
    ],
)
def test_a_key_that_is_wrong_is_named(key: str, value: object, message: str, refusal) -> None:
    raw = to_dict(check(Config())) | {key: value}
    assert refusal(from_dict, raw, "c.json") == f"c.json: {message}"


def test_a_missing_key_is_named(refusal) -> None:
    raw = to_dict(check(Config()))
    del raw["seed"]
    assert refusal(from_dict, raw, "c.json") == "c.json: missing key 'seed'"


def test_reading_a_config_changes_neither_the_dict_nor_the_config() -> None:
    raw = to_dict(check(Config()))
    config, copy = from_dict(raw, "here"), json.loads(json.dumps(raw))
    to_dict(config)["targets"].append("query")
    assert raw == copy
    assert config.targets == ("all",)


OLD = ("rank_pattern", "adapters", "sampling", "temperature", "task_lr", "loss_weight", "task_dropout",
       "best", "patience", "patience_of")  # fmt: skip


def test_a_setting_that_older_runs_lack_has_its_default() -> None:
    several = {"task": "sst+sts", "sampling": "temperature", "temperature": 3.0}
    several |= {"patience": 2, "best": "per-task", "patience_of": "per-task", "adapters": "per-task"}
    each = dict.fromkeys(("task_lr", "loss_weight", "task_dropout"), ("sst=.1",))
    raw = to_dict(check(Config(rank_pattern=("query=2",), **several, **each)))
    for name in OLD:
        del raw[name]
    read, default = from_dict(raw, "c.json"), Config()
    assert {name: getattr(read, name) for name in OLD} == {name: getattr(default, name) for name in OLD}


@pytest.mark.parametrize(
    ("sampling", "temperature"), [("round-robin", math.inf), ("proportional", 1), ("sqrt", 2)]
)
def test_each_strategy_is_a_temperature(sampling: str, temperature: float) -> None:
    assert check(Config(task="sst+sts", sampling=sampling)).mixing_temperature == temperature


def test_a_number_by_task_has_a_default_for_the_others() -> None:
    config = check(Config(task="sst+qqp+sts", loss_weight=("sts=.5", "sst=2")))
    assert config.by_task("loss_weight", 1.0) == {"sst": 2.0, "qqp": 1.0, "sts": 0.5}
