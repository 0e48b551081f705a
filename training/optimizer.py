"""AdamW's parameter groups, and the learning rate as a function of the step."""

import math
from collections.abc import Mapping

import torch
from torch import nn


def build_optimizer(
    model: nn.Module, lr: float, weight_decay: float, head_lr: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over what trains; vectors (biases, norms, magnitudes) do not decay.

    `head_lr`: task -> the peak learning rate of its head, where it is not `lr`. A group's is its "peak".
    """
    trains: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            task = name.split(".")[1] if name.startswith("heads.") else None
            trains.setdefault((head_lr or {}).get(task, lr), []).append(parameter)
    groups = [
        {"params": [p for p in params if (p.ndim > 1) == decays], "peak": peak,
         "weight_decay": weight_decay if decays else 0.0}
        for peak, params in trains.items()
        for decays in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def lr_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate at step 0, 1, ..., total - 1.

    It rises over the first `warmup` share of the steps, then falls to 0 by a line or half a cosine, or stays.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, total - rising)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
