"""Adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors, written and read strictly.

Parameters carry PEFT's names already, so a file's key is a prefix and the parameter's own name.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora.methods import METHODS, TARGETS, Method, apply_method
from minibert.errors import InputError
from minibert.files import check_fits, read_json, read_safetensors, write_json, write_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


def adapter_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters by name, without the weights they adapt."""
    return {name: tensor for name, tensor in encoder.state_dict().items() if ".lora_" in name}


def save_adapter(
    encoder: nn.Module,
    folder: Path,
    *,
    method: str,
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...],
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
        "target_modules": _peft_targets(targets),
        "modules_to_save": None if classifier is None else ["classifier", "score"],
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_json(config, folder / CONFIG)


def _peft_targets(targets: tuple[str, ...]) -> str:
    """A pattern that PEFT matches against whole names: its list form would match by suffix, `output.dense`
    in attention too and `dense` in the pooler."""
    names = "|".join(TARGETS[target].replace(".", r"\.") for target in targets)
    return rf"(.*\.)?encoder\.layer\.\d+\.({names})"


def load_adapter(encoder: nn.Module, folder: Path, *, targets: tuple[str, ...]) -> None:
    """Apply the adapter in a folder to a bare encoder, in place.

    Raises:
        InputError: if the folder's files are damaged, or a key is missing, unexpected or of another shape.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: expected peft_type 'LORA', got {config.get('peft_type')!r}")
    rank, alpha = _number(config, "r", int, path), _number(config, "lora_alpha", float, path)
    dropout = _number(config, "lora_dropout", float, path)
    try:
        apply_method(encoder, _method_of(config), rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    file = folder / WEIGHTS
    state = {}
    for name, tensor in read_safetensors(file).items():
        if not name.startswith(f"{PREFIX}classifier."):
            state[name.removeprefix(PREFIX).removeprefix("bert.")] = tensor
    check_fits(state, adapter_state(encoder), f"{file}: does not fit {CONFIG} and the model")
    encoder.load_state_dict(state, strict=False)  # strictness is the two checks above, on the adapters alone


def _method_of(config: dict) -> Method:
    if config.get("use_dora"):
        return METHODS["dora"]
    return METHODS["rslora" if config.get("use_rslora") else "lora"]


def _number(config: dict, key: str, kind: type, path: Path) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        raise InputError(f"{path}: expected {key} to be a number, got {value!r}")
    return value
