"""What a grid's cells will take, before they run: by the runs that are finished, or by counting.

Counted are multiplications: of T tokens in a sequence, a BERT layer takes 4 H² + 2 H I + 2 T H of each token
forward (its six linears; attention's two products). Training with LoRA's family costs twice that and full
fine-tuning three times (backward through activations, and through weights); a frozen encoder reads each
example once. Scoring reads dev and as much of train after each epoch. Memory is `training.footprint`'s.

Letters: H hidden size, I intermediate size, T tokens of a sequence.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, isnan
from pathlib import Path
from statistics import fmean

import torch

from experiments.cells import Cell
from experiments.pool import GridFolder
from experiments.runs import duration
from experiments.summary import read_records
from lora.methods import METHODS
from minibert.errors import InputError
from minibert.hub import is_local, resolve
from minibert.model import BertConfig
from minibert.weights import read_config
from training.build import LONGEST, MANY_ROWS, read_splits, shape_of_model
from training.config import Config
from training.footprint import footprint
from training.precision import DTYPES, choose_device, choose_precision

TOKENS_PER_WORD = 1.3  # of English by BERT's vocabulary, [CLS] and [SEP] not counted
MEASURED = 0.3  # seconds of matrix products


@dataclass(frozen=True)
class Estimate:
    """Seconds, MiB above what the imports take, and what these rest on; nan where nothing is known."""

    seconds: float
    mib: float
    basis: str

    def __str__(self) -> str:
        memory = "memory unknown" if isnan(self.mib) else f"{self.mib:,.0f} MiB"
        return f"{duration(self.seconds)}, {memory} ({self.basis})"


def estimates(cells: Sequence[Cell], out: Path) -> list[Estimate]:
    """One for each cell. Finished runs of its kind in the folder give the pace and memory, if there are any.

    Raises:
        InputError: if a cell's data, model or device cannot be used.
    """
    folder = GridFolder(out)
    known = finished(folder, {kind(cell.config) for cell in cells})
    found = []
    for cell in cells:
        try:
            found.append(estimate(cell, folder, known))
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from None
    return found


def finished(folder: GridFolder, kinds: set[tuple]) -> dict[tuple, list[tuple[float, float]]]:
    """Seconds per multiplication and MiB of the folder's finished runs of these kinds."""
    known: dict[tuple, list[tuple[float, float]]] = {}
    for path in sorted(folder.path.glob("*/result.json")):
        seconds = folder.seconds(path.parent.name)
        config, mib = taken(path.parent)
        if kind(config) in kinds and not isnan(seconds) and is_local(config.model):
            known.setdefault(kind(config), []).append((seconds / work(config), mib))
    return known


def taken(run: Path) -> tuple[Config, float]:
    """A finished run's settings, and the MiB that it took. Raises InputError as `read_records` does."""
    record = read_records([run])[0]
    return record.config, record.result["memory_above_start_mib"]


def kind(config: Config) -> tuple:
    """What runs have in common that take as long for a multiplication; folders by their whole path."""
    places = [str(Path(one).absolute()) if Path(one).is_dir() else one for one in (config.model, config.data)]
    return config.task, config.pair, config.method, *places


def estimate(cell: Cell, folder: GridFolder, known: Mapping[tuple, list[tuple[float, float]]]) -> Estimate:
    config = cell.config
    if folder.result(cell.name).exists():
        return Estimate(0.0, taken(folder.run(cell.name))[1], "finished")
    if not is_local(config.model):
        return Estimate(float("nan"), float("nan"), f"{config.model} is not downloaded yet")
    if runs := known.get(kind(config)):
        seconds = fmean(one for one, _ in runs) * work(config)
        return Estimate(seconds, max(mib for _, mib in runs), f"as {len(runs)} finished of its kind")
    rate = products_per_second(config.device, config.precision, config.model)
    return Estimate(work(config) / rate, memory(config), "counted")


