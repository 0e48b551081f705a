"""One point of benchmarks.scaling: training steps on synthetic batches, in a process of its own.

`python -m benchmarks.step --model FOLDER --length 64 --batch 16` prints the median seconds of a step and the
peak memory above what imports take, as JSON. Ids are random ones of the real vocabulary, all of one length.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from minibert.tokenizer import Encoded
from minibert.weights import read_config
from tasks import TASKS
from tasks.base import Example
from tasks.data import Dataset
from training.build import build_model, complete
from training.config import Config, check
from training.loop import Trainer
from training.memory import memory_once_imported, peak_memory_mib
from training.precision import choose_device, choose_precision

CPU = torch.device("cpu")
WARM_UP = 3  # steps that are not counted
FIRST_WORD = 1000  # in BERT's uncased vocabulary there are special and unused tokens before it
CLS, SEP = 101, 102


class RandomIds:
    """In the place of a tokenizer: [CLS] ids [SEP] for any text, of `length` in all or each of its own."""

    def __init__(self, length: int | Sequence[int], vocab_size: int):
        self.length, self.vocab_size = length, vocab_size
        self.random = np.random.default_rng(0)

    def __call__(self, texts: Sequence) -> list[Encoded]:
        encoded = []
        for length in np.broadcast_to(self.length, len(texts)).tolist():
            words = self.random.integers(FIRST_WORD, self.vocab_size, length - 2).tolist()
            encoded.append(Encoded([CLS, *words, SEP], [0] * length))
        return encoded


def build_trainer(
    config: Config, folder: Path, device: torch.device = CPU, lengths: Sequence[int] | None = None
) -> Trainer:
    """A trainer whose every batch has batch_size examples, of max_length tokens or of these lengths."""
    precision = choose_precision(config.precision, device, read_config(folder)).precision
    config = complete(replace(config, device=str(device), precision=precision), folder)
    examples = [Example(str(i), ("", ""), 5.0 * (i % 2)) for i in range(config.batch_size)]
    ids = RandomIds(lengths or config.max_length, read_config(folder).vocab_size)
    data = Dataset(TASKS["sts"], examples, ids)
    return Trainer(config, build_model(config, folder), {"sts": data}, device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--method", default="lora")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    start = memory_once_imported()
    adapters = {} if given.rank is None else {"rank": given.rank}
    size = {"max_length": given.length, "batch_size": given.batch, "max_steps": WARM_UP + given.steps}
    config = check(Config(task="sts", method=given.method, pooling="mean", **size, **adapters))
    trainer = build_trainer(config, given.model, device := choose_device(given.device))
    trainer.model.train()
    seconds = []
    while not trainer.finished:
        trainer.step()
        seconds.append(trainer.step_seconds)
    peak = peak_memory_mib(device) - (start if device.type == "cpu" else 0)
    json.dump({"seconds": median(seconds[WARM_UP:]), "memory_above_start_mib": peak}, sys.stdout)


if __name__ == "__main__":
    main()
