"""A run's folder: what a run leaves behind, and how it is read back.

config.json  metrics.jsonl  steps.jsonl  result.json  predictions-{dev,test}.csv
adapter/ (LoRA methods; see adapter_folder.py) or model/ (full)  head.safetensors  checkpoint/
README.md (the model card)  NAME.toml (an own task)  profile.txt  trace.json (--profile)
adapter-TASK/ (--best per-task; --adapters per-task, which has no adapter/)
"""

import csv
import io
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora.by_task import with_adapters_of
from lora.methods import METHODS
from minibert.errors import InputError
from minibert.family import CONFIG as MODEL_CONFIG
from minibert.files import (
    check_folder,
    check_regular,
    leftovers,
    object_in,
    read_json,
    write_json,
    write_safetensors,
    write_text,
)
from minibert.hub import resolve
from minibert.intended import write_intended
from minibert.tokenizer import Tokenizer
from minibert.weights import save_bert
from tasks.base import Task
from tasks.model import TaskModel
from tasks.own import located, to_toml
from training.adapter_folder import (
    CARD,
    HEAD,
    check_decided,
    load_adapter_folder,
    load_heads,
    read_card,
    save_adapter_folder,
)
from training.build import build_heads, build_tokenizer, load_encoder
from training.config import OF_SEVERAL, Config, check, from_dict, to_dict
from training.evaluate import Prediction
from training.provenance import check_sha256

PLACES = ("model", "data", "device")  # settings that may be changed in a finished run's config.json


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def steps(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def card(self) -> Path:
        """The model card, for people; minibert.json is an adapter's own."""
        return self.path / "README.md"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def head(self) -> Path:
        return self.path / HEAD

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def adapter_of(self, task: str) -> Path:
        """A task's own adapter, or what --best per-task keeps of the task's own best epoch."""
        return self.path / f"adapter-{task}"

    @property
    def is_adapter(self) -> bool:
        """Whether the path is no run's but that of an adapter folder, which can be used alone."""
        return (self.path / CARD).is_file()

    def check_free(self, resume: bool) -> None:
        """Before anything is loaded.

        Raises:
            InputError: if the folder cannot be made, or holds something else, or a run not to be resumed.
        """
        there = check_folder(self.path, "--out")
        if there != self.path or set(self.path.iterdir()) <= set(leftovers(self.path)):
            return
        if not self.config.is_file():
            raise InputError(f"--out: expected a new or empty folder, {self.path} holds something else")
        if not resume:
            raise InputError(f"--out: {self.path} holds a run already; --resume continues it")

    def predictions(self, split: str, task: str, only: bool) -> Path:
        return self.path / (f"predictions-{split}.csv" if only else f"predictions-{split}-{task}.csv")


def read_run_config(run: RunFolder) -> Config:
    if run.is_adapter:
        return read_card(run.path).config
    config = from_dict(read_json(run.config), str(run.config))
    check_decided(config, run.config)
    return config


def start_run(run: RunFolder, config: Config) -> None:
    """Create the folder with its config.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        for text in config.own:
            table = json.loads(text)
            write_text(to_toml(located(table, Path(config.data))), run.path / f"{table['name']}.toml")
        write_json(to_dict(config), run.config)
    except OSError as error:
        raise InputError(f"--out: {run.path} cannot be written ({error.strerror or error})") from None


def append_line(line: dict, path: Path) -> None:
    """Written at once, so that a run can be watched. Raises OSError, naming the file, if it cannot be."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def keep_lines(path: Path, key: str, most: int) -> None:
    """Of a .jsonl file, keep the lines whose `key` is at most `most`; a resumed run writes the rest anew."""
    if not path.exists():
        return
    kept = []
    check_regular(path)
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)[key] <= most:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # a killed run's last line is torn; its step is done again
            break
    write_text("".join(f"{line}\n" for line in kept), path)


def save_model(run: RunFolder, config: Config, model: TaskModel, base: Path) -> None:
    """Write what was trained: an adapter or the whole encoder, and the heads."""
    write_safetensors(model.heads.state_dict(), run.head)
    method = METHODS[config.method]
    if config.adapters == "per-task":
        for task in config.tasks:
            save_adapter_folder(run.adapter_of(task.name), *of_task(config, model, task), base)
    elif method.layer:
        save_adapter_folder(run.adapter, config, model, base)
    elif method.trains_encoder:
        save_bert(model.bert, run.path / "model")
        build_tokenizer(config, base).save(run.path / "model")
        if config.pooling != "pooler":  # which sentence-transformers has not
            size = model.bert.config.hidden_size
            write_intended(config.pooling, config.max_length, size, run.path / "model")


