"""adapter_config.json: PEFT's settings, which of them our layers compute, and which layers they mean.

Imports no torch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora.methods import LARGEST_ALPHA, LARGEST_RANK, METHODS, Method
from lora.regex import Regex
from minibert.errors import InputError
from minibert.files import read_json

CONFIG = "adapter_config.json"
HEADS = ("classifier", "score")  # what PEFT calls the head of a model that classifies sequences
DEFAULT_TARGETS = ["query", "value"]  # PEFT's for a BERT
OTHER_FAMILY = re.compile(r"transformers\.models\.(?!(bert|roberta|xlm_roberta|distilbert)\.)")

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
    # Read by `read_adapter_config`.
    "r": (),
    "lora_alpha": (),
    "lora_dropout": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "modules_to_save": (),
    "target_modules": (),
    "exclude_modules": (),
    "layers_to_transform": (),
    "layers_pattern": (),
    "auto_mapping": (),
    "base_model_name_or_path": (),
    "revision": (),
    # These compute nothing.
    "inference_mode": (),
    "megatron_core": (),
    "peft_version": (),
    "qalora_group_size": (),
}

Names = Regex | list[str]  # an expression for whole names, or their ends
Pattern = Mapping[str, tuple[Regex, float]]  # numbers, by an expression for whole names or their ends


@dataclass(frozen=True)
class Targets:
    """PEFT's rules for which layers have an adapter. `layers` are numbers in one of the module `lists`."""

    modules: Names
    excluded: Names
    layers: Sequence[int] | None
    lists: Sequence[Regex]

    def match(self, name: str) -> bool:
        if _match(self.excluded, name) or not _match(self.modules, name):
            return False
        if self.layers is None:
            return True
        number = re.search(r"\.(\d+)\.", name)
        return bool(number) and int(number[1]) in self.layers and any(one.match(name) for one in self.lists)


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter_config.json says of a computation. `ranks` and `alphas` are PEFT's patterns."""

    method: Method
    rank: int
    alpha: float
    dropout: float
    ranks: Pattern
    alphas: Pattern
    targets: Targets
    has_head: bool
    base: str | None


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
        method=_method_of(config),
        rank=_number(config, "r", int, path),
        alpha=_number(config, "lora_alpha", float, path),
        dropout=_number(config, "lora_dropout", float, path),
        ranks=_pattern(config, "rank_pattern", int, path),
        alphas=_pattern(config, "alpha_pattern", float, path),
        targets=_targets(config, path),
        has_head=bool(saved),
        base=_base(config, path),
    )


def by_layer(
    setting: str, pattern: Pattern, theirs: Callable[[str], str], names: Sequence[str]
) -> dict[str, float]:
    """The pattern's numbers for the layers it matches; as in PEFT the first of several matches counts.

    `theirs` gives a layer's name in the model that PEFT saw.

    Raises:
        ValueError: if a key matches none of the layers.
    """
    matched = {name: [key for key in pattern if pattern[key][0].match(theirs(name))] for name in names}
    for key in pattern.keys() - {key for keys in matched.values() for key in keys}:
        raise ValueError(f"expected {setting} to name layers with an adapter, {key!r} matches none")
    return {name: pattern[keys[0]][1] for name, keys in matched.items() if keys}


def _match(names: Names, name: str) -> bool:
    if isinstance(names, Regex):
        return names.fullmatch(name)
    return any(f".{name}".endswith(f".{end}") for end in names)


def _method_of(config: dict) -> Method:
    method = METHODS["rslora" if config.get("use_rslora") else "lora"]
    return replace(method, layer=METHODS["dora"].layer) if config.get("use_dora") else method


def _base(config: dict, path: Path) -> str | None:
    """The name of the model that was adapted, with `@` and a revision if one is given."""
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict) and OTHER_FAMILY.match(str(mapping.get("parent_library"))):
        raise InputError(f"{path}: expected an adapter of a BERT, got one of {mapping['parent_library']!r}")
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    for value in (name, revision):
        if not isinstance(value, str | None):
            raise InputError(f"{path}: expected a base model's name and revision, got {value!r}")
    return f"{name}@{revision}" if name and revision else name


def _targets(config: dict, path: Path) -> Targets:
    modules, layers = config.get("target_modules"), config.get("layers_to_transform")
    if isinstance(modules, str) and layers is not None:
        raise InputError(f"{path}: expected layers_to_transform None beside an expression, got {layers!r}")
    if layers is None and config.get("layers_pattern"):
        raise InputError(f"{path}: expected layers_to_transform beside layers_pattern, got None")
    layers = [layers] if isinstance(layers, int) else layers
    if layers is not None and not (isinstance(layers, list) and all(type(one) is int for one in layers)):
        raise InputError(f"{path}: expected layers_to_transform to be whole numbers, got {layers!r}")
    lists = config.get("layers_pattern") or []
    lists = [lists] if isinstance(lists, str) else _names(config, "layers_pattern", path, [])
    lists = [rf"(?:^|.*?\.){one}\.\d+\." for one in lists] or [r".*?\.[^.]*\.\d+\."]
    return Targets(
        modules=_names(config, "target_modules", path, DEFAULT_TARGETS),
        excluded=_names(config, "exclude_modules", path, []),
        layers=layers or None,
        lists=[_regex(one, "layers_pattern", path) for one in lists],
    )


def _names(config: dict, key: str, path: Path, default: list[str]) -> Names:
    names = config.get(key)
    if names is None:
        return default
    if isinstance(names, str):
        every = key == "target_modules" and names.lower() == "all-linear"
        return _regex(".*" if every else names, key, path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: expected {key} to be names or a regular expression, got {names!r}")
    return names


def _regex(pattern: str, key: str, path: Path) -> Regex:
    try:
        return Regex(pattern)
    except ValueError as error:
        wanted = f"expected {key} to be a regular expression"
        raise InputError(f"{path}: {wanted}, got {pattern[:100]!r} ({error})") from None


def _number(config: dict, key: str, kind: type, path: Path, where: str = "") -> float:
    value = config.get(key)
    most = LARGEST_RANK if kind is int else LARGEST_ALPHA
    if isinstance(value, bool) or not isinstance(value, int | kind) or not abs(value) <= most:
        wanted = "a whole number" if kind is int else f"a number of at most {most:g}"
        raise InputError(f"{path}: expected {where}{key} to be {wanted}, got {value!r}")
    return value


def _pattern(config: dict, key: str, kind: type, path: Path) -> Pattern:
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: expected {key} to be an object, got {pattern!r}")
    return {
        one: (_regex(rf"(.*\.)?({one})$", key, path), _number(pattern, one, kind, path, f"{key}: "))
        for one in pattern
    }
