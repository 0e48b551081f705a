"""The pooling and the length that a checkpoint was made for, from sentence-transformers' files beside it."""

import json
from pathlib import Path
from typing import NamedTuple

from minibert.errors import InputError
from minibert.files import read_json, write_json, write_text
from minibert.sources import MODULES, POOLING, SENTENCE_BERT, TOKENIZER

FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}  # before release 6, one a mode
WAY_OUT = "train.py --pooling cls, mean or pooler takes the encoder alone"


class Choice(NamedTuple):
    """A setting that the model decides, and what says so."""

    value: str | int
    source: str


def read_pooling(folder: Path) -> Choice | None:
    """The pooling in a folder of sentence-transformers; None of any other folder.

    Raises:
        InputError: if the files are damaged, or ask for a pooling or a module that is not offered.
    """
    path = folder / POOLING
    if (folder / MODULES).is_file():
        path = _pooling_module(folder / MODULES)
    elif not path.is_file():
        return None
    if not path.is_file():
        raise InputError(f"{path}: expected the pooling that {MODULES} names, there is none; {WAY_OUT}")
    raw = read_json(path)
    modes = raw.get("pooling_mode")
    if modes is None:
        flags = [name for name, on in raw.items() if name.startswith("pooling_mode_") and on]
        modes = [FLAGS.get(name, name) for name in flags] or ["mean"]  # the library's default
    if modes not in ("cls", "mean", ["cls"], ["mean"]):
        raise InputError(f"{path}: expected the pooling mode cls or mean, got {modes!r}; {WAY_OUT}")
    mode = modes if isinstance(modes, str) else modes[0]
    return Choice(mode, f"its {path.parent.name}/{path.name}")


def _pooling_module(path: Path) -> Path:
    """Where the settings of the pooling are, in a model of an encoder and a pooling."""
    modules = read_json(path, kind=list)
    try:
        kinds = {one["type"].rpartition(".")[2]: str(one["path"]) for one in modules}
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{path}: expected modules, each with a type and a path") from None
    if not {"Transformer", "Pooling"} <= kinds.keys() <= {"Transformer", "Pooling", "Normalize"}:
        wanted = "expected the modules Transformer and Pooling, perhaps Normalize"
        raise InputError(f"{path}: {wanted}, got {', '.join(kinds) or 'none'}; {WAY_OUT}")
    return path.parent / kinds["Pooling"] / "config.json"


def read_length(folder: Path) -> Choice | None:
    """The number of tokens at which sentence-transformers cuts; None of a folder that does not say.

    Raises:
        InputError: if it is no number of tokens.
    """
    names = [(SENTENCE_BERT, "max_seq_length")]
    if (folder / MODULES).is_file() or (folder / POOLING).is_file():
        names.append((TOKENIZER, "model_max_length"))  # where release 6 writes it
    for name, key in names:
        length = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if length is None:
            continue
        if not isinstance(length, int) or isinstance(length, bool) or length < 4:
            raise InputError(f"{folder / name}: expected {key} to be at least 4 tokens, got {length!r}")
        return Choice(length, f"its {name}")
    return None


def write_intended(pooling: str, max_length: int, hidden_size: int, folder: Path) -> None:
    """Write both, so that the functions above and sentence-transformers 2 or newer read them."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    write_text(json.dumps(modules, indent=2) + "\n", folder / MODULES)
    (folder / POOLING).parent.mkdir(exist_ok=True)
    modes = {f"pooling_mode_{name}_tokens": False for name in ("max", "mean_sqrt_len")}
    modes |= {flag: mode == pooling for flag, mode in FLAGS.items()}
    write_json({"word_embedding_dimension": hidden_size} | modes, folder / POOLING)
    # Lower case is the tokenizer's own business.
    write_json({"max_seq_length": max_length, "do_lower_case": False}, folder / SENTENCE_BERT)
    settings = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(settings, folder / "config_sentence_transformers.json")
