"""Examples -> packed batches, in an order that is a pure function of (seed, task, epoch).

Letters: M tokens, S sequences, B examples, H hidden size.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from minibert.blocks import next_multiple
from minibert.sequences import Sequences
from minibert.tokenizer import Tokenizer
from tasks.base import Example, Task
from tasks.share import Share

POOL = 50  # batches whose examples are sorted by length together
ROUND = 64  # M of a whole batch is filled up to a multiple of this: see `Sequences.filler`

ALIGNED = 16  # bytes: where each tensor of one copy begins


def filler_of(tokens: int, share: Share | None) -> int:
    """What fills up M. Shares have fewer tokens, and so as few M's with a finer step; 16 suits libraries."""
    return -tokens % (ROUND if share is None else max(16, ROUND // share.processes))


@dataclass(frozen=True)
class Batch:
    """B examples as S packed sequences: S = B, or 2B for Siamese pairs (left sides, then right sides).

    `pooled` is what the encoder makes of them, where that is known: see `Features`; there are no tokens then.
    With a `share` the tokens are those of its examples, ids those of the whole batch, and so are labels and
    texts unless it is apart.
    """

    ids: tuple[str, ...]
    input_ids: Tensor  # [M]
    token_type_ids: Tensor  # [M]
    sequences: Sequences  # of S
    labels: Tensor | None  # [B]
    texts: Tensor | None = None  # [2B], of Siamese pairs: one number for equal texts
    pooled: Tensor | None = None  # [S, H]
    share: Share | None = None
    tokens: int = 0  # of the whole batch, without filler

    @property
    def weight(self) -> float:
        """Of this loss in that of the whole batch."""
        return 1.0 if self.share is None else self.share.weight

    def whole(self, x: Tensor) -> Tensor:
        """x of each example [b, ...] -> of the whole batch's [B, ...]"""
        return x if self.share is None else self.share.gather(x)

    def whole_sides(self, x: Tensor) -> Tensor:
        """x of each Siamese side [2b, ...] -> of the whole batch's [2B, ...]"""
        return x if self.share is None else torch.cat([self.share.gather(side) for side in x.chunk(2)])

    def to(self, device: torch.device) -> "Batch":
        """This batch on a device, by one copy; where its pooled vectors are known, the tokens stay behind."""
        if device.type == "cpu":
            return self
        read = ("input_ids", "token_type_ids") if self.pooled is None else ("pooled",)
        read += ("labels", "texts")
        own = {name: getattr(self, name) for name in read if getattr(self, name) is not None}
        of_sequences = self.sequences.tensors() if self.pooled is None else {}
        moved = move(own | of_sequences, device)
        sequences = self.sequences.holding(moved) if self.pooled is None else self.sequences
        return replace(self, sequences=sequences, **{name: moved[name] for name in own})


def move(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The host's tensors on a device: they go to a GPU in one copy, which the host does not wait for.

    For that they lie side by side in pinned memory, which PyTorch uses again once it has been read.
    """
    if device.type == "cpu":
        return dict(tensors)
    here = pack(tensors, pinned=device.type == "cuda")
    return unpack(here.to(device, non_blocking=True), like=tensors)


def pack(tensors: Mapping[str, Tensor], pinned: bool) -> Tensor:
    """Tensors of any dtypes as one row of bytes, each from a multiple of `ALIGNED` on."""
    total = sum(next_multiple(tensor.nbytes, ALIGNED) for tensor in tensors.values())
    row = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
    for name, part in unpack(row, like=tensors).items():
        part.copy_(tensors[name])
    return row


def unpack(row: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that lie in a row of bytes: views of it, with shapes and dtypes `like` those packed."""
    parts = row.split([next_multiple(tensor.nbytes, ALIGNED) for tensor in like.values()])
    return {
        name: part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the sequences of several, in order, for the encoder: it has no labels."""
    counts = [sum(batch.sequences.lengths) for batch in batches]  # without each one's filler
    first = batches[0]
    filler = filler_of(sum(counts), first.share)

    def row(name: str) -> Tensor:
        tokens = [getattr(batch, name)[:count] for batch, count in zip(batches, counts, strict=True)]
        return torch.cat([*tokens, first.input_ids.new_zeros(filler, dtype=tokens[0].dtype)])  # [M]

    lengths = tuple(length for batch in batches for length in batch.sequences.lengths)
    return Batch(
        ids=tuple(one for batch in batches for one in batch.ids),
        input_ids=row("input_ids"),
        token_type_ids=row("token_type_ids"),
        sequences=Sequences(lengths, filler),
        labels=None,
    )


class PackedTexts:
    """Encoded texts end to end in two flat arrays: a few bytes a token, whatever their number.

    Attributes:
        ends: where each text ends, [texts].
        input_ids, token_type_ids: of all texts' tokens.
    """

    def __init__(self, texts: Sequence[str | tuple[str, str]], tokenizer: Tokenizer):
        encoded = tokenizer(texts)
        self.ends = np.cumsum([len(one.input_ids) for one in encoded], dtype=np.int64)
        total = int(self.ends[-1])
        self.input_ids = np.fromiter((t for one in encoded for t in one.input_ids), np.int32, total)
        self.token_type_ids = np.fromiter((t for one in encoded for t in one.token_type_ids), np.int8, total)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.ends[indices] - np.where(indices > 0, self.ends[indices - 1], 0)

    def span(self, index: int) -> slice:
        return slice(self.ends[index - 1] if index else 0, self.ends[index])


class Features:
    """The pooled vectors of some of a dataset's examples, in fp32 in main memory: S/B · H · 4 bytes each."""

    def __init__(self, length: int, among: np.ndarray, sides: int, hidden_size: int):
        self.vectors = torch.zeros(sides, len(among), hidden_size)  # [S/B, len(among), H]
        # The place of any other example is one past the end, so that asking for it is an error.
        self.places = torch.full((length,), len(among))  # [len]
        self.places[among] = torch.arange(len(among))

    def put(self, indices: np.ndarray, pooled: Tensor) -> None:
        """pooled [S, H], in a batch's order: left sides, then right sides"""
        self.vectors[:, self.places[indices]] = pooled.cpu().unflatten(0, (-1, len(indices)))

    def of(self, indices: np.ndarray) -> Tensor:
        return self.vectors[:, self.places[indices]].flatten(0, 1)  # [S, H]


class Dataset:
    """A split of a task, tokenized once, and encoded once where `features` are given to it."""

    def __init__(
        self,
        task: Task,
        examples: Sequence[Example],
        tokenizer: Tokenizer,
        siamese: bool = False,
    ):
        self.task = task
        self.examples = tuple(examples)
        if siamese:
            self.sides = [PackedTexts([e.texts[side] for e in examples], tokenizer) for side in (0, 1)]
        else:
            joined = [e.texts if len(e.texts) == 2 else e.texts[0] for e in examples]
            self.sides = [PackedTexts(joined, tokenizer)]
        labelled = all(e.label is not None for e in examples)
        dtype = np.int64 if task.is_classification else np.float32
        self.labels = np.array([e.label for e in examples], dtype) if labelled else None  # [len]
        self.features: Features | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of each example; of a Siamese pair those of both sides."""
        return sum(side.lengths(indices) for side in self.sides)

    def longest_first(self, indices: np.ndarray) -> np.ndarray:
        return indices[np.argsort(-self.lengths(indices), kind="stable")]

    def collate(self, indices: np.ndarray, share: Share | None = None) -> Batch:
        mine = indices if share is None else indices[share.places]
        labelled = mine if share is not None and share.apart else indices
        lengths = tuple(length for side in self.sides for length in side.lengths(mine).tolist())
        # What is encoded already needs no tokens.
        spans = [(side, side.span(i)) for side in self.sides for i in mine] if self.features is None else []
        filler = filler_of(sum(lengths), share) if spans else 0
        nothing = np.zeros(filler, np.int32)
        input_ids = np.concatenate([*(side.input_ids[span] for side, span in spans), nothing])  # [M]
        token_type_ids = np.concatenate(
            [*(side.token_type_ids[span] for side, span in spans), nothing]
        )  # [M]
        return Batch(
            ids=tuple(self.examples[i].id for i in indices.tolist()),
            input_ids=torch.from_numpy(input_ids),
            token_type_ids=torch.from_numpy(token_type_ids),
            sequences=Sequences(lengths, filler),
            labels=None if self.labels is None else torch.from_numpy(self.labels[labelled]),
            texts=self.numbered(labelled) if len(self.sides) > 1 else None,
            pooled=None if self.features is None else self.features.of(mine),
            share=share,
            tokens=int(self.lengths(indices).sum()),
        )

    def numbered(self, indices: np.ndarray) -> Tensor:
        """Of each side of these examples the first place at which its tokens stand, [2B]."""
        first: dict[bytes, int] = {}
        tokens = [side.input_ids[side.span(i)].tobytes() for side in self.sides for i in indices]
        return torch.tensor([first.setdefault(one, place) for place, one in enumerate(tokens)])

    def in_order_of_length(
        self, most: int, most_tokens: int, among: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """(indices, batch) over all examples or those `among`, longest first: where order does not matter.

        A batch has at most `most` examples and `most_tokens` tokens, but one example at least.
        """
        order = self.longest_first(np.arange(len(self)) if among is None else among)
        ends = self.lengths(order).cumsum()
        start = 0
        while start < len(order):
            before = ends[start - 1] if start else 0
            fitting = int(np.searchsorted(ends, before + most_tokens, side="right")) - start
            indices = order[start : start + min(most, max(fitting, 1))]
            yield indices, self.collate(indices)
            start += len(indices)


def epoch_order(length: int, seed: int, task: str, epoch: int) -> np.ndarray:
    """The order of a task's examples in an epoch: a pure function, so that nothing is saved to resume."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), epoch]).permutation(length)


def like_length(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> np.ndarray:
    """An order whose batches hold examples of nearly one length, for an order drawn at random.

    Each `POOL` batches' worth of it is sorted by length and cut into batches, and these are dealt out anew;
    the one that is not full, where there is one, stays last. As `order` is random, so is what stands in its
    first places: it says where each batch goes. `lengths` [len] are the examples', whatever the order.
    """
    pool = POOL * batch_size
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    by_length = np.concatenate([one[np.argsort(lengths[one], kind="stable")] for one in pools])
    full = len(order) // batch_size
    batches = by_length[: full * batch_size].reshape(full, batch_size)
    places = np.argsort(order[:full], kind="stable")  # a permutation of the batches
    return np.concatenate([batches[places].ravel(), by_length[full * batch_size :]])
