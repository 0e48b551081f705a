"""Text -> token ids, by the checkpoint's own `tokenizer.json` (the Rust `tokenizers` library)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from minibert.errors import InputError
from minibert.family import FAMILIES, model_type
from minibert.files import read_json, write_json
from minibert.sources import SENTENCE_BERT, TOKENIZER, VOCABULARY
from minibert.vocabulary import tokenizer_of_vocabulary


class Encoded(NamedTuple):
    """One sequence as its model reads it: of BERT `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`."""

    input_ids: list[int]
    token_type_ids: list[int]  # 0 for the first sentence and its [SEP], 1 for the second


STARTS = ("Ġ", "▁")  # a word, in byte-level BPE and in Unigram
RARE = "\U00010348"  # a letter that no usual vocabulary has


class Tokenizer:
    """Sentences or pairs to `Encoded`, at most `max_length` tokens; of a pair the longer side is cut first.

    A sentence is text: a special token written in it, such as `[SEP]`, is read as its characters.

    Raises:
        InputError: if `tokenizer.json` is missing or damaged, has ids beyond `vocab_size`, cannot read every
            text, or frames sentences in another way than its model's family.
    """

    def __init__(self, folder: Path, max_length: int, vocab_size: int):
        path, self._json = _read(folder)
        self._tokenizer = _load(path, self._json)
        vocab = self._tokenizer.get_vocab()
        largest = max(vocab.values(), default=0)  # not their number less one where ids leave gaps
        if largest >= vocab_size:
            raise InputError(f"{path}: has token ids up to {largest}, the model's vocab_size is {vocab_size}")
        self._family = FAMILIES[model_type(folder)]
        frames = self._family.frames
        for token in (token for one in frames for token in one.before + one.after):
            if token not in vocab:
                raise InputError(f"{path}: expected its model's vocabulary, it has no {token}")
        self.max_length = max_length
        self._frames = [
            ([vocab[token] for token in before], [vocab[token] for token in after], token_type)
            for before, after, token_type in frames
        ]
        self._framing = [len(before) + len(after) for before, after, _ in self._frames]
        self._special = {name: token for name, token in self._family.special.items() if token in vocab}
        self._read_as_text([*self._special.values()], path)
        self._check_template(path)
        self._check_case(folder / SENTENCE_BERT)

    def _read_as_text(self, special: list[str], path: Path) -> None:
        self._tokenizer.add_special_tokens(special)  # a file may hold them as ordinary ones
        self._tokenizer.encode_special_tokens = True
        if isinstance(self._tokenizer.model, models.Unigram):  # whose pieces they are, and the likeliest
            within = Regex("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special))
            own = [self._tokenizer.pre_tokenizer] if self._tokenizer.pre_tokenizer else []
            parts = [*own, pre_tokenizers.Split(within, "isolated")]
            self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        unknown = self._family.special["unk_token"]
        for token in special:
            if token != unknown and self.id_of(token) in self._ids(token):
                raise InputError(f"{path}: expected to read a text's {token} as characters, it is one token")

    def _check_template(self, path: Path) -> None:
        """Raises InputError if the file has a template of its own that is not the family's."""
        if self._tokenizer.post_processor is None:
            return
        for texts in (("a",), ("a", "b")):
            own, family = self._tokenizer.encode(*texts), self._frame([self._ids(text) for text in texts])
            same_types = own.type_ids == family.token_type_ids or not self._family.reads_types
            if own.ids != family.input_ids or not same_types:
                wanted, got = (
                    f"{' '.join(self.tokens(ids))!r} of types {' '.join(map(str, types))!r}"
                    for ids, types in (family, (own.ids, own.type_ids))
                )
                raise InputError(f"{path}: expected its model's template, {wanted}, got {got}")

    def _check_case(self, path: Path) -> None:
        """Raises InputError if sentence-transformers puts into lower case what the tokenizer does not."""
        lower = path.is_file() and read_json(path).get("do_lower_case")
        if lower and self._ids("A") != self._ids("a"):
            raise InputError(
                f"{path}: expected do_lower_case false, as tokenizer.json keeps capitals, got true"
            )

    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> list[Encoded]:
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        sides = [side for pair in pairs for side in pair]
        encoded = iter(self._tokenizer.encode_batch_fast(sides, add_special_tokens=False))
        return [self._join([next(encoded).ids for _ in pair]) for pair in pairs]

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """The vocabulary's words and pieces of words; a piece that goes on begins with ##."""
        names = [self._tokenizer.id_to_token(one) for one in input_ids]
        if isinstance(self._tokenizer.model, models.WordPiece):
            return names
        shown, starts = [], True  # the others' pieces say where a word starts instead
        for name in names:
            special = name in self._special.values()
            word = name if special else name.removeprefix(STARTS[0]).removeprefix(STARTS[1])
            shown.append(word if special or starts or word != name else f"##{word}")
            starts = special
        return shown

    def id_of(self, token: str) -> int | None:
        """A token's id; None if the vocabulary lacks it."""
        return self._tokenizer.token_to_id(token)

    def count(self, text: str) -> int:
        """How many tokens a text makes before it is cut, without [CLS] and [SEP]."""
        return len(self._ids(text))

    def save(self, folder: Path) -> None:
        """Write a tokenizer.json that says what this does, and transformers' settings beside it."""
        raw = json.loads(self._json)
        special = self._family.special
        processor = {"type": self._family.processing}
        for name in ("sep", "cls"):
            processor[name] = [special[f"{name}_token"], self.id_of(special[f"{name}_token"])]
        if self._family.processing == "RobertaProcessing":
            processor |= {"trim_offsets": False, "add_prefix_space": False}  # of offsets alone
        own = self._tokenizer.pre_tokenizer
        ours = {"truncation": None, "padding": None, "post_processor": processor}
        ours["pre_tokenizer"] = own and json.loads(own.__getstate__())
        write_json(raw | ours, folder / "tokenizer.json")
        types = ["token_type_ids"] if self._family.reads_types else []
        settings = {
            # Reads tokenizer.json as it is; BertTokenizer would make some of it anew from settings here.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "model_input_names": ["input_ids", *types, "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # a [SEP] in a text is text, as it was in training
        }
        # A token that is not in the vocabulary would get an id beyond the model's embeddings.
        write_json(settings | self._special, folder / TOKENIZER)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _join(self, sides: list[list[int]]) -> Encoded:
        room = self.max_length - sum(self._framing[: len(sides)])
        lengths = [len(side) for side in sides]
        kept = longest_first(lengths[0], sum(lengths[1:]), room)  # of one sentence the second is empty
        return self._frame([side[:count] for side, count in zip(sides, kept, strict=False)])

    def _frame(self, sides: list[list[int]]) -> Encoded:
        input_ids, token_type_ids = [], []
        for (before, after, token_type), side in zip(self._frames, sides, strict=False):
            input_ids += [*before, *side, *after]
            token_type_ids += [token_type] * (len(before) + len(side) + len(after))
        return Encoded(input_ids, token_type_ids)


