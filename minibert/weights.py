"""Checkpoints: a folder of config.json and safetensors <-> a `Bert`, strictly.

Submodules carry BERT's published names, so there is nothing to translate but historical habits: a `bert.`
prefix, LayerNorm's `gamma` and `beta`, heads and buffers that are no encoder's; and its relatives' own names.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from minibert.errors import InputError
from minibert.family import CONFIG, FAMILIES, model_type
from minibert.files import (
    check_fits,
    read_json,
    read_pickled,
    read_safetensors,
    write_json,
    write_safetensors,
)
from minibert.model import Bert, BertConfig
from minibert.sources import PICKLED, WEIGHTS, weight_files

logger = logging.getLogger(__name__)

LARGEST = 2**24  # of any size: beyond all models, and the product of two still fits a tensor


def read_config(folder: Path) -> BertConfig:
    """The `BertConfig` in a checkpoint folder.

    Raises:
        InputError: if the config is of another architecture, or a size in it makes no sense.
    """
    path = folder / CONFIG
    raw = read_json(path)
    kind = model_type(folder)
    family = FAMILIES[kind]
    for key, expected in family.fixed.items():
        got = raw.get(key, expected)
        if got != expected:
            raise InputError(
                f"{path}: expected {key} {expected!r}, got {got!r}: not a BERT this project computes"
            )
    defaults = {field.name: field.default for field in fields(BertConfig)} | family.defaults
    read = defaults.keys() - family.constants.keys() - {"model_type"}
    values = {name: raw.get(family.keys.get(name, name), defaults[name]) for name in defaults if name in read}
    for name, value in values.items():
        whole = isinstance(getattr(BertConfig, name), int)
        fits = (
            isinstance(value, int) and 1 <= value <= LARGEST
            if whole
            else isinstance(value, int | float) and 0 <= value < 1
        )
        if isinstance(value, bool) or not fits:
            wanted = f"a whole number from 1 to {LARGEST}" if whole else "a number from 0 up to 1"
            key = family.keys.get(name, name)
            raise InputError(f"{path}: expected {key} to be {wanted}, got {value!r}")
    if values["hidden_size"] % values["num_attention_heads"]:
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        raise InputError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return BertConfig(**values, **family.constants, model_type=kind)


def read_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """All tensors of a checkpoint, one file or sharded: file, key and tensor, LayerNorms by today's names."""
    for path in [folder / file for file in weight_files(folder)]:
        if pickled := path.name == PICKLED:
            _say_pickled(path)
        for key, tensor in (read_pickled(path) if pickled else read_safetensors(path)).items():
            key = key.replace("LayerNorm.gamma", "LayerNorm.weight")
            yield path, key.replace("LayerNorm.beta", "LayerNorm.bias"), tensor


@cache  # a run reads its model more than once
def _say_pickled(path: Path) -> None:
    logger.warning("%s: a pickle, of which only tensors are read; %s would be safer", path, WEIGHTS)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The encoder's tensors of a checkpoint under the names `Bert` uses; what is left out is logged."""
    state, head = split_checkpoint(folder)
    if head:
        _say_head(folder, ", ".join(sorted({name.partition(".")[0] for name in head})))
    return state


def split_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors under the names `Bert` uses, and those of the heads, in a model that has any."""
    family = FAMILIES[model_type(folder)]
    tensors = list(read_tensors(folder))
    prefixed = any(key.startswith(family.prefix) for _, key, _ in tensors)
    state: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for path, key, tensor in tensors:
        of_head = key.startswith("cls.") or (prefixed and not key.startswith(family.prefix))
        name = key if of_head else family.ours(key.removeprefix(family.prefix))
        if name in state:
            raise InputError(f"{path}: {key!r} is a second {name!r}")
        if not name.endswith("position_ids"):
            (head if of_head else state)[name] = tensor
    return state, head


@cache
def _say_head(folder: Path, names: str) -> None:
    logger.warning("%s: the encoder is taken alone, without %s", folder, names)


def load_bert(folder: Path) -> Bert:
    """The encoder in a checkpoint folder, in fp32, whatever dtype it was stored in.

    Raises:
        InputError: if a key is missing, unexpected or of another shape than config.json says.
    """
    config = read_config(folder)
    state = read_checkpoint(folder)
    layers = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
    if layers < config.num_hidden_layers:
        # Said before building: a config that claims a million layers costs nothing.
        wanted = f"num_hidden_layers {config.num_hidden_layers} as {CONFIG} says"
        raise InputError(f"{folder}: expected {wanted}, the weights have {layers}")
    with torch.device("meta"):  # no memory and no random numbers: the checkpoint's tensors become the weights
        bert = Bert(config, with_pooler="pooler.dense.weight" in state)
    check_fits(state, bert.state_dict(), f"{folder}: the weights do not fit {CONFIG}")
    bert.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)
    return bert.requires_grad_()


def save_bert(bert: Bert, folder: Path) -> None:
    """Write weights and config so that `transformers.AutoModel` opens them; no tokenizer.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = bert.config.family
    state = {family.published(name): tensor for name, tensor in bert.state_dict().items()}
    write_safetensors(state, folder / WEIGHTS)
    dtype = str(bert.embeddings.word_embeddings.weight.dtype).removeprefix("torch.")
    architecture = {"architectures": [family.architecture], "pad_token_id": 0, "torch_dtype": dtype}
    settings = {name: value for name, value in asdict(bert.config).items() if name not in family.constants}
    settings = {family.keys.get(name, name): value for name, value in settings.items()}
    write_json(architecture | family.fixed | settings, folder / CONFIG)
