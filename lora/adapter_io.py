"""Adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors, written and read strictly.

Parameters carry PEFT's names already, so a file's key is a prefix and the parameter's own name.
"""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lora.adapter_config import CONFIG, HEADS, AdapterConfig, by_layer, read_adapter_config
from lora.methods import METHODS, Method, apply_method
from lora.placement import place
from minibert.errors import InputError
from minibert.files import check_fits, read_safetensors, write_json, write_safetensors

logger = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
CLASSIFIER = f"{PREFIX}classifier."


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
    published: Callable[[str], str] = str,
) -> None:
    """Write a folder that PEFT opens on the base model.

    Without `classifier` it is a FEATURE_EXTRACTION adapter for `BertModel`; with one (the `weight` and
    `bias` of a linear layer on the pooler's output) a SEQ_CLS adapter for `BertForSequenceClassification`.
    `published` gives a name in the model that PEFT opens it on.
    """
    within, extra = PREFIX, {}
    if classifier is not None:
        within = f"{PREFIX}bert."
        extra = {CLASSIFIER + name: tensor for name, tensor in classifier.items()}
    state = {within + published(name): tensor for name, tensor in adapter_state(encoder).items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(state | extra, folder / WEIGHTS)
    about = {
        "task_type": "FEATURE_EXTRACTION" if classifier is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "modules_to_save": None if classifier is None else list(HEADS),
    }
    settings = _settings(encoder, method, rank, alpha, dropout)
    settings["target_modules"] = [published(name) for name in settings["target_modules"]]
    for pattern in ("rank_pattern", "alpha_pattern"):
        settings[pattern] = {published(name): value for name, value in settings[pattern].items()}
    write_json(about | settings, folder / CONFIG)


def _settings(encoder: nn.Module, method: str, rank: int, alpha: float, dropout: float) -> dict:
    adapted = adapted_names(encoder)
    ranks = {name: encoder.get_submodule(name).lora_A.out_features for name in adapted}
    alphas = {name: _alpha(encoder, name, METHODS[method]) for name in adapted}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": method == "rslora",
        "use_dora": method == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": adapted,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if not math.isclose(a, alpha)},
    }


def _alpha(encoder: nn.Module, name: str, method: Method) -> float:
    """The alpha behind a layer's s, which is proportional to it."""
    layer = encoder.get_submodule(name)
    return layer.scaling / method.scaling(1.0, layer.lora_A.out_features)


def load_adapter(
    encoder: nn.Module,
    folder: Path,
    *,
    targets: Sequence[str] | None = None,
    is_base: Callable[[str], bool] = lambda name: False,
    published: Callable[[str], str] = str,
) -> dict[str, Tensor] | None:
    """Apply the adapter in a folder to a bare encoder, in place; the classifier's weight and bias, if any.

    The layers that get an adapter are those that the settings name and the tensors are of; they must also be
    `targets`, if these are given. `is_base` says of a model's name whether it is the encoder's, as
    `minibert.hub.same_weights` does; where it does not, names and shapes must do, and a warning is logged.
    `published` gives a name in the model that the adapter was made on.

    Raises:
        InputError: if the folder's files are damaged, a setting is unknown or not ours, or a key is missing,
            unexpected or of another shape; the encoder is then as it was.
    """
    file, config = folder / WEIGHTS, read_adapter_config(folder / CONFIG)
    state = read_safetensors(file)
    fault = f"{file}: does not fit {CONFIG} and the model"
    classifier = _take_classifier(state, fault) if config.has_head else None
    within = "bert." if any(name.startswith(f"{PREFIX}bert.") for name in state) else ""
    linears = _linears(encoder)

    def theirs(name: str) -> str:
        return within + published(name)

    if targets is None and not any(f"{PREFIX}{theirs(name)}.lora_A.weight" in state for name in linears):
        wanted = f"{PREFIX}NAME.lora_A.weight of a linear layer of the model"
        raise InputError(f"{fault}: expected {wanted}, got {min(state, default='nothing')!r}")
    names = [name for name in linears if config.targets.match(theirs(name))]
    if not names:
        raise InputError(f"{folder / CONFIG}: expected target_modules of the model, got none of its layers")
    # First on the meta device, where it costs nothing: what is refused must not touch the encoder.
    tried = [(_without_data(encoder), layers) for layers in (names, targets) if layers is not None]
    for model, layers in (*tried, (encoder, names)):
        _apply(model, config, theirs, layers, folder / CONFIG)
        adapters = {PREFIX + theirs(name): tensor for name, tensor in adapter_state(model).items()}
        check_fits(state, adapters, fault)
    for name, tensor in adapters.items():
        tensor.copy_(state[name])
    if config.base and not is_base(config.base):
        _say_base(config.base, folder / CONFIG)
    return classifier


def _say_base(name: str, where: Path) -> None:
    said = f"made for the base model {name!r}, which is not known to be this one"
    logger.warning(f"{where}: {said}; the tensors' names and shapes fit")


def _linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _apply(
    model: nn.Module,
    config: AdapterConfig,
    theirs: Callable[[str], str],
    targets: Sequence[str],
    where: Path,
) -> None:
    try:
        names = place(targets, _linears(model))
        ranks = by_layer("rank_pattern", config.ranks, theirs, names)
        alphas = by_layer("alpha_pattern", config.alphas, theirs, names)
        settings = {"rank": config.rank, "alpha": config.alpha, "ranks": ranks, "alphas": alphas}
        apply_method(model, config.method, dropout=config.dropout, targets=names, **settings)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


def _take_classifier(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    """The head's tensors, which are no longer in `state` then."""
    head = {name: state.pop(name) for name in list(state) if name.startswith(CLASSIFIER)}
    weight = head.get(f"{CLASSIFIER}weight", torch.empty(0))
    outputs, inputs = weight.shape if weight.ndim == 2 else (0, 0)
    shapes = {f"{CLASSIFIER}weight": (outputs, inputs), f"{CLASSIFIER}bias": (outputs,)}
    check_fits(head, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, fault)
    return {name.removeprefix(CLASSIFIER): tensor for name, tensor in head.items()}


def _without_data(model: nn.Module) -> nn.Module:
    """A copy on the meta device."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor.detach().to("meta") for tensor in tensors})
