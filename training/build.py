"""From a config to what a run needs: files, data, model."""

import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora.by_task import adapt_by_task
from lora.layers import LoRALinear
from lora.methods import LARGEST_ALPHA, METHODS, apply_method
from lora.placement import linear_names, place, place_ranks
from minibert.errors import InputError
from minibert.family import CONFIG
from minibert.files import check_regular
from minibert.hub import PINNED, pinned
from minibert.intended import Choice, read_length, read_pooling
from minibert.model import Bert, BertConfig
from minibert.tokenizer import Tokenizer
from minibert.weights import load_bert, read_config
from tasks.base import Example, Skipped
from tasks.data import Dataset
from tasks.heads import Head
from tasks.model import TaskModel
from tasks.reader import read_split
from training.config import Config, flag
from training.precision import DTYPES, choose_device, choose_precision

DEMO = Path(__file__).parent.parent / "tasks" / "demo"
LONGEST = 256  # tokens of a sequence, where a model does not say
MANY_ROWS = 100_000  # above this, two passes over the data are the default, as in the study


@dataclass(frozen=True)
class Splits:
    """A task's rows, as read."""

    train: list[Example]
    dev: list[Example]
    test: list[Example] | None
    skipped: list[Skipped]


def data_folder(config: Config) -> Path:
    if config.quotes == "plain" and config.data in ("demo", "cs224n"):
        raise InputError(f"--quotes plain: the files of --data {config.data} are quoted as in CSV")
    if config.data == "demo":
        return DEMO
    if config.data == "cs224n":
        from tasks.course import course_folder

        return course_folder([name for task in config.tasks for name in task.files.values()])
    if not os.path.isdir(config.data):  # unlike Path.is_dir, also False for a name too long
        raise InputError(f"--data: expected demo, cs224n or a folder, got {config.data!r}")
    return Path(config.data)


def read_splits(config: Config) -> dict[str, Splits]:
    """The rows of each task of a run; a data folder need not have test files."""
    folder = data_folder(config)
    splits = {}
    for task in config.tasks:
        read = {}
        skipped: list[Skipped] = []
        for split, name in task.files.items():
            # A link to nothing is an error, and so is a file of an own task that is not there.
            if split == "test" and not task.own and not os.path.lexists(folder / name):
                continue
            check_regular(folder / name)  # it is read twice: its hash is what a resumed run asks for
            read[split], left_out = read_split(folder, task, split, config.strict, config.quotes)
            skipped += left_out
        splits[task.name] = Splits(read["train"], read["dev"], read.get("test"), skipped)
    return splits


def default_pooling(folder: Path) -> Choice:
    """The pooling a checkpoint was made for; [CLS] where nothing says otherwise.

    Raises:
        InputError: if it is none that is offered.
    """
    if said := read_pooling(folder):
        return said
    if name := pinned(folder):
        return Choice(PINNED[name].pooling, f"{name}'s own")
    return Choice("cls", "no 1_Pooling/config.json says otherwise")


def default_length(folder: Path) -> Choice:
    """The tokens at which a checkpoint's sequences are cut, at most its positions.

    Raises:
        InputError: if they are too few for two sentences.
    """
    bert = read_config(folder)
    positions = bert.positions
    if positions < 4:
        wanted = f"expected max_position_embeddings to be at least {4 + bert.family.first_position}"
        raise InputError(f"{folder / CONFIG}: {wanted}, got {bert.max_position_embeddings}")
    length = read_length(folder) or Choice(LONGEST, "the default")
    return length if length.value <= positions else Choice(positions, "as many as it has positions")


def decided_by_model(config: Config, folder: Path) -> dict[str, Choice]:
    """The settings that are left to the model."""
    decide = {"pooling": default_pooling, "max_length": default_length}
    return {name: of(folder) for name, of in decide.items() if getattr(config, name) is None}


def complete(config: Config, folder: Path, splits: Mapping[str, Splits] | None = None) -> Config:
    """The config without a None that the model or the data decide.

    Raises:
        InputError: if the model cannot do what the config asks.
    """
    config = replace(config, **{name: one.value for name, one in decided_by_model(config, folder).items()})
    bert = read_config(folder)
    if config.max_length > bert.positions:
        most = bert.positions
        raise InputError(
            f"--max-length: expected at most the model's {most} positions, got {config.max_length}"
        )
    if METHODS[config.method].layer:
        find_adapted(config, bert)
    tells = bert.type_vocab_size > 1 or not bert.family.reads_types  # which tell by the tokens between
    if not tells and config.pair == "concat" and any(task.is_pair for task in config.tasks):
        raise InputError("--pair concat: the model tells no second sentence from the first; use siamese")
    dropout = config.encoder_dropout
    if dropout is None:
        dropout = 0.0 if config.method == "frozen" else bert.hidden_dropout_prob
    if config.loss == "simcse-unsup" and not (dropout or config.lora_dropout):
        raise InputError(
            "--loss simcse-unsup: its two views are by dropout; expected --encoder-dropout above 0"
        )
    rows = max(len(one.train) for one in splits.values()) if splits else 0
    return replace(
        config,
        encoder_dropout=dropout,
        epochs=config.epochs or (2 if rows > MANY_ROWS else 10),
    )


