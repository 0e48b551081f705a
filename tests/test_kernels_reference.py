"""The definitions of the low-rank operations against NumPy in float64, values and gradients."""

import math

import numpy as np
import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from kernels.reference import dora_norm, lora_delta, lora_up_down

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


def test_delta_is_s_times_b_a(shape, dtype):
    _, K, N, r = shape
    A, B = numbers(r, K, dtype=dtype, seed=0), numbers(N, r, dtype=dtype, seed=1)
    a, b = exact(A, B)
    delta = lora_delta(A, B, 1.7)
    assert delta.dtype == dtype
    torch.testing.assert_close(delta.double(), torch.from_numpy(1.7 * np.dot(b, a)), **tolerance(dtype))


def test_up_down_is_the_product_with_the_dense_update_and_so_are_its_gradients(shape, dtype):
    M, K, N, r = shape
    tensors = (
        numbers(M, K, dtype=dtype, seed=0),
        numbers(r, K, dtype=dtype, seed=1),
        numbers(N, r, dtype=dtype, seed=2),
    )
    x, A, B = (tensor.requires_grad_() for tensor in tensors)
    dy = numbers(M, N, dtype=dtype, seed=3)
    y = lora_up_down(x, A, B, 1.7)
    y.backward(dy)
    xn, a, b, g = exact(x, A, B, dy)
    expected = {
        "y": (y, 1.7 * xn @ (b @ a).T),
        "dx": (x.grad, 1.7 * g @ (b @ a)),
        "dA": (A.grad, 1.7 * b.T @ (g.T @ xn)),
        "dB": (B.grad, 1.7 * (g.T @ xn) @ a.T),
    }
    for name, (got, wanted) in expected.items():
        assert got.dtype == dtype, name
        torch.testing.assert_close(
            got.double(),
            torch.from_numpy(wanted),
            **tolerance(dtype),
            msg=lambda m, name=name: f"{name}: {m}",
        )


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
