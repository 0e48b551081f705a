"""BERT's `vocab.txt`, a token a line, as the `tokenizer.json` that transformers makes of it."""

from pathlib import Path

import tokenizers

from minibert.errors import InputError
from minibert.files import read_json, read_text
from minibert.sources import TOKENIZER, VOCABULARY

NEEDED = ("[UNK]", "[CLS]", "[SEP]")
KINDS = ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast")
# The settings that change what is read, with transformers' defaults.
SETTINGS = {
    "do_lower_case": True,
    "do_basic_tokenize": True,
    "tokenize_chinese_chars": True,
    "strip_accents": None,
}


def tokenizer_of_vocabulary(folder: Path) -> str:
    """The content of a tokenizer.json for a folder without one; tokenizer_config.json says if capitals stay.

    Raises:
        InputError: if the vocabulary is not BERT's, or the settings are of another tokenizer, or leave open
            what a vocabulary with capitals needs.
    """
    path, where = folder / VOCABULARY, folder / TOKENIZER
    tokens = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    for token in NEEDED:
        if token not in tokens:
            raise InputError(f"{path}: expected BERT's vocabulary, it has no {token}")
    raw = read_json(where) if where.is_file() else {}
    kind = raw.get("tokenizer_class") or read_json(folder / "config.json").get("tokenizer_class") or KINDS[0]
    given = {name: raw.get(name, default) for name, default in SETTINGS.items()}
    for name, value in given.items():
        if not isinstance(value, bool) and (value is not None or name != "strip_accents"):
            raise InputError(f"{where}: expected {name} true or false, got {value!r}")
    if kind not in KINDS or not given["do_basic_tokenize"]:
        got = repr(kind) if kind not in KINDS else "do_basic_tokenize false"
        raise InputError(f"{folder}: expected a tokenizer.json or BERT's own tokenizer, got {got}")
    capital = next((token for token in tokens if token != token.lower() and token[0] != "["), None)
    if capital and "do_lower_case" not in raw:
        raise InputError(f"{where}: expected do_lower_case, as {VOCABULARY} has capitals: {capital!r}")
    return tokenizers.BertWordPieceTokenizer(
        {token: number for number, token in enumerate(tokens)},
        lowercase=given["do_lower_case"],
        strip_accents=given["strip_accents"],
        handle_chinese_chars=given["tokenize_chinese_chars"],
    ).to_str()
