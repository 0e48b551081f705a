"""Text -> token ids, by the checkpoint's own `tokenizer.json` (the Rust `tokenizers` library)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minibert.errors import InputError
from minibert.files import read_json


class Encoded(NamedTuple):
    """One sequence as BERT reads it: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`."""

    input_ids: list[int]
    token_type_ids: list[int]  # 0 for the first sentence and its [SEP], 1 for the second


class Tokenizer:
    """Sentences or pairs to `Encoded`, at most `max_length` tokens; of a pair the longer side is cut first.

    Raises:
        InputError: if `tokenizer.json` is missing or damaged, or its ids do not fit `vocab_size`.
    """

    def __init__(self, folder: Path, max_length: int, vocab_size: int):
        path = folder / "tokenizer.json"
        read_json(path)  # says what is wrong with the file; the library only says that something is
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise InputError(f"{path}: expected a tokenizer, got {error}") from None
        known = self._tokenizer.get_vocab_size()
        if known > vocab_size:
            raise InputError(f"{path}: has {known} tokens, the model's vocab_size is {vocab_size}")
        # MiniLM's file pads and cuts to 128 unless told otherwise.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")

    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> list[Encoded]:
        return [Encoded(e.ids, e.type_ids) for e in self._tokenizer.encode_batch_fast(list(texts))]
