"""How well an encoder still fills in words: its checkpoint's masked-language-model head, before and after.

    loss = -mean log softmax(LN(gelu(h Wᵀ + b)) Eᵀ + c)[word],  h [H] the hidden state of a masked token

(Devlin et al. 2018, section 3.1), E the word embeddings unless the head has its own. Every token that was
chosen becomes [MASK], always the same ones, so two encoders differ by nothing but their weights.

Letters: M tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.errors import InputError
from minibert.files import check_fits
from minibert.model import Bert
from minibert.sequences import Sequences
from minibert.tokenizer import Encoded, Tokenizer
from minibert.weights import read_config, read_tensors
from tasks import TASKS
from tasks.reader import read_examples
from training.build import DEMO

PREFIX = "cls.predictions."
SHARE = 0.15  # of a sentence's tokens, as BERT was trained
LONGEST = 128  # tokens of a sentence
AT_ONCE = 32  # sentences


@dataclass(frozen=True)
class MaskedHead:
    """The head's tensors under the names that transformers writes, less their prefix."""

    state: dict[str, Tensor]
    eps: float

    def logits(self, bert: Bert, hidden: Tensor) -> Tensor:
        """hidden [M, H] -> [M, V]"""
        one = self.state
        x = F.gelu(F.linear(hidden, one["transform.dense.weight"], one["transform.dense.bias"]))
        scale, shift = one["transform.LayerNorm.weight"], one["transform.LayerNorm.bias"]
        x = F.layer_norm(x, x.shape[-1:], scale, shift, self.eps)  # [M, H]
        embeddings = one.get("decoder.weight", bert.embeddings.word_embeddings.weight)  # [V, H]
        return F.linear(x, embeddings, one["bias"])


def read_masked_head(folder: Path) -> MaskedHead | None:
    """The head in a checkpoint; None if it has none.

    Raises:
        InputError: if a part of it is missing, or does not fit config.json.
    """
    config, state, words = read_config(folder), {}, None
    for _, key, tensor in read_tensors(folder):
        if key.startswith(PREFIX):
            state[key.removeprefix(PREFIX)] = tensor
        elif key.endswith("embeddings.word_embeddings.weight"):
            words = tensor
    if not state:
        return None
    if "decoder.bias" in state:  # what the decoder adds; `bias` is the same vector, unless nothing is tied
        state["bias"] = state.pop("decoder.bias")
    h, v = config.hidden_size, config.vocab_size
    shapes = {"transform.dense.weight": (h, h), "transform.dense.bias": (h,), "bias": (v,)}
    shapes |= {"transform.LayerNorm.weight": (h,), "transform.LayerNorm.bias": (h,)}
    shapes |= {"decoder.weight": (v, h)} if "decoder.weight" in state else {}
    expected = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    check_fits(state, expected, f"{folder}: the masked-language-model head does not fit")
    state = {name: tensor.float() for name, tensor in state.items()}
    if (
        words is not None
        and "decoder.weight" in state
        and torch.equal(state["decoder.weight"], words.float())
    ):
        del state["decoder.weight"]  # tied, so it goes where the embeddings go
    return MaskedHead(state, config.layer_norm_eps)


def sentences() -> list[str]:
    """Those of the built-in data's dev files: the same for every run, and trained on by none."""
    examples = [read_examples(DEMO / task.files["dev"], task, True, True)[0] for task in TASKS.values()]
    return [text for of_task in examples for example in of_task for text in example.texts]


@dataclass(frozen=True)
class Masked:
    """A sentence with [MASK] in the place of some tokens, and what stood there."""

    input_ids: tuple[int, ...]
    places: tuple[int, ...]
    words: tuple[int, ...]


def mask(texts: Sequence[str], tokenizer: Tokenizer) -> list[Masked]:
    """Of each text a share of the tokens, at least one; always the same ones.

    Raises:
        InputError: if the vocabulary has no [MASK].
    """
    masked_id = tokenizer.id_of("[MASK]")
    if masked_id is None:
        raise InputError("expected BERT's vocabulary, it has no [MASK]")
    chance = np.random.default_rng(0)
    return [_mask(one, masked_id, chance) for one in tokenizer(list(texts)) if len(one.input_ids) > 2]


def _mask(one: Encoded, masked_id: int, chance: np.random.Generator) -> Masked:
    inner = len(one.input_ids) - 2  # between [CLS] and [SEP]
    places = sorted(1 + chance.choice(inner, max(1, round(SHARE * inner)), replace=False))
    ids = list(one.input_ids)
    for place in places:
        ids[place] = masked_id
    return Masked(tuple(ids), tuple(map(int, places)), tuple(one.input_ids[place] for place in places))


@torch.no_grad()
def losses(bert: Bert, head: MaskedHead, masked: Sequence[Masked]) -> np.ndarray:
    """The sum of the losses of each sentence's masked tokens, [n]."""
    return np.concatenate([_losses(bert, head, part) for part in _parts(masked)])


def _parts(masked: Sequence[Masked]) -> Iterator[Sequence[Masked]]:
    for start in range(0, len(masked), AT_ONCE):
        yield masked[start : start + AT_ONCE]


def _losses(bert: Bert, head: MaskedHead, masked: Sequence[Masked]) -> np.ndarray:
    lengths = tuple(len(one.input_ids) for one in masked)
    ids = torch.tensor([token for one in masked for token in one.input_ids])  # [M]
    hidden = bert(ids, torch.zeros_like(ids), Sequences(lengths))  # [M, H]
    firsts = np.cumsum((0, *lengths[:-1]))
    places = [int(first) + place for first, one in zip(firsts, masked, strict=True) for place in one.places]
    words = torch.tensor([word for one in masked for word in one.words])
    each = F.cross_entropy(head.logits(bert, hidden[places]), words, reduction="none")
    counts = [len(one.places) for one in masked]
    return np.array([part.double().sum().item() for part in each.split(counts)])


@dataclass(frozen=True)
class Drift:
    """The loss per masked token before training and after; `error` is their difference's standard error."""

    before: float
    after: float
    error: float
    tokens: int

    @property
    def change(self) -> float:
        return self.after - self.before


def drift(before: np.ndarray, after: np.ndarray, counts: np.ndarray) -> Drift:
    """From each sentence's sums [n] and number of masked tokens [n].

    The error is that of a ratio over sentences, which are what is sampled (Cochran 1977, section 2.11).
    """
    total, n = counts.sum(), len(counts)
    change = (after - before).sum() / total
    apart = (after - before) - change * counts  # [n]
    error = sqrt((apart**2).sum() * n / (n - 1)) / total if n > 1 else 0.0
    return Drift(float(before.sum() / total), float(after.sum() / total), float(error), int(total))