def of_task(config: Config, model: TaskModel, task: Task) -> tuple[Config, TaskModel]:
    """Of a model with an adapter for each task what a run of one task has; all weights are shared."""
    one = OF_SEVERAL | {"task": task.name, "loss": None}
    if not config.siamese(task):
        one |= {"pair": "concat", "features": None}
    bert, heads = with_adapters_of(model.bert, task.name), {task.name: model.heads[task.name]}
    return check(replace(config, **one)), TaskModel(bert, config.pooling, heads)


def load_run(path: Path, task: str | None = None) -> tuple[Config, TaskModel, Tokenizer]:
    """The model of a finished run, or of its adapter folder alone, in fp32 on the CPU, ready to predict.

    A run with an adapter for each task has a model for each: `task` says which.

    Raises:
        InputError: if the folder is neither, or a file in it is missing, damaged or does not fit.
    """
    run = RunFolder(path)
    if run.is_adapter:
        config = read_run_config(run)
        return config, *load_adapter_folder(path, config, run.head)
    if not run.config.is_file():
        raise InputError(f"{path}: expected a run's folder, there is no {run.config.name} in it")
    if not run.result.is_file():
        raise InputError(f"{path}: the run is not finished; train.py --resume --out {path} goes on with it")
    config = read_run_config(run)
    method = METHODS[config.method]
    if config.adapters == "per-task":
        if task is None:
            folders = " or ".join(str(run.adapter_of(one.name)) for one in config.tasks)
            raise InputError(f"{path}: has an adapter for each task; use {folders}")
        return load_run(run.adapter_of(task))
    if method.layer:
        return config, *load_adapter_folder(run.adapter, config, run.head)
    folder = path / "model" if method.trains_encoder else resolve(config.model)
    if method.trains_encoder and not (folder / MODEL_CONFIG).is_file():
        raise InputError(f"{folder}: expected the trained model, there is none")
    bert = load_encoder(replace(config, precision="fp32"), folder)
    model = TaskModel(bert, config.pooling, build_heads(config, bert.config.hidden_size))
    load_heads(model, run.head)
    return config, model.eval(), build_tokenizer(config, folder)


def check_unchanged(path: Path, config: Config) -> None:
    """To be asked once the run is loaded: what does not fit says more of itself than that it has changed.

    An adapter folder that stands alone, and a run of an older version, say nothing of their own hashes.

    Raises:
        InputError: if a file of a finished run is not what its result.json says.
    """
    run = RunFolder(path)
    if run.is_adapter:
        return
    result, now = read_json(run.result), to_dict(config)
    for name, value in object_in(result, "config", run.result).items():
        if name not in PLACES and now.get(name) != value:
            raise InputError(
                f"{run.config}: expected {name} {value!r} as {run.result} says, got {now.get(name)!r}"
            )
    files = object_in(result, "files", run.result)
    if "files" in result and HEAD not in files:
        raise InputError(f"{run.result}: expected files to name {HEAD}, got {reprlib.repr(files)}")
    read_back = (HEAD, "model/", "adapter-" if config.adapters == "per-task" else "adapter/")
    check_sha256(run.path, {name: files[name] for name in files if name.startswith(read_back)}, run.result)
    if config.method != "full":
        known = object_in(object_in(result, "sha256", run.result), "model", run.result)
        check_sha256(resolve(config.model), known, run.result)


def predictions_csv(task: Task, prediction: Prediction) -> str:
    """id, prediction (class or score) and, for classes, the probability of each: p0 to pC-1, or p_NAME."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    probabilities = prediction.probabilities
    classes = len(task.class_names)
    writer.writerow(["id", "prediction", *task.probability_columns])
    for i, name in enumerate(prediction.ids):
        value = prediction.predictions[i]
        given = task.class_names[value] if classes else f"{value:.9g}"  # all that fp32 holds
        writer.writerow([name, given, *(f"{probabilities[i, c]:.6f}" for c in range(classes))])
    return text.getvalue()


def write_predictions(
    run: RunFolder, split: str, tasks: Sequence[Task], predictions: Mapping[str, Prediction]
) -> None:
    for task in tasks:
        if task.name in predictions:
            text = predictions_csv(task, predictions[task.name])
            write_text(text, run.predictions(split, task.name, only=len(predictions) == 1))
