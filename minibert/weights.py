"""Checkpoints: a folder of config.json and safetensors <-> a `Bert`, strictly.

Submodules carry the published names, so there is nothing to translate but three historical habits:
a `bert.` prefix, LayerNorm's `gamma` and `beta`, and heads (`cls.*`) and buffers that are no encoder's.
"""

from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from minibert.errors import InputError
from minibert.files import read_json, read_safetensors, write_json, write_safetensors
from minibert.model import Bert, BertConfig

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What this BERT computes; a config that says otherwise is of another model.
FIXED = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


def read_config(folder: Path) -> BertConfig:
    """The `BertConfig` in a checkpoint folder.

    Raises:
        InputError: if the config is of another architecture, or a size in it makes no sense.
    """
    path = folder / CONFIG
    raw = read_json(path)
    for key, expected in FIXED.items():
        got = raw.get(key, None if key == "model_type" else expected)
        if got != expected:
            raise InputError(
                f"{path}: expected {key} {expected!r}, got {got!r}: not a BERT this project computes"
            )
    values = {field.name: raw.get(field.name, field.default) for field in fields(BertConfig)}
    for name, value in values.items():
        whole = isinstance(getattr(BertConfig, name), int)
        fits = (
            isinstance(value, int) and 1 <= value < 2**31
            if whole
            else isinstance(value, int | float) and 0 <= value < 1
        )
        if isinstance(value, bool) or not fits:
            wanted = "a whole number of at least 1" if whole else "a number from 0 up to 1"
            raise InputError(f"{path}: expected {name} to be {wanted}, got {value!r}")
    if values["hidden_size"] % values["num_attention_heads"]:
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        raise InputError(f"{path}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return BertConfig(**values)


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, one file or sharded, under the names `Bert` uses."""
    if (folder / WEIGHTS).is_file():
        state = read_safetensors(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        state = _read_shards(folder / INDEX)
    else:
        raise InputError(f"{folder}: expected {WEIGHTS} or {INDEX}, found neither")
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("bert.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not name.startswith("cls.") and not name.endswith("position_ids"):
            renamed[name] = tensor
    return renamed


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{index}: expected a weight_map from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise InputError(f"{index}: expected file names of the same folder, got {outside[0]!r}")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= read_safetensors(index.parent / shard)
    missing = sorted(set(weight_map) - set(state))
    if missing:
        raise InputError(f"{index}: tensor {missing[0]!r} is not in {weight_map[missing[0]]}")
    return state


def load_bert(folder: Path) -> Bert:
    """The encoder in a checkpoint folder, in fp32, whatever dtype it was stored in.

    Raises:
        InputError: if a key is missing, unexpected or of another shape than config.json says.
    """
    config = read_config(folder)
    state = read_checkpoint(folder)
    if f"encoder.layer.{config.num_hidden_layers - 1}.output.dense.weight" not in state:
        # Said before building: a config that claims a million layers costs nothing.
        raise InputError(
            f"{folder}: expected {config.num_hidden_layers} layers as {CONFIG} says, the weights have fewer"
        )
    with torch.device("meta"):  # no memory and no random numbers: the checkpoint's tensors become the weights
        bert = Bert(config, with_pooler="pooler.dense.weight" in state)
    expected = bert.state_dict()
    for problem, names in (
        ("missing", expected.keys() - state.keys()),
        ("unexpected", state.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: weights do not fit {CONFIG}: {problem} {min(names)!r}{more}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"expected {list(expected[name].shape)}, got {list(tensor.shape)}"
            raise InputError(f"{folder}: weights do not fit {CONFIG}: {name}: {shapes}")
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: {name}: expected floating-point weights, got {tensor.dtype}")
    bert.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True, assign=True)
    return bert.requires_grad_()


def save_bert(bert: Bert, folder: Path) -> None:
    """Write a checkpoint that `transformers.AutoModel` opens unchanged; the tokenizer's files are not ours to write.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(bert.state_dict(), folder / WEIGHTS)
    architecture = {"architectures": ["BertModel"], "pad_token_id": 0, "torch_dtype": "float32"}
    write_json(architecture | FIXED | asdict(bert.config), folder / CONFIG)
