"""The definitions of the low-rank operations against NumPy in float64, values and gradients."""

import math

import numpy as np
import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from kernels.reference import dora_norm, lora_merge

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# M tokens, K in, N out, r: aligned, prime, rank 1, a rank that is no power of two, no token
SHAPES = ((64, 32, 48, 8), (13, 37, 29, 7), (5, 3, 7, 1), (17, 24, 40, 12), (0, 8, 8, 2))


def numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of the size activations and weights have, so that tolerances mean the same for all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(max(shape[-1], 1))
    return values.to(dtype)


def exact(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().numpy() for tensor in tensors]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> tuple[int, int, int, int]:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("with_magnitude", [False, True])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_merged_weight_is_the_scaled_sum_rounded_once(shape, weight_dtype, dtype, with_magnitude):
    _, K, N, r = shape
    W = numbers(N, K, dtype=weight_dtype, seed=0)
    A, B = numbers(r, K, dtype=torch.float64, seed=1), numbers(N, r, dtype=torch.float64, seed=2)
    m = numbers(N, dtype=torch.float64, seed=3) if with_magnitude else None
    w, a, b = exact(W, A, B)
    V = w + 1.7 * b @ a
    norms = np.sqrt((V**2).sum(axis=1))
    expected = torch.from_numpy(V if m is None else (m.numpy() / norms)[:, None] * V)
    merged, norm = lora_merge(W, A, B, 1.7, m, dtype)
    assert merged.dtype == dtype
    within = {torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps / 2 * (1 + 1e-3))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # below, fewer digits are kept
    torch.testing.assert_close(merged.double(), expected, rtol=within, atol=max(smallest, 1e-15))
    assert (norm is None) == (m is None)
    if m is not None:
        torch.testing.assert_close(norm, torch.from_numpy(norms), **tolerance(torch.float64))
    assert lora_merge(W, A, B, 1.7, m)[0].dtype == weight_dtype


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_norm_is_that_of_the_merged_rows_in_the_adapters_dtype(shape, weight_dtype, dtype):
    _, K, N, r = shape
    W = numbers(N, K, dtype=weight_dtype, seed=0)
    A, B = numbers(r, K, dtype=dtype, seed=1), numbers(N, r, dtype=dtype, seed=2)
    w, a, b = exact(W, A, B)
    norm = dora_norm(W, A, B, 1.7)
    assert norm.dtype == dtype
    expected = torch.from_numpy(np.sqrt(((w + 1.7 * b @ a) ** 2).sum(axis=1)))
    torch.testing.assert_close(norm.double(), expected, **tolerance(dtype))


def test_norm_survives_an_update_that_cancels_the_weight():
    """Its error grows with ‖W‖/‖V‖; the factored form's grows with the square, and leaves no digit here."""
    A, B = numbers(8, 64, dtype=torch.float32, seed=0), numbers(48, 8, dtype=torch.float32, seed=1)
    W = -2 * B @ A + 1e-4 * numbers(48, 64, dtype=torch.float32, seed=2)
    w, a, b = exact(W, A, B)
    expected = np.sqrt(((w + 2 * b @ a) ** 2).sum(axis=1))
    ratio = np.sqrt((w**2).sum(axis=1)) / expected
    assert ratio.max() > 1e4  # otherwise this tests nothing
    error = np.abs(dora_norm(W, A, B, 2.0).double().numpy() / expected - 1)
    assert (error < 4 * np.finfo(np.float32).eps * ratio).all()