def find_adapted(config: Config, bert: BertConfig) -> dict[str, int]:
    """The layers that get an adapter, by name, and their ranks.

    Raises:
        InputError: if a target matches nothing, adapts what is not used, or a rank is too large.
    """
    linears = linear_names(bert.num_hidden_layers, with_pooler=config.pooling == "pooler")
    at_fault = flag("targets")
    try:
        adapted = dict.fromkeys(place(config.targets, linears), config.rank)
        at_fault = flag("rank_pattern")
        adapted |= place_ranks(config.rank_pattern, list(adapted))
    except ValueError as error:
        raise InputError(f"{at_fault}: {error}") from None
    for name, rank in ((flag("rank"), config.rank), (flag("rank_pattern"), max(adapted.values()))):
        if rank > bert.hidden_size:
            most = bert.hidden_size
            raise InputError(f"{name}: expected at most the model's hidden size {most}, got {rank}")
    for name, alpha in alphas(config, adapted).items():
        if alpha >= LARGEST_ALPHA and adapted[name] != config.rank:
            at_most = f"expected one below {LARGEST_ALPHA:g} at every rank"
            raise InputError(f"--alpha: {at_most}, got {alpha:g} for {name}")
    return adapted


def alphas(config: Config, ranks: Mapping[str, int]) -> dict[str, float]:
    """Each layer's alpha, which gives it the same s whatever its rank."""
    method = METHODS[config.method]
    return {name: config.alpha * method.alpha(r) / method.alpha(config.rank) for name, r in ranks.items()}


def build_tokenizer(config: Config, folder: Path) -> Tokenizer:
    return Tokenizer(folder, config.max_length, read_config(folder).vocab_size)


def load_encoder(config: Config, folder: Path) -> Bert:
    """The bare encoder, frozen, that will compute in the run's precision."""
    bert = load_bert(folder)
    if config.pooling == "pooler" and bert.pooler is None:
        raise InputError(f"--pooling pooler: {folder} has no pooler; use cls or mean")
    bert.compute_dtype = DTYPES[config.precision]
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.encoder_dropout
    return bert.requires_grad_(False)


def build_heads(config: Config, hidden_size: int) -> dict[str, Head]:
    """A head for each task, drawn from the run's seed and the task's name alone."""
    heads, dropout = {}, config.by_task("task_dropout", config.dropout)
    for task in config.tasks:
        features = config.features if config.siamese(task) else None
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(zlib.crc32(f"{config.seed}/{task.name}".encode()))
            heads[task.name] = Head(
                hidden_size, task.num_outputs, config.hidden_layers, dropout[task.name], features
            )
    return heads


def build_model(config: Config, folder: Path) -> TaskModel:
    """The model of a fresh run: encoder with the method applied, and new heads."""
    bert = load_encoder(config, folder)
    method = METHODS[config.method]
    ranks = find_adapted(config, bert.config) if method.layer else {}
    apply_method(
        bert,
        method,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.lora_dropout,
        targets=config.targets,
        ranks=ranks,
        alphas=alphas(config, ranks),
        seed=config.seed,
    )
    if bert.pooler is not None and config.pooling != "pooler":
        bert.pooler.requires_grad_(False)
    if not METHODS[config.method].trains_encoder:
        cast_frozen(bert)
    rows = (
        adapt_by_task(bert, [task.name for task in config.tasks]) if config.adapters == "per-task" else None
    )
    return TaskModel(bert, config.pooling, build_heads(config, bert.config.hidden_size), rows)


@torch.no_grad()
def start_heads(model: TaskModel, train: Mapping[str, Dataset]) -> None:
    """A score's head starts with the mean of its labels as bias, one on a cosine with the cosine.

    Otherwise the first steps go into finding it, and the adapters' first directions with them.
    """
    for name, data in train.items():
        head = model.heads[name]
        if head.features == "cosine":
            head.start_at_cosine(data.task)
        elif not data.task.is_classification:
            head.output.bias.fill_(float(data.labels.mean()))


def compute_in(model: TaskModel, precision: str, device: str) -> torch.device:
    """Have a loaded model compute in a precision on a device; `auto` is the faster one.

    Raises:
        InputError: if there is no such device, or it cannot compute in that precision.
    """
    where = choose_device(device)
    choice = choose_precision(precision, where, model.bert.config)
    if choice.warning:
        print(choice.warning, file=sys.stderr)
    model.bert.compute_dtype = DTYPES[choice.precision]
    if choice.precision != "fp32":  # all weights are loaded in fp32
        cast_frozen(model.bert)
    model.to(where)
    return where


def cast_frozen(bert: Bert) -> None:
    """Keep in the dtype it computes in what stays as it is: not the adapters, nor the weights they adapt.

    Those are copied, so that nothing keeps the checkpoint's whole file mapped into memory.
    """
    for module in bert.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                adapted = isinstance(module, LoRALinear) and name == "weight"
                parameter.data = parameter.data.to(
                    torch.float32 if adapted else bert.compute_dtype, copy=True
                )
