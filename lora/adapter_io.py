"""Adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors, written and read strictly.

Parameters carry PEFT's names already, so a file's key is a prefix and the parameter's own name.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora.methods import METHODS, Method, apply_method
from minibert.errors import InputError
from minibert.files import check_fits, read_json, read_safetensors, write_json, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."

# The settings with which PEFT computes what our layers compute, whatever the tensors; the first is the
# default. Other starting values (PiSSA's, OLoRA's) change the base model too.
KNOWN = {
    "peft_type": ("LORA",),
    "use_rslora": (False, True),
    "use_dora": (False, True),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "alora_invocation_tokens": (None,),
}


def adapter_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by name, without the weights they adapt."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if ".lora_" in name}


def adapted_names(encoder: nn.Module) -> list[str]:
    """The adapted layers' whole names: PEFT matches these by suffix, and shorter ones would hit too much,
    `output.dense` in attention too and `dense` in the pooler."""
    return [name.removesuffix(".lora_A") for name, _ in encoder.named_modules() if name.endswith(".lora_A")]


def save_adapter(
    encoder: nn.Module,
    folder: Path,
    *,
    method: str,
    rank: int,
    alpha: float,
    dropout: float,
    base: str,
    classifier: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder that PEFT opens on the base model.

    Without `classifier` it is a FEATURE_EXTRACTION adapter for `BertModel`; with one (the `weight` and
    `bias` of a linear layer on the pooler's output) a SEQ_CLS adapter for `BertForSequenceClassification`.
    """
    within, extra = PREFIX, {}
    if classifier is not None:
        within = f"{PREFIX}bert."
        extra = {f"{PREFIX}classifier.{name}": tensor for name, tensor in classifier.items()}
    state = {within + name: tensor for name, tensor in adapter_state(encoder).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(state | extra, folder / WEIGHTS)
    adapted = adapted_names(encoder)
    ranks = {name: encoder.get_submodule(name).lora_A.out_features for name in adapted}
    ranks = {name: r for name, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if classifier is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": method == "rslora",
        "use_dora": method == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": adapted,
        "modules_to_save": None if classifier is None else ["classifier", "score"],
        "rank_pattern": ranks,
        "alpha_pattern": {name: _alpha(encoder, name, METHODS[method]) for name in ranks},
    }
    write_json(config, folder / CONFIG)


def _alpha(encoder: nn.Module, name: str, method: Method) -> float:
    """The alpha behind a layer's s, which is proportional to it."""
    layer = encoder.get_submodule(name)
    return layer.scaling / method.scaling(1.0, layer.lora_A.out_features)


def load_adapter(encoder: nn.Module, folder: Path, *, targets: tuple[str, ...]) -> None:
    """Apply the adapter in a folder to a bare encoder, in place.

    Raises:
        InputError: if the folder's files are damaged, a setting is not `KNOWN`, or a key is missing,
            unexpected or of another shape.
    """
    path = folder / CONFIG
    config = read_json(path)
    for key, values in KNOWN.items():
        got = config.get(key, None if key == "peft_type" else values[0])
        if got not in values:
            raise InputError(f"{path}: expected {key} {' or '.join(map(repr, values))}, got {got!r}")
    rank, alpha = _number(config, "r", int, path), _number(config, "lora_alpha", float, path)
    dropout, method = _number(config, "lora_dropout", float, path), _method_of(config, path)
    ranks, alphas = (
        _pattern(config, "rank_pattern", int, path),
        _pattern(config, "alpha_pattern", float, path),
    )
    settings = {"rank": rank, "alpha": alpha, "ranks": ranks, "alphas": alphas}
    try:
        apply_method(encoder, method, dropout=dropout, targets=targets, **settings)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    file = folder / WEIGHTS
    state = read_safetensors(file)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{PREFIX}classifier.")}
    within = f"{PREFIX}bert." if any(name.startswith(f"{PREFIX}bert.") for name in state) else PREFIX
    adapters = {within + name: tensor for name, tensor in adapter_state(encoder).items()}
    check_fits(state, adapters, f"{file}: does not fit {CONFIG} and the model")
    for name, tensor in adapters.items():
        tensor.copy_(state[name])


def _method_of(config: dict, path: Path) -> Method:
    chosen = [method for method in ("rslora", "dora") if config.get(f"use_{method}")]
    if len(chosen) > 1:
        raise InputError(f"{path}: expected use_rslora or use_dora, got both")
    return METHODS[chosen[0] if chosen else "lora"]


def _number(config: dict, key: str, kind: type, path: Path) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | kind) or not abs(value) < 2**31:
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{path}: expected {key} to be {wanted}, got {value!r}")
    return value


def _pattern(config: dict, key: str, kind: type, path: Path) -> dict[str, float]:
    """Numbers by the whole names of layers; PEFT's patterns in general are refused as no layer's name."""
    pattern = config.get(key) or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{path}: expected {key} to be an object, got {pattern!r}")
    return {name: _number(pattern, name, kind, path) for name in pattern}
