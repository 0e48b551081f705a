"""One example through a finished run, as plain values; `experiments.explain` is the command.

Letters: M tokens of all sequences, T tokens of one, H hidden size, L layers, N heads, D = H / N head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.attribution import Attribution, attribute_example, framing
from experiments.nearest import drawn, nearest, training_examples
from lora.methods import merge
from minibert.attention import SelfAttention
from minibert.errors import InputError
from minibert.layers import apply_all
from minibert.model import Bert
from minibert.tokenizer import Tokenizer
from tasks.base import Example, Task
from tasks.data import Batch, Dataset
from tasks.model import TaskModel
from training.config import Config
from training.evaluate import Prediction, predict
from training.run_folder import RunFolder, check_unchanged, load_run, read_run_config
from training.scoring import choose_task, text_example

PIECE = "##"  # how a piece that goes on with a word begins (Wu et al. 2016)


@dataclass(frozen=True)
class Read:
    """A sequence as the encoder reads it: a sentence, or both of a pair that is concatenated.

    Attributes:
        sentences: of each token the sentence that it belongs to, 0 or 1.
        frame: which tokens are the [CLS] and [SEP] around the sentences.
        attributions: [T].
        attention: [L, N, T, T].
    """

    tokens: tuple[str, ...]
    sentences: tuple[int, ...]
    frame: tuple[bool, ...]
    attributions: np.ndarray
    attention: np.ndarray

    def words(self, sentence: int) -> list[tuple[str, float]]:
        """A sentence's words, their pieces put together, with the sum of the pieces' attributions."""
        words: list[tuple[str, float]] = []
        for i, token in enumerate(self.tokens):
            if self.frame[i] or self.sentences[i] != sentence:
                continue
            value = float(self.attributions[i])
            if token.startswith(PIECE) and words:
                word, so_far = words.pop()
                token, value = word + token.removeprefix(PIECE), so_far + value
            words.append((token, value))
        return words


@dataclass(frozen=True)
class Neighbours:
    """The training examples most like the example, with their cosines, among `read` of `total`."""

    examples: list[tuple[Example, float]]
    read: int
    total: int


@dataclass(frozen=True)
class Explanation:
    """What a run makes of an example, and what can be said of why.

    Attributes:
        target: the class whose probability the attributions are of; of a score 0.
        sequences: one, or of a Siamese pair two.
        tokens, kept: how many the texts have, and how many of them fit the run's length.
        neighbours: None if none were asked for; a text says why there are none.
    """

    config: Config
    task: Task
    example: Example
    prediction: Prediction
    target: int
    attribution: Attribution
    sequences: tuple[Read, ...]
    tokens: int
    kept: int
    neighbours: Neighbours | str | None

    @property
    def sentences(self) -> list[list[tuple[str, float]]]:
        """The words of each text, with their attributions."""
        of_text = [self.sequences[i % len(self.sequences)] for i in range(len(self.example.texts))]
        return [one.words(i) for i, one in enumerate(of_text)]


def explain(path: Path, task_name: str | None, texts: Sequence[str], count: int) -> Explanation:
    """All of it, with the `count` nearest training examples.

    Raises:
        InputError: if the run cannot be used, or the texts are not what its task takes.
    """
    written = read_run_config(RunFolder(path))
    task = choose_task(written, task_name)
    check_sentences(task, texts)
    example = text_example(task, texts)
    config, model, tokenizer = load_run(path, task.name)
    check_unchanged(path, written)
    model, siamese = merge(model).eval(), config.siamese(task)
    data = Dataset(task, [example], tokenizer, siamese)
    prediction = predict(model, data, torch.device("cpu"))
    target = int(prediction.predictions[0]) if task.is_classification else 0
    attribution = attribute_example(model, data, target)
    return Explanation(
        config=config,
        task=task,
        example=example,
        prediction=prediction,
        target=target,
        attribution=attribution,
        sequences=read(model, data, tokenizer, attribution),
        tokens=sum(map(tokenizer.count, example.texts)),
        kept=int((~framing(data, model.bert.config.family)).sum()),
        neighbours=find_neighbours(path, written, model, data, tokenizer, count) if count else None,
    )


def check_sentences(task: Task, texts: Sequence[str]) -> None:
    """Raises InputError unless there is a --pair for a task of pairs, and none for another."""
    if task.is_pair and len(texts) < 2:
        raise InputError(f"--pair: expected the second sentence, {task.name} is a task of pairs; got none")
    if not task.is_pair and len(texts) > 1:
        raise InputError(f"--pair: expected none, {task.name} is a task of one sentence")


def read(model: TaskModel, data: Dataset, tokenizer: Tokenizer, attribution: Attribution) -> tuple[Read, ...]:
    """The sequences of a dataset's one example."""
    batch = data.collate(np.zeros(1, int))
    maps = attention_maps(model.bert, batch)
    ends = np.cumsum(batch.sequences.lengths)[:-1]
    frame = framing(data, model.bert.config.family).numpy()  # [T] of all sequences
    frames, values = (np.split(one, ends) for one in (frame, attribution.values))
    sequences = []
    for i, side in enumerate(data.sides):
        sentences = side.token_type_ids + i  # of a Siamese pair each side has types of 0 alone
        tokens = tokenizer.tokens(side.input_ids.tolist())
        attention = maps[i].numpy()
        sequences.append(
            Read(tuple(tokens), tuple(sentences.tolist()), tuple(frames[i].tolist()), values[i], attention)
        )
    return tuple(sequences)


def find_neighbours(
    path: Path, config: Config, model: TaskModel, data: Dataset, tokenizer: Tokenizer, count: int
) -> Neighbours | str:
    """As text the reason, if what the run was trained on cannot be had."""
    try:
        examples = training_examples(path, config, data.task)
    except InputError as error:
        return str(error)
    among = drawn(examples)
    train = Dataset(data.task, among, tokenizer, config.siamese(data.task))
    one = data.collate(np.zeros(1, int))
    return Neighbours(nearest(model, train, one, count), len(among), len(examples))


def attention_weights(attention: SelfAttention, x: Tensor) -> Tensor:
    """A = softmax(Q Kᵀ / √D) in each head (Vaswani et al. 2017, eq. 1): what a layer weighs its values by.

    x [T, H], what goes into the layer of one sequence -> [N, T, T]. A[n, i, j] is the share that token j's
    value has in what head n gives to token i, so each row sums to 1. The layer's output is A V, head by head.
    """
    q, k, _ = apply_all((attention.query, attention.key, attention.value), x)  # [T, H] each
    Q, K = (y.unflatten(1, (attention.num_heads, -1)).transpose(0, 1) for y in (q, k))  # [N, T, D]
    return (Q @ K.mT / math.sqrt(Q.shape[-1])).softmax(dim=-1)


@torch.no_grad()
def attention_maps(bert: Bert, batch: Batch) -> list[Tensor]:
    """The weights in each sequence of a batch, [L, N, T, T]; bert is in eval, so that nothing is dropped."""
    x = bert.embeddings(batch.input_ids, batch.token_type_ids, batch.sequences.position_ids)  # [M, H]
    x = x.to(bert.compute_dtype or x.dtype)
    maps: list[list[Tensor]] = [[] for _ in batch.sequences.lengths]
    for layer in bert.encoder["layer"]:
        rows = x.split([*batch.sequences.lengths, batch.sequences.filler])[:-1]  # [T, H] of each sequence
        for of_sequence, own in zip(maps, rows, strict=True):
            of_sequence.append(attention_weights(layer.attention["self"], own))
        x = layer(x, batch.sequences)
    return [torch.stack(of_sequence) for of_sequence in maps]
