"""A run's adapter folder, which can be used without the run: PEFT's two files, the heads, and minibert.json.

minibert.json says how the adapter is used (tasks, pairs, pooling, ...), which base model it belongs to (the
SHA-256 of the weights), and what a few sentences come out as: an adapter on another base, or with another
head, tokenizer or computation, would still load, and be wrong without a word.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora.adapter_io import load_adapter, save_adapter
from minibert.errors import InputError
from minibert.files import check_fits, read_json, read_safetensors, write_json, write_safetensors
from minibert.hub import resolve, same_weights
from minibert.sources import weight_files
from minibert.tokenizer import Tokenizer
from tasks.base import Example, Task
from tasks.data import Dataset
from tasks.model import TaskModel
from training.build import build_heads, build_tokenizer, load_encoder
from training.config import Config, from_dict, to_dict
from training.provenance import model_sha256

CARD = "minibert.json"
HEAD = "head.safetensors"

# The settings that say what is computed; the rest only said how it was trained, but for these others:
SETTINGS = ("task", "method", "pair", "features", "pooling", "max_length", "hidden_layers", "targets")
# The base's name, how files are read, and own tasks without their files: older cards do not say all of it.
OTHERS = ("model", "quotes", "own")

# Our own sentences, not the data's, which may be private.
SENTENCES = (
    "A man is playing a guitar.",
    "Somebody plays an instrument on stage.",
    "The film is long, loud and not at all funny.",
)
# Another CPU or release of PyTorch sums in another order, which moves fp32 logits by up to 1e-4 after 12
# layers; another base, head or adapter moves them by far more than ten times that.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Card:
    """What minibert.json holds; `golden` is task -> (texts, logits) of each example."""

    config: Config
    sha256: dict[str, str]
    golden: dict[str, list[tuple[tuple[str, ...], list[float]]]]


def save_adapter_folder(folder: Path, config: Config, model: TaskModel, base: Path) -> None:
    save_adapter(
        model.bert,
        folder,
        method=config.method,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        base=config.model,
        classifier=pooled_classifier(config, model),
        published=model.bert.config.family.published,
    )
    write_safetensors(model.heads.state_dict(), folder / HEAD)
    # The golden outputs are those of the files, in fp32 on the CPU, whatever the run computed with.
    saved, tokenizer = _open(folder, config, base, folder / HEAD)
    golden = {}
    for task in config.tasks:
        texts = example_texts(task)
        rows = zip(texts, _rounded(logits_of(config, saved, tokenizer, task, texts)), strict=True)
        golden[task.name] = [{"texts": one, "logits": logits} for one, logits in rows]
    about = {name: value for name, value in to_dict(config).items() if name in (*SETTINGS, *OTHERS)}
    about["own"] = [{key: value for key, value in one.items() if key != "files"} for one in about["own"]]
    about["outputs"] = {task.name: task.num_outputs for task in config.tasks}
    write_json(about | {"sha256": weights_sha256(base), "golden": golden}, folder / CARD)


def pooled_classifier(config: Config, model: TaskModel) -> dict[str, Tensor] | None:
    """The head, where it is what transformers' BertForSequenceClassification has: linear, on the pooler."""
    siamese = any(config.siamese(task) for task in config.tasks)
    if model.bert.config.model_type != "bert":
        return None
    if config.pooling != "pooler" or config.hidden_layers or siamese or len(config.tasks) > 1:
        return None
    return model.heads[config.task].output.state_dict()


def load_adapter_folder(folder: Path, config: Config, head: Path) -> tuple[TaskModel, Tokenizer]:
    """The model in an adapter folder, in fp32 on the CPU.

    Raises:
        InputError: if a file is damaged, the base model is another or cannot be had, or the golden examples
            come out otherwise than when the folder was written.
    """
    card, where = read_card(folder), folder / CARD
    for name in SETTINGS:
        written, now = getattr(card.config, name), getattr(config, name)
        if written != now:
            raise InputError(f"{where}: expected {name} {now!r} as in the run's config.json, got {written!r}")
    base = resolve(config.model)
    found = weights_sha256(base)
    for file in sorted({*card.sha256, *found}):
        expected, got = card.sha256.get(file, "no such file"), found.get(file, "no such file")
        if expected != got:
            raise InputError(
                f"{base / file}: expected the base model of {where}, sha256 {expected}, got {got}"
            )
    # The weights are those of the card's model, whatever place config.json may give for them now.
    model, tokenizer = _open(folder, replace(config, model=card.config.model), base, head)
    for task in config.tasks:
        texts, logits = zip(*card.golden[task.name], strict=True)
        got = logits_of(config, model, tokenizer, task, texts)
        _check_golden(f"{where}: {task.name}", texts, logits, got)
    return model, tokenizer


