"""The state of a run in one safetensors file: atomic by a rename, no pickle.

Data order and dropout are functions of (seed, step), so no random state needs saving.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minibert.errors import InputError
from minibert.files import check_fits, check_regular, read_safetensors, write_safetensors

FILE = "state.safetensors"


@dataclass
class Progress:
    """How far a run is, beside its weights."""

    step: int = 0  # how far the plan is: optimiser steps, and those in which
    rested: int = 0  # all tasks rested
    epoch_turns: int = 0  # batches trained on in the epoch under way
    epoch_loss: float = 0.0  # summed over them
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    tokens: int = 0
    best: dict[str, float] | None = None  # dev score by task, of the best epoch
    best_epoch: int = 0
    history: list[dict] = field(default_factory=list)  # a line of metrics.jsonl each
    scaler: dict = field(default_factory=dict)
    skipped: int = 0  # steps whose fp16 gradients overflowed
    changes: list[dict] = field(default_factory=list)  # what --resume-anyway let pass, and at which step
    products: dict[str, float] | None = None  # FLOP/s by precision, where they were measured


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name (not copied)."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights back into a model, in place, so that the optimiser keeps hold of them."""
    parameters = trainable_state(model)
    for name, tensor in state.items():
        parameters[name].copy_(tensor)


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    progress: Progress,
    made_with: Mapping | None = None,
) -> None:
    """Write FOLDER/state.safetensors; `made_with` is what `training.provenance` says of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": tensor for name, tensor in trainable_state(model).items()}
    state |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{name}.{key}"] = value
    about = {"progress": json.dumps(vars(progress)), "made_with": json.dumps(made_with or {})}
    write_safetensors(state, folder / FILE, about)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    file: str = FILE,
) -> tuple[Progress, dict[str, Tensor]]:
    """Restore model, optimiser and scaler in place; the progress and the best weights so far.

    Raises:
        InputError: if the checkpoint is damaged or of another model.
    """
    path = folder / file
    state = read_safetensors(path)
    try:
        progress = Progress(**json.loads(_metadata(path).get("progress", "null")))
    except (TypeError, ValueError):
        raise InputError(f"{path}: expected a run's checkpoint, it does not say how far the run is") from None
    if progress.epoch_loss and not progress.epoch_turns:
        raise InputError(f"{path}: is an older version's, from amid an epoch; only that can go on with it")
    weights, best = _under(state, "model."), _under(state, "best.")
    check_fits(weights, trainable_state(model), f"{path}: is of another model or method")
    if progress.best:
        check_fits(best, trainable_state(model), f"{path}: the best weights")
    load_trainable(model, weights)
    for name, parameter in model.named_parameters():
        # A parameter that no step has used yet, another task's head, has no moments.
        if moments := _under(state, f"optimizer.{name}."):
            optimizer.state[parameter] = {key: _beside(parameter, one) for key, one in moments.items()}
    if progress.scaler:
        scaler.load_state_dict(progress.scaler)
    return progress, best


def made_with(path: Path) -> dict:
    """What a checkpoint says of the run it is of; nothing, if an older version wrote it.

    Raises:
        InputError: if it is damaged.
    """
    try:
        return dict(json.loads(_metadata(path).get("made_with", "{}")))
    except (TypeError, ValueError):
        raise InputError(f"{path}: expected a run's checkpoint, it does not say what made it") from None


def _metadata(path: Path) -> dict[str, str]:
    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: expected a whole safetensors file, got a damaged one ({reason})") from None


def _beside(parameter: Tensor, moment: Tensor) -> Tensor:
    """Laid out in memory as the parameter is: fused AdamW walks through both side by side, strides unseen."""
    if moment.shape != parameter.shape:  # the count of steps
        return moment.to(parameter.device)
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
