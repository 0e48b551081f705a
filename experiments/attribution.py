"""How much each token moves an output: integrated gradients on the word embeddings.

Letters: T tokens of an example (of a Siamese pair those of both sides), H hidden size, k points of the path.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.family import BERT, Family
from tasks.data import Dataset
from tasks.model import TaskModel

TOLERANCE = 1e-3  # of a probability, or of a score
FEWEST, MOST = 16, 1024  # steps
MOST_TOKENS = 1024  # of a batch of points
Function = Callable[[Tensor], Tensor]  # word vectors [k, T, H] -> an output of each point, [k]


@dataclass(frozen=True)
class Attribution:
    """How much each of T tokens adds to an output that a baseline without words has already.

    Attributes:
        values: [T], in the units of the output.
        output, baseline: f(x) and f(x').
        change: the largest of a token's from half as many steps to these.
    """

    values: np.ndarray
    output: float
    baseline: float
    steps: int
    change: float
    tolerance: float

    @property
    def error(self) -> float:
        """|Σᵢ IGᵢ - (f(x) - f(x'))|, 0 if the integral were exact (completeness, proposition 1)."""
        return abs(float(self.values.sum()) - (self.output - self.baseline))

    @property
    def is_complete(self) -> bool:
        """Errors of tokens may cancel in their sum: so none may have moved by more, either."""
        return max(self.error, self.change) <= self.tolerance


def integrated_gradients(f: Function, x: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """IGᵢ = (xᵢ - x'ᵢ) ∫₀¹ ∂f(x' + a (x - x')) / ∂xᵢ da (Sundararajan et al. 2017, eq. 1).

    x and the baseline x' [T, H] -> [T, H]. The integral is by the midpoint rule: the mean of the gradients at
    a = (i + ½) / steps. The paper's eq. 3 takes the ends of the steps, whose error falls with their number,
    not with its square.
    """
    places = (torch.arange(steps, dtype=x.dtype, device=x.device) + 0.5) / steps
    total = torch.zeros_like(x)
    for a in places.split(max(1, MOST_TOKENS // len(x))):
        points = (baseline + a[:, None, None] * (x - baseline)).requires_grad_()  # [k, T, H]
        (gradient,) = torch.autograd.grad(f(points).sum(), points)
        total += gradient.sum(dim=0)
    return (x - baseline) * total / steps


def attribute(
    f: Function, x: Tensor, baseline: Tensor, tolerance: float = TOLERANCE, most: int = MOST
) -> Attribution:
    """Each token's integrated gradients, summed over H, with steps doubled until they are complete.

    Or until there are `most`: then the result says how far it is from it.
    """
    with torch.no_grad():
        ends = [float(f(one[None])) for one in (x, baseline)]
    steps, before = FEWEST, integrated_gradients(f, x, baseline, FEWEST // 2).sum(dim=1)
    while True:
        values = integrated_gradients(f, x, baseline, steps).sum(dim=1)  # [T]
        change = float((values - before).abs().max())
        found = Attribution(values.cpu().double().numpy(), *ends, steps, change, tolerance)
        if found.is_complete or 2 * steps > most:
            return found
        steps, before = 2 * steps, values


def attribute_example(
    model: TaskModel, data: Dataset, target: int, tolerance: float = TOLERANCE, most: int = MOST
) -> Attribution:
    """Of a dataset's one example: what its words add to the probability of class `target`, or to the score.

    The baseline has the zero vector in the place of each word's, as in the paper's section 3; positions,
    token types, [CLS] and [SEP] are the example's own. The model is in eval and without adapters (merged).
    """
    (lengths, x), words = word_vectors(model, data), model.bert.embeddings.word_embeddings

    def f(points: Tensor) -> Tensor:
        batch = data.collate(np.zeros(len(points), int))
        rows = torch.cat([side.flatten(0, 1) for side in points.split(lengths, dim=1)])  # [k T, H]
        with returning(words, F.pad(rows, (0, 0, 0, batch.sequences.filler))):
            logits = model(data.task.name, batch)  # [k, C]
        return (logits.softmax(dim=1) if data.task.is_classification else logits)[:, target]

    return attribute(f, x, x * framing(data, model.bert.config.family)[:, None], tolerance, most)


@torch.no_grad()
def word_vectors(model: TaskModel, data: Dataset) -> tuple[tuple[int, ...], Tensor]:
    """The tokens of each side of a dataset's one example, and their vectors in the embedding, [T, H]."""
    batch = data.collate(np.zeros(1, int))
    vectors = model.bert.embeddings.word_embeddings(batch.input_ids)
    return batch.sequences.lengths, vectors[: sum(batch.sequences.lengths)]


def framing(data: Dataset, family: Family = BERT) -> Tensor:
    """Which tokens of a dataset's one example are the [CLS] and [SEP] around its sentences, [T]."""
    framed = []
    for side in data.sides:
        types = torch.from_numpy(side.token_type_ids)  # [T]
        ends = types[1:] != types[:-1]  # [T - 1]
        framed.append(torch.cat([ends, torch.tensor([True])]))  # the last of each sentence
        framed[-1][0] = True
        if family.frames[1].before:  # and the first of the second
            framed[-1][1:] |= ends
    return torch.cat(framed)


@contextmanager
def returning(module: nn.Module, output: Tensor) -> Iterator[None]:
    """Within it, the module returns this."""
    hook = module.register_forward_hook(lambda *_: output)
    try:
        yield
    finally:
        hook.remove()
