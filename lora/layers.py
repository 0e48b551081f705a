"""Linear layers that train a low-rank update of a frozen weight.

Letters: M tokens, K input features, N output features, r rank. Weights as stored, `[out, in]`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.dispatch import DTYPES, dora_norm, fits_one_pass, lora_merge
from kernels.dropout import draw
from lora.functions import Merged, Split


class LoRALinear(nn.Linear):
    """y = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ, with W and b frozen (Hu et al. 2021, eq. 3).

    `scaling` is s: alpha / r in LoRA, alpha / sqrt(r) in rsLoRA (Kalajdzievski 2023). B starts at
    zero, so a fresh layer computes exactly what the layer it replaces computed. W may be kept in any
    dtype; A and B are kept in fp32 or better, and all compute in the dtype of x, or in autocast's.

    Raises:
        ValueError: if rank is not in [1, min(in, out)], scaling not above 0, or dropout not in [0, 1).
        TypeError: in a call, if x is not of floating point.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0):
        max_rank = min(base.in_features, base.out_features)
        if not 1 <= rank <= max_rank:
            raise ValueError(f"rank must be in [1, {max_rank}] for {base}, got {rank}")
        if not 0 < scaling < math.inf:
            raise ValueError(f"scaling must be a positive number, got {scaling}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        # On the meta device the weight costs no memory and no random numbers; base's own replaces it.
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        if base.bias is not None:
            self.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        kept = {"device": base.weight.device, "dtype": torch.promote_types(base.weight.dtype, torch.float32)}
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **kept)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **kept)
        # B lies in memory as Bᵀ: its rows are what the kernels read, forward and backward.
        self.lora_B.weight = nn.Parameter(self.lora_B.weight.detach().mT.contiguous().mT)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A uniform in ±1/√K, as nn.Linear's own start and PEFT's; B zero."""
        if not hasattr(self, "lora_A"):  # nn.Linear's constructor calls this before there is an adapter
            return
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]; of any other shape, the last dimension counts"""
        if x.dim() != 2:
            return self(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        x, parameters = activations(x), self.parameters_of_y
        if self.training and self.dropout.p > 0:
            W = self.weight.to(x.dtype)
            return Split.apply(x, draw(self.dropout, x), W, *parameters, self.scaling)
        return Merged.apply(x, self.scaling, *parameters)[0]

    @staticmethod
    def together(layers: Sequence["LoRALinear"], x: Tensor) -> tuple[Tensor, ...]:
        """y of each of several layers with one input x [M, K]; the merged form shares its passes over x."""
        x = activations(x)
        same_scale = len({layer.scaling for layer in layers}) == 1
        drops = any(layer.training and layer.dropout.p > 0 for layer in layers)
        if drops or not same_scale or not fits_one_pass(x, sum(len(layer.lora_A.weight) for layer in layers)):
            return tuple(layer(x) for layer in layers)
        return Merged.apply(x, layers[0].scaling, *(one for layer in layers for one in layer.parameters_of_y))

    @property
    def parameters_of_y(self) -> tuple[Tensor | None, ...]:
        """W, b, A, B and m, as the functions take them"""
        return self.weight, self.bias, self.lora_A.weight, self.lora_B.weight, self.magnitude

    @property
    def magnitude(self) -> Tensor | None:
        """DoRA's m, [N]"""
        return None

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A plain layer with W' as its weight, in `dtype` (that of W if None); this one stays as it is."""
        W, _, *factors = self.parameters_of_y
        weight = merged_weight(W, *factors, self.scaling).to(dtype or W.dtype)
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().to(weight.dtype, copy=True), requires_grad=False)
        return plain.train(self.training)


def activations(x: Tensor) -> Tensor:
    """x in the dtype to compute in: its own, or within autocast what PyTorch's linear layers cast to."""
    if x.dtype not in DTYPES:
        raise TypeError(f"expected x in a floating-point dtype, got {x.dtype}")
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if casts and x.dtype != torch.float64 else x


@torch.no_grad()
def merged_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float
) -> Tensor:
    """W' = g ⊙ (W + s·B A), with DoRA's g = m/‖W + s·B A‖, [N, K] in the dtype of B"""
    V, _, gain = lora_merge(weight, lora_A, lora_B, scaling, magnitude, lora_B.dtype)
    return V if gain is None else V.mul_(gain[:, None])


class DoRALinear(LoRALinear):
    """y = m/‖V‖ ⊙ (x Wᵀ + s · dropout(x) Aᵀ Bᵀ) + b, with V = W + s·B A (Liu et al. 2024, eq. 5).

    m, A and B train; m starts at ‖W‖, so a fresh layer computes what its base computed. ‖V‖ is a
    constant of the step (section 4.3). The bias is not scaled. Dropout touches the low-rank term alone;
    PEFT drops the base term's input too, so the two are equal at dropout 0.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0):
        super().__init__(base, rank, scaling, dropout)
        self.lora_magnitude_vector = nn.Parameter(self.weight_norm())

    @torch.no_grad()  # section 4.3: the norm is a constant of the step, no gradient flows through it
    def weight_norm(self) -> Tensor:
        """‖W + s·B A‖ per output row, [N], in fp32 or better."""
        return dora_norm(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)

    @property
    def magnitude(self) -> Tensor:
        return self.lora_magnitude_vector
