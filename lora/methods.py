"""The fine-tuning methods, and how one is applied to a model from outside.

The table is read by the command line, so importing it must not import torch.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora.placement import place

if TYPE_CHECKING:
    import torch
    from torch import nn


# Of what is trained, and of what is read back or comes from elsewhere: the one table.
LARGEST_RANK = 2**31 - 1
LARGEST_ALPHA = 1e10  # above the default for the largest rank, 2r


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning. With a `layer` the encoder is frozen but for its adapters.

    Attributes:
        trains_encoder: every weight of the encoder trains.
        layer: the class in `lora.layers` that takes the place of a target.
        scaling: (alpha, r) -> s.
        alpha: r -> the default alpha; it makes s = 2 for every method, so none is only louder.
        lr: the default learning rate; low-rank updates want ten to twenty times that of full fine-tuning.
    """

    lr: float
    trains_encoder: bool = False
    layer: str | None = None
    scaling: Callable[[float, int], float] | None = None
    alpha: Callable[[int], float] | None = None


METHODS = {
    "frozen": Method(lr=1e-2),
    "full": Method(lr=1e-4, trains_encoder=True),
    "lora": Method(lr=1e-3, layer="LoRALinear", scaling=lambda alpha, r: alpha / r, alpha=lambda r: 2 * r),
    "rslora": Method(
        lr=1e-3,
        layer="LoRALinear",
        scaling=lambda alpha, r: alpha / math.sqrt(r),
        alpha=lambda r: 2 * math.sqrt(r),
    ),
    "dora": Method(lr=1e-3, layer="DoRALinear", scaling=lambda alpha, r: alpha / r, alpha=lambda r: 2 * r),
}


def apply_method(
    encoder: "nn.Module",
    method: Method,
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] = ("all",),
    ranks: Mapping[str, int] | None = None,
    alphas: Mapping[str, float] | None = None,
    seed: int = 0,
) -> list[str]:
    """Make an encoder trainable by a method, in place; the names of the layers that were replaced.

    `targets` are those of `lora.placement`. `ranks` and `alphas` are for the layers they name; alpha is
    the method's default for a layer's rank where nothing says otherwise. Adapters are drawn from (seed,
    the layer's name), so methods that share an initialisation start alike.

    Raises:
        ValueError: if rank, alpha, dropout or targets make no sense, or the encoder has adapters already.
    """
    import torch

    from lora import layers

    if any(isinstance(module, layers.LoRALinear) for module in encoder.modules()):
        raise ValueError("the encoder has adapters already")
    if method.layer is None:
        encoder.requires_grad_(method.trains_encoder)
        return []
    linears = {name: one for name, one in encoder.named_modules() if isinstance(one, torch.nn.Linear)}
    adapted = {}
    for name in place(targets, list(linears)):
        r = (ranks or {}).get(name, rank)
        if r < 1:
            raise ValueError(f"rank must be at least 1, got {r}")
        a = (alphas or {}).get(name, method.alpha(r) if alpha is None else alpha)
        layer = getattr(layers, method.layer)(linears[name], r, method.scaling(a, r), dropout)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        layer.reset_parameters(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        adapted[name] = layer
    for given in {*(ranks or {}), *(alphas or {})} - adapted.keys():
        raise ValueError(f"expected ranks and alphas for adapted layers alone, got one for {given!r}")
    encoder.requires_grad_(False)
    for name, layer in adapted.items():
        encoder.set_submodule(name, layer)
        layer.train(encoder.training)
    return list(adapted)


def merge(model: "nn.Module", dtype: "torch.dtype | None" = None) -> "nn.Module":
    """The model with a plain linear layer in the place of each adapted one, for use without adapters.

    The model given stays as it is, and the two share all weights but the merged ones; those are in `dtype`
    (their own if None).
    """
    from lora.layers import LoRALinear

    # deepcopy asks its memo first: what is in there is not copied but taken.
    replaced: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, LoRALinear):
            replaced[id(module)] = module.merged(dtype)
    return copy.deepcopy(model, replaced)
