"""Text -> token ids, by the checkpoint's own `tokenizer.json` (the Rust `tokenizers` library)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minibert.errors import InputError
from minibert.files import read_json
from minibert.verify import sha256


class Encoded(NamedTuple):
    """One sequence as BERT reads it: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`."""

    input_ids: list[int]
    token_type_ids: list[int]  # 0 for the first sentence and its [SEP], 1 for the second


class Tokenizer:
    """Sentences or pairs to `Encoded`, at most `max_length` tokens; of a pair the longer side is cut first.

    Attributes:
        identity: two that are alike in it, and in `max_length`, make the same of a text.

    Raises:
        InputError: if `tokenizer.json` is missing or damaged, is not BERT's, or has ids beyond `vocab_size`.
    """

    def __init__(self, folder: Path, max_length: int, vocab_size: int):
        path = folder / "tokenizer.json"
        read_json(path)  # says what is wrong with the file; the library only says that something is
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower type
            raise InputError(f"{path}: expected a tokenizer, got {error}") from None
        vocab = self._tokenizer.get_vocab()
        largest = max(vocab.values(), default=0)  # not their number less one where ids leave gaps
        if largest >= vocab_size:
            raise InputError(f"{path}: has token ids up to {largest}, the model's vocab_size is {vocab_size}")
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # asked for only when a text needs it
        for token in ("[CLS]", "[SEP]", *([unknown] if unknown else [])):
            if token not in vocab:
                raise InputError(f"{path}: expected BERT's vocabulary, it has no {token}")
        self.max_length, self.cls, self.sep = max_length, vocab["[CLS]"], vocab["[SEP]"]
        self.identity = f"{sha256(path)} by tokenizers {tokenizers.__version__}"
        # The library's own truncation keeps all it cuts off, for pairs every piece of one side with every
        # piece of the other: two long texts would fill the memory. MiniLM's file also asks for padding.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> list[Encoded]:
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        sides = [side for pair in pairs for side in pair]
        encoded = iter(self._tokenizer.encode_batch_fast(sides, add_special_tokens=False))
        return [self._join([next(encoded).ids for _ in pair]) for pair in pairs]

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """The vocabulary's words and pieces of words; a piece that goes on begins with ##."""
        return [self._tokenizer.id_to_token(one) for one in input_ids]

    def id_of(self, token: str) -> int | None:
        """A token's id; None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def count(self, text: str) -> int:
        """How many tokens a text makes before it is cut, without [CLS] and [SEP]."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _join(self, sides: list[list[int]]) -> Encoded:
        room = self.max_length - 1 - len(sides)  # for tokens between [CLS] and the [SEP]s
        lengths = [len(side) for side in sides]
        kept = longest_first(lengths[0], sum(lengths[1:]), room)  # of one sentence the second is empty
        input_ids, token_type_ids = [self.cls], [0]
        for segment, side in enumerate(sides):
            input_ids += [*side[: kept[segment]], self.sep]
            token_type_ids += [segment] * (kept[segment] + 1)
        return Encoded(input_ids, token_type_ids)


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of two sides are kept: the longer is cut until it is as short, then both alike."""
    if a + b <= room:
        return a, b
    shorter = min(a, b, room // 2)
    return (shorter, room - shorter) if a <= b else (room - shorter, shorter)
