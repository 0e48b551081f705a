"""A pytest plugin: matrix products sum their terms in another order, as on another CPU.

    SUMS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests python -m pytest -p other_sums

On another CPU a library adds up the same products in another order, and the last digits differ. A tolerance
that holds on one machine only shows here: products are computed by NumPy's BLAS instead of PyTorch's, over
an inner dimension that is permuted at random, the same way in each product of one length. SUMS is the seed.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

SEED = int(os.environ.get("SUMS", "0"))
HALF = (torch.bfloat16, torch.float16)  # NumPy has no bf16, and libraries sum both in fp32
kept = torch.library.Library("aten", "IMPL")  # what it registers is gone when it is


@cache
def order(length: int) -> np.ndarray:
    return np.random.default_rng((SEED, length)).permutation(length)


def summed(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype in HALF else x.detach()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of [..., M, K] and [..., K, N], or of [M, K] and [K], in fp32 or better"""
    places = order(a.shape[-1])
    left = np.take(summed(a).numpy(), places, axis=-1)
    right = np.take(summed(b).numpy(), places, axis=max(b.ndim - 2, 0))
    return torch.from_numpy(np.ascontiguousarray(np.matmul(left, right)))


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b).to(a.dtype)


def multiply_add(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    result = alpha * product(a, b)
    return (result + beta * summed(c) if beta else result).to(a.dtype)


def into_out(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*tensors: Tensor, out: Tensor, **factors: float) -> Tensor:
        result = function(*tensors, **factors)
        return out.resize_(result.shape).copy_(result)

    return call


def in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda c, *tensors, **factors: c.copy_(function(c, *tensors, **factors))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch says that its own are replaced
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        function = multiply_add if "add" in name else multiply
        kept.impl(name, function, "CPU")
        kept.impl(f"{name}.out", into_out(function), "CPU")
        if "add" in name:
            kept.impl(f"{name}_", in_place(function), "CPU")
    kept.impl("mv", multiply, "CPU")