def weights_sha256(base: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights in a folder that `resolve` gave."""
    return model_sha256(base, weight_files(base))


def read_card(folder: Path) -> Card:
    """Raises:
    InputError: if minibert.json is missing or damaged, or of tasks that are others here.
    """
    path = folder / CARD
    raw = read_json(path)
    missing = {*SETTINGS, "model", "outputs", "sha256", "golden"} - raw.keys()
    if missing:
        raise InputError(f"{path}: missing key {min(missing)!r}")
    config = from_dict(
        to_dict(Config()) | {name: raw[name] for name in (*SETTINGS, *OTHERS) if name in raw}, str(path)
    )
    check_decided(config, path)
    outputs = {task.name: task.num_outputs for task in config.tasks}
    if raw["outputs"] != outputs:
        raise InputError(f"{path}: expected outputs {outputs}, got {raw['outputs']!r}")
    golden = {task.name: _read_golden(raw["golden"], task, f"{path}: golden") for task in config.tasks}
    if not isinstance(raw["sha256"], dict):
        raise InputError(f"{path}: expected sha256 to be an object, got {raw['sha256']!r}")
    return Card(config, raw["sha256"], golden)


def check_decided(config: Config, path: Path) -> None:
    """Raises InputError if the config that was read from a file leaves open what a run has decided."""
    for name in ("pooling", "max_length"):
        if getattr(config, name) is None:
            raise InputError(f"{path}: expected a {name}, got none")


def _read_golden(golden: object, task: Task, where: str) -> list[tuple[tuple[str, ...], list[float]]]:
    try:
        rows = [(tuple(row["texts"]), row["logits"]) for row in golden[task.name]]
        "".join(text for texts, _ in rows for text in texts).encode()  # fails for what is no text
        sound = rows and all(
            len(texts) == len(task.text_columns) and list(map(type, logits)) == [float] * task.num_outputs
            for texts, logits in rows
        )
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        wanted = f"{len(task.text_columns)} texts and {task.num_outputs} logits"
        raise InputError(f"{where}: expected examples of {task.name} with {wanted} each")
    return rows


def _open(folder: Path, config: Config, base: Path, head: Path) -> tuple[TaskModel, Tokenizer]:
    bert = load_encoder(replace(config, precision="fp32", encoder_dropout=0.0), base)
    load_adapter(
        bert,
        folder,
        targets=config.targets,
        is_base=partial(same_weights, config.model),
        published=bert.config.family.published,
    )
    model = TaskModel(bert, config.pooling, build_heads(config, bert.config.hidden_size))
    load_heads(model, head)
    return model.eval(), build_tokenizer(config, base)


def load_heads(model: TaskModel, file: Path) -> None:
    state = read_safetensors(file)
    check_fits(state, model.heads.state_dict(), f"{file}: does not fit the settings")
    model.heads.load_state_dict(state)


def example_texts(task: Task) -> list[tuple[str, ...]]:
    """Each sentence, for a task of pairs with the next."""
    return [(SENTENCES * 2)[i : i + len(task.text_columns)] for i in range(len(SENTENCES))]


@torch.no_grad()
def logits_of(config: Config, model: TaskModel, tokenizer: Tokenizer, task: Task, texts: list) -> Tensor:
    """[B, C]"""
    data = Dataset(task, [Example("golden", one, None) for one in texts], tokenizer, config.siamese(task))
    return model(task.name, data.collate(np.arange(len(data))))


def _check_golden(where: str, texts: list, logits: list[list[float]], got: Tensor) -> None:
    wrong = ~torch.isclose(got, torch.tensor(logits), rtol=TOLERANCE, atol=TOLERANCE).all(dim=1)  # [B]
    if wrong.any():
        i = int(wrong.nonzero()[0])
        text = " / ".join(texts[i])
        raise InputError(f"{where}: expected {text!r} to come out as {logits[i]}, got {_rounded(got)[i]}")


def _rounded(logits: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in logits.tolist()]
