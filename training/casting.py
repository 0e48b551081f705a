"""A layer's trained weights in half precision: on a GPU all in one call, and so their gradients in fp32.

A layer of BERT has 16 of them. To cast each where it is used costs a GPU more time to launch than to do.
The numbers are the same either way.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kernels.gradients import first_order
from minibert.model import Bert
from minibert.sequences import Sequences


class CastAll(torch.autograd.Function):
    """Each of several tensors in `dtype`."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(cast_all(tensors, dtype))

    @staticmethod
    @first_order
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(cast_all([one for one in gradients if one is not None], ctx.dtype))
        return None, *(None if one is None else next(cast) for one in gradients)


def cast_all(tensors: list[Tensor] | tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    into = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(into, list(tensors))
    return into


def cast_layer_by_layer(bert: Bert) -> None:
    """Have each layer of `bert` cast all of its weights, which are of one dtype, before it is called."""

    def call(layer: nn.Module, x: Tensor, sequences: Sequences) -> Tensor:
        """x [M, H] -> [M, H]"""
        masters = {name: weight for name, weight in layer.named_parameters() if weight.dtype != x.dtype}
        if not masters:
            return layer(x, sequences)
        weights = dict(zip(masters, CastAll.apply(x.dtype, *masters.values()), strict=True))
        return functional_call(layer, weights, (x, sequences), tie_weights=False)

    bert.call_layer = call