def work(config: Config) -> float:
    """Multiplications of a whole run."""
    bert, rows = (
        model_config(config.model),
        data_facts(config.data, config.task, config.strict, config.quotes, config.own),
    )
    forward = {}
    for name, one in rows.items():
        tokens = min(one.tokens, config.max_length or LONGEST)
        linears = 4 * bert.hidden_size**2 + 2 * bert.hidden_size * bert.intermediate_size
        forward[name] = bert.num_hidden_layers * tokens * (linears + 2 * tokens * bert.hidden_size)
    largest = max(one.train for one in rows.values())
    per_epoch = len(rows) * ceil(largest / config.batch_size)
    epochs = config.epochs or (2 if largest > MANY_ROWS else 10)
    steps = config.max_steps or epochs * per_epoch
    scorings = 1 if config.method == "frozen" else ceil(steps / per_epoch)
    scored = sum(2 * one.dev * forward[name] for name, one in rows.items()) * scorings
    examples = {name: steps * config.batch_size / len(rows) for name in rows}
    if config.method == "frozen":
        examples = {name: min(count, rows[name].train) for name, count in examples.items()}
    passes = 3 if METHODS[config.method].trains_encoder else 2 if METHODS[config.method].layer else 1
    return scored + passes * sum(count * forward[name] for name, count in examples.items())


def memory(config: Config) -> float:
    """MiB above what the imports take, of batches whose sentences are as long as the first rows are."""
    folder, rows = (
        resolve(config.model),
        data_facts(config.data, config.task, config.strict, config.quotes, config.own),
    )
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device, read_config(folder)).precision
    dropout = 0.1 if config.encoder_dropout is None and config.method != "frozen" else config.encoder_dropout
    known = replace(config, precision=precision, pooling=config.pooling or "mean", encoder_dropout=dropout)
    examples = min(config.batch_size, config.micro_batch_size or config.batch_size)
    sequences = examples * (len(rows) if config.adapters == "per-task" else 1)
    tokens = ceil(sequences * max(min(one.tokens, config.max_length or LONGEST) for one in rows.values()))
    texts = sum(one.train + 2 * one.dev for one in rows.values()) * (2 if config.pair == "siamese" else 1)
    return footprint(known, shape_of_model(known, folder), tokens, sequences, texts).total


@dataclass(frozen=True)
class Rows:
    """Of a task's data: how many rows, and the mean number of tokens of one."""

    train: int
    dev: int
    tokens: float


@cache
def data_facts(data: str, task: str, strict: bool, quotes: str, own: tuple[str, ...]) -> dict[str, Rows]:
    facts = {}
    for name, one in read_splits(Config(data=data, task=task, strict=strict, quotes=quotes, own=own)).items():
        some = one.train[:1000]
        words = fmean(len(text.split()) for example in some for text in example.texts)
        count = len(some[0].texts)
        tokens = count * (words * TOKENS_PER_WORD + 1) + 1
        facts[name] = Rows(len(one.train), len(one.dev), tokens)
    return facts


@cache
def model_config(model: str) -> BertConfig:
    return read_config(resolve(model))


@cache
def products_per_second(device: str, precision: str, model: str) -> float:
    """Multiplications per second of a matrix product as an intermediate layer does it, measured now."""
    where, bert = choose_device(device), model_config(model)
    dtype, hidden = DTYPES[choose_precision(precision, where, bert).precision], bert.hidden_size
    x = torch.ones(1024, hidden, device=where, dtype=dtype)  # [M, H]
    weight = torch.ones(hidden, 4 * hidden, device=where, dtype=dtype)  # [H, 4H]
    (x @ weight).sum().item()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < MEASURED:
        (x @ weight).sum().item()  # .item() waits for a GPU
        count += x.numel() * 4 * hidden
    return count / (time.perf_counter() - began)


def listing(cells: Sequence[Cell], out: Path, jobs: int) -> str:
    """A line a cell and one for all. Raises InputError as `estimates` does."""
    found = estimates(cells, out)
    width = max(len(cell.name) for cell in cells)
    told = [f"{cell.name:<{width}}  {one}" for cell, one in zip(cells, found, strict=True)]
    known = [one.seconds for one in found if not isnan(one.seconds)]
    unknown = f", {len(found) - len(known)} unknown" if len(known) < len(found) else ""
    most = max((one.mib for one in found if not isnan(one.mib)), default=float("nan"))
    total = f"{len(cells)} cells: {duration(sum(known) / jobs)} by {jobs} at once{unknown}"
    told.append(total + ("" if isnan(most) else f", {jobs * most:,.0f} MiB"))
    if any(one.basis == "counted" for one in found):
        told.append(
            "counted: multiplications at the pace of a matrix product measured now, a floor, and bytes above "
            "what the imports take. Finished runs in the folder give better numbers."
        )
    return "\n".join(told)
