"""adapter_config.json: PEFT's settings, and which of them our layers compute. Imports no torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora.methods import LARGEST_ALPHA, LARGEST_RANK, METHODS, Method
from minibert.errors import InputError
from minibert.files import read_json

CONFIG = "adapter_config.json"
HEADS = ("classifier", "score")  # what PEFT calls the head of a model that classifies sequences

# Every setting that PEFT 0.21 writes, and the values with which it computes what our layers compute; the
# first is the default. () is any value. What is not here is refused: a later PEFT's setting may compute
# anything.
SETTINGS: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": (None, "FEATURE_EXTRACTION", "SEQ_CLS"),
    "use_rslora": (False, True),
    "use_dora": (False, True),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    # Starting values: the others change the base model too (PiSSA's, OLoRA's, CorDA's, LoRA-GA's, LoftQ's).
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "eva_config": (),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "loftq_config": ({}, None),
    # Other computations.
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "ensure_weight_tying": (False,),
    "kasa_config": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "use_qalora": (False,),
    "velora_config": (None,),
    # Limits on the targets.
    "exclude_modules": (None, []),
    "layers_pattern": (None, []),
    "layers_to_transform": (None, []),
    # Read by `read_adapter_config`.
    "r": (),
    "lora_alpha": (),
    "lora_dropout": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "modules_to_save": (),
    # Which layers have an adapter is what the tensors' names say; the rest computes nothing.
    "target_modules": (),
    "auto_mapping": (),
    "base_model_name_or_path": (),
    "inference_mode": (),
    "megatron_core": (),
    "peft_version": (),
    "qalora_group_size": (),
    "revision": (),
}


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says of a computation. `ranks` and `alphas` are PEFT's patterns."""

    method: Method
    rank: int
    alpha: float
    dropout: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    has_head: bool


def read_adapter_config(path: Path) -> AdapterConfig:
    """Raises:
    InputError: if the file is damaged, or a setting in it is unknown, makes no sense or means something
        that our layers do not compute.
    """
    config = read_json(path)
    for key in config.keys() - SETTINGS.keys():
        raise InputError(f"{path}: unknown setting {key!r}, which may change what is computed")
    for key, values in SETTINGS.items():
        got = config.get(key, None if key == "peft_type" or not values else values[0])
        if values and got not in values:
            raise InputError(f"{path}: expected {key} {' or '.join(map(repr, values))}, got {got!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or any(name not in HEADS for name in saved):
        raise InputError(f"{path}: expected modules_to_save to be {' or '.join(HEADS)}, got {saved!r}")
    return AdapterConfig(
        method=_method_of(config, path),
        rank=_number(config, "r", int, path),
        alpha=_number(config, "lora_alpha", float, path),
        dropout=_number(config, "lora_dropout", float, path),
        ranks=_pattern(config, "rank_pattern", int, path),
        alphas=_pattern(config, "alpha_pattern", float, path),
        has_head=bool(saved),
    )


def by_layer(pattern: Mapping[str, float], within: str, names: list[str]) -> dict[str, float]:
    """A pattern's numbers for the layers it matches; as in PEFT the first of several matches counts.

    `within` is what stands before the layers' names in the model that PEFT saw.
    """
    found = {name: [key for key in pattern if _matches(key, within + name)] for name in names}
    return {name: pattern[keys[0]] for name, keys in found.items() if keys}


def _matches(key: str, name: str) -> bool:
    return name == key[1:] if key.startswith("^") else f".{name}".endswith(f".{key}")


def _method_of(config: dict, path: Path) -> Method:
    chosen = [method for method in ("rslora", "dora") if config.get(f"use_{method}")]
    if len(chosen) > 1:
        raise InputError(f"{path}: expected use_rslora or use_dora, got both")
    return METHODS[chosen[0] if chosen else "lora"]


def _number(config: dict, key: str, kind: type, path: Path, where: str = "") -> float:
    value = config.get(key)
    most = LARGEST_RANK if kind is int else LARGEST_ALPHA
    if isinstance(value, bool) or not isinstance(value, int | kind) or not abs(value) <= most:
        wanted = "a whole number" if kind is int else f"a number of at most {most:g}"
        raise InputError(f"{path}: expected {where}{key} to be {wanted}, got {value!r}")
    return value


def _pattern(config: dict, key: str, kind: type, path: Path) -> dict[str, float]:
    """Numbers by the ends of layers' names, or by whole names after a ^.

    PEFT takes any regular expression; one from a file that someone else wrote can take forever to match.
    """
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: expected {key} to be an object, got {pattern!r}")
    for name in pattern:
        if not re.fullmatch(r"\^?\w+(\.\w+)*", name):
            raise InputError(f"{path}: expected {key} to have layers' names for keys, got {name!r}")
    return {name: _number(pattern, name, kind, path, f"{key}: ") for name in pattern}
