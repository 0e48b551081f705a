"""A finished run as a folder that transformers opens, a Siamese one sentence-transformers too.

config.json  model.safetensors  tokenizer.json  tokenizer_config.json
head.safetensors (where it is not in the model)
modules.json  1_Pooling/  sentence_bert_config.json  config_sentence_transformers.json (Siamese)
"""

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lora.methods import merge
from minibert.errors import InputError
from minibert.family import CONFIG
from minibert.files import read_json, read_safetensors, write_json, write_safetensors
from minibert.intended import write_intended
from minibert.model import Bert
from minibert.sources import WEIGHTS
from minibert.tokenizer import Tokenizer
from minibert.weights import read_config, save_bert, split_checkpoint
from tasks.base import Task
from tasks.model import TaskModel
from training.adapter_folder import example_texts, logits_of, pooled_classifier
from training.build import build_heads, build_tokenizer
from training.config import Config
from training.run_folder import RunFolder, load_run


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the run."""

    config: Config
    model: TaskModel  # the run's own, adapters and all
    has_classifier: bool  # the head is in the model's file
    has_pooling: bool  # sentence-transformers' files are there
    logit_error: float  # max |Δ| over a few examples
    max_logit: float


def export(path: Path, out: Path, dtype: torch.dtype) -> Exported:
    """Write a run's model with its adapters merged, all weights in `dtype`; `out` is whole or not there.

    Raises:
        InputError: if the run cannot be used, or `out` is no new or empty folder outside of it.
        OSError: if it cannot be written.
    """
    with filling(out, path) as folder:
        config, model, tokenizer = load_run(path)
        classifier = pooled_classifier(config, model)
        write_model(model.bert, classifier, config, dtype, folder)
        if classifier is None:
            shutil.copyfile(RunFolder(path).head, folder / RunFolder(folder).head.name)
        tokenizer.save(folder)
        has_pooling = config.pair == "siamese" and config.pooling != "pooler"
        if has_pooling:
            write_intended(config.pooling, config.max_length, model.bert.config.hidden_size, folder)
        expected = example_logits(config, model, tokenizer)
        got = example_logits(config, *read_back(config, folder))
    error, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    return Exported(config, model, classifier is not None, has_pooling, error, largest)


@contextmanager
def filling(out: Path, run: Path) -> Iterator[Path]:
    """A folder to fill, aside and on the same file system, that becomes `out` at the end if nothing fails.

    Raises:
        InputError: if `out` is no new or empty folder, lies within `run`, or cannot be made.
    """
    target, source = Path(os.path.realpath(out)), Path(os.path.realpath(run))
    if target.is_relative_to(source):
        raise InputError(f"OUT: expected a folder outside of the run, got {out}")
    there = next(one for one in (target, *target.parents) if os.path.lexists(one))
    if not there.is_dir() or (there == target and any(there.iterdir())):
        raise InputError(f"OUT: expected a new or empty folder, {there if there != target else out} is none")
    beside = there.parent if there == target else there
    if not os.access(beside, os.W_OK | os.X_OK):
        raise InputError(f"OUT: expected a folder that can be written, {beside} is none")
    with TemporaryDirectory(prefix=".merge-", dir=beside) as temporary:
        folder = Path(temporary) / "out"  # the temporary folder itself is for its owner's eyes alone
        folder.mkdir()
        yield folder
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.replace(target)


def write_model(
    bert: Bert, classifier: dict[str, Tensor] | None, config: Config, dtype: torch.dtype, folder: Path
) -> None:
    """`BertModel`, or with a classifier `BertForSequenceClassification`: each key with `bert.` before it.

    Raises:
        InputError: if a weight is beyond what `dtype` holds.
    """
    bert = copy.deepcopy(merge(bert, dtype)).to(dtype)  # .to() is in place, and merge shares what it can
    if not all(tensor.isfinite().all() for tensor in bert.state_dict().values()):
        raise InputError(f"--dtype: expected one that holds the run's weights, {dtype} overflows")
    save_bert(bert, folder)
    if classifier is None:
        return
    state = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    state |= {f"classifier.{name}": tensor.to(dtype) for name, tensor in classifier.items()}
    write_safetensors(state, folder / WEIGHTS)
    write_json(
        read_json(folder / CONFIG) | _classifier_config(config.tasks[0], config.dropout), folder / CONFIG
    )


def _classifier_config(task: Task, dropout: float) -> dict:
    names = [f"LABEL_{i}" for i in range(task.num_outputs)]
    return {
        "architectures": ["BertForSequenceClassification"],
        "problem_type": "single_label_classification" if task.is_classification else "regression",
        "num_labels": task.num_outputs,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "classifier_dropout": dropout,
    }


def read_back(config: Config, folder: Path) -> tuple[TaskModel, Tokenizer]:
    """The exported model from its files alone, in fp32."""
    state, classifier = (
        {name: tensor.float() for name, tensor in part.items()} for part in split_checkpoint(folder)
    )
    with torch.device("meta"):
        bert = Bert(read_config(folder), with_pooler="pooler.dense.weight" in state)
    bert.load_state_dict(state, assign=True)
    model = TaskModel(bert, config.pooling, build_heads(config, bert.config.hidden_size))
    if classifier:
        output = model.heads[config.task].output
        output.load_state_dict({name.removeprefix("classifier."): one for name, one in classifier.items()})
    else:
        model.heads.load_state_dict(read_safetensors(RunFolder(folder).head))
    return model.eval(), build_tokenizer(config, folder)


def example_logits(config: Config, model: TaskModel, tokenizer: Tokenizer) -> Tensor:
    """Every task's logits for a few sentences, in one row."""
    logits = [logits_of(config, model, tokenizer, task, example_texts(task)) for task in config.tasks]
    return torch.cat([one.flatten() for one in logits])