def _read(folder: Path) -> tuple[Path, str]:
    """The file that a folder's tokenizer is in, and its tokenizer.json."""
    path, vocabulary = folder / "tokenizer.json", folder / VOCABULARY
    if vocabulary.is_file() and not path.is_file():
        return vocabulary, tokenizer_of_vocabulary(folder)
    read_json(path)  # says what is wrong with the file; the library only says that something is
    return path, path.read_bytes().decode()


def _load(path: Path, content: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
        # The library's own truncation keeps all it cuts off, for pairs every piece of one side with every
        # piece of the other: two long texts would fill the memory. MiniLM's file also asks for padding.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        read = tokenizer.encode(RARE, RARE, add_special_tokens=False)  # else a missing token shows up later
    except Exception as error:  # the library raises no narrower type
        raise InputError(f"{path}: expected a tokenizer of any text, got {error}") from None
    if not read.ids:
        raise InputError(f"{path}: expected a token for unknown text, got none")
    return tokenizer


def longest_first(a: int, b: int, room: int) -> tuple[int, int]:
    """How many tokens of two sides are kept: the longer is cut until it is as short, then both alike."""
    if a + b <= room:
        return a, b
    shorter = min(a, b, room // 2)
    return (shorter, room - shorter) if a <= b else (room - shorter, shorter)
