"""Encoded texts end to end, and kept on disk: many runs tokenize the same data, and need to only once."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from minibert.cache import cache_root
from minibert.errors import InputError
from minibert.files import read_safetensors, write_safetensors
from minibert.tokenizer import Tokenizer

LEAST = 2**12  # texts: fewer are tokenized in the time that a file takes
MOST_FILES = 32  # of data sets, those used last
VERSION = 2  # of what this project does to a text, such as where it is cut: another one makes other tokens
KINDS = {"ends": (torch.int64, 1), "input_ids": (torch.int32, 1), "token_type_ids": (torch.int8, 1)}
CHECK = {"sha256": (torch.uint8, 1)}  # of the three, kept beside them

Texts = Sequence[str | tuple[str, str]]


class PackedTexts:
    """Encoded texts end to end in two flat arrays: a few bytes a token, whatever their number.

    Attributes:
        ends: where each text ends, [texts].
        input_ids, token_type_ids: of all texts' tokens.
    """

    def __init__(self, ends: np.ndarray, input_ids: np.ndarray, token_type_ids: np.ndarray):
        self.ends, self.input_ids, self.token_type_ids = ends, input_ids, token_type_ids

    @classmethod
    def encode(cls, texts: Texts, tokenizer: Tokenizer) -> "PackedTexts":
        encoded = tokenizer(texts)
        ends = np.cumsum([len(one.input_ids) for one in encoded], dtype=np.int64)
        total = int(ends[-1])
        return cls(
            ends,
            np.fromiter((t for one in encoded for t in one.input_ids), np.int32, total),
            np.fromiter((t for one in encoded for t in one.token_type_ids), np.int8, total),
        )

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.ends[indices] - np.where(indices > 0, self.ends[indices - 1], 0)

    def span(self, index: int) -> slice:
        return slice(self.ends[index - 1] if index else 0, self.ends[index])


def encode_or_recall(texts: Texts, tokenizer: Tokenizer) -> PackedTexts:
    """`PackedTexts.encode`, or what it made of the same texts before.

    That lies in $MINIBERT_CACHE/tokens under the SHA-256 of all that decides it: the texts, tokenizer.json,
    the library's version and the length. A damaged file, or a folder that cannot be written, costs only time.
    """
    if len(texts) < LEAST:
        return PackedTexts.encode(texts, tokenizer)
    folder = cache_root() / "tokens"
    path = folder / f"{key(texts, tokenizer)}.safetensors"
    packed = recall(path, len(texts))
    if packed is None:
        packed = PackedTexts.encode(texts, tokenizer)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            keep(packed, path)
    with suppress(OSError):
        os.utime(path)
        # All of them, so that what a killed process left half written goes in its turn.
        for old in sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime)[:-MOST_FILES]:
            old.unlink(missing_ok=True)
    return packed


def key(texts: Texts, tokenizer: Tokenizer) -> str:
    decides = [VERSION, tokenizer.identity, tokenizer.max_length, list(texts)]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def keep(packed: PackedTexts, path: Path) -> None:
    """Raises OSError if the file cannot be written."""
    arrays = {name: torch.from_numpy(getattr(packed, name)) for name in KINDS}
    write_safetensors(arrays | {"sha256": digest(arrays)}, path)


def recall(path: Path, texts: int) -> PackedTexts | None:
    """What is kept of so many texts; None if there is nothing, or it is not whole."""
    try:
        arrays = read_safetensors(path)
    except InputError:
        return None
    if {name: (array.dtype, array.dim()) for name, array in arrays.items()} != KINDS | CHECK:
        return None
    if not torch.equal(arrays["sha256"], digest(arrays)) or len(arrays["ends"]) != texts:
        return None
    return PackedTexts(**{name: arrays[name].numpy() for name in KINDS})


def digest(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """SHA-256 of the arrays' lengths and bytes, [32]"""
    together = hashlib.sha256()
    for name in KINDS:
        together.update(b"%s %d\n" % (name.encode(), len(arrays[name])))
        together.update(arrays[name].numpy())
    return torch.tensor(list(together.digest()), dtype=torch.uint8)
