"""The definitions of the low-rank operations against NumPy in float64, values and gradients."""

import math

import numpy as np
import pytest
import torch
from tolerances import tolerance
from torch import Tensor

from kernels.philox import Mask
from kernels.reference import (
    dora_norm,
    lora_backward_x,
    lora_backward_y,
    lora_down,
    lora_drop,
    lora_merge,
    lora_outer,
    lora_outer_dot,
    lora_up,
)

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
    expected = torch.from_numpy(V)
    merged, norm, gain = lora_merge(W, A, B, 1.7, m, dtype)
    assert merged.dtype == dtype
    within = {torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps / 2 * (1 + 1e-3))
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # below, fewer digits are kept
    torch.testing.assert_close(merged.double(), expected, rtol=within, atol=max(smallest, 1e-15))
    assert (norm is None) == (gain is None) == (m is None)
    if m is not None:
        torch.testing.assert_close(norm, torch.from_numpy(norms), **tolerance(torch.float64))
        torch.testing.assert_close(gain, m / torch.from_numpy(norms), **tolerance(torch.float64))
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


MASKS = (None, Mask(0.3, seed=7, step=2, site=1))


def kept(mask: Mask | None, rows: int, columns: int) -> np.ndarray:
    """keep / (1 - p) with the p that the mask rounds to"""
    if mask is None:
        return np.ones((rows, columns))
    return mask.keep(rows, columns).numpy() / (1 - round(mask.p * 65536) / 65536)


def assert_near(got: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), torch.from_numpy(expected), **tolerance(dtype))


@pytest.mark.parametrize("mask", MASKS, ids=["all", "dropout"])
@pytest.mark.parametrize("with_gain", [False, True])
class TestLowRankProducts:
    """Activations in any dtype, parameters and low-rank values in fp32, or fp64 with fp64 activations."""

    def test_down(self, shape, dtype, mask, with_gain):
        M, K, _, r = shape
        fine = torch.promote_types(dtype, torch.float32)
        x, A = numbers(M, K, dtype=dtype, seed=0), numbers(r, K, dtype=fine, seed=1)
        g = numbers(K, dtype=fine, seed=2) if with_gain else None
        x64, A64, g64 = exact(x, A, numbers(K, dtype=fine, seed=2) if with_gain else torch.ones(K))
        h = lora_down(x, A, 1.7, mask, g)
        assert h.dtype == fine
        assert_near(h, 1.7 * (g64 * x64 * kept(mask, M, K)) @ A64.T, fine)

    def test_up_is_in_place(self, shape, dtype, mask, with_gain):
        M, _, N, r = shape
        fine = torch.promote_types(dtype, torch.float32)
        y, h = numbers(M, N, dtype=dtype, seed=0), numbers(M, r, dtype=fine, seed=1)
        Bt = numbers(r, N, dtype=fine, seed=2)
        y64, h64, Bt64 = exact(y, h, Bt)
        changed = y.clone()
        assert lora_up(changed, h, Bt, 1.7, mask) is changed
        assert changed.dtype == dtype
        assert_near(changed, y64 + 1.7 * kept(mask, M, N) * (h64 @ Bt64), dtype)

    def test_outer(self, shape, dtype, mask, with_gain):
        M, K, _, r = shape
        fine = torch.promote_types(dtype, torch.float32)
        h, x = numbers(M, r, dtype=fine, seed=0), numbers(M, K, dtype=dtype, seed=1)
        g = numbers(K, dtype=fine, seed=2) if with_gain else None
        h64, x64, g64 = exact(h, x, torch.ones(K) if g is None else g)
        dA = lora_outer(h, x, 1.7, mask, g)
        assert dA.dtype == fine
        assert_near(dA, 1.7 * h64.T @ (g64 * x64 * kept(mask, M, K)), fine)

    def test_the_fused_passes_are_the_ones_they_fuse(self, shape, dtype, mask, with_gain):
        M, K, _, r = shape
        fine = torch.promote_types(dtype, torch.float32)
        x, dx = numbers(M, K, dtype=dtype, seed=0), numbers(M, K, dtype=dtype, seed=1)
        h, A = numbers(M, r, dtype=fine, seed=2), numbers(r, K, dtype=fine, seed=3)
        g = numbers(K, dtype=fine, seed=4) if with_gain else None
        x64, dx64, h64, A64, g64 = exact(x, dx, h, A, torch.ones(K) if g is None else g)
        changed = dx.clone()
        dA = lora_backward_x(x, changed, h, A, mask)
        assert_near(dA, h64.T @ (x64 * kept(mask, M, K)), fine)
        assert_near(changed, dx64 + kept(mask, M, K) * (h64 @ A64), dtype)
        dh, dBt = lora_backward_y(x, h, A, 1.7, g)
        assert_near(dh, 1.7 * (g64 * x64) @ A64.T, fine)
        assert_near(dBt, 1.7 * h64.T @ (g64 * x64), fine)
        z, norm = numbers(M, K, dtype=dtype, seed=5), numbers(K, dtype=fine, seed=6).abs() + 1
        z64, norm64 = exact(z, norm)
        dBt, dm = lora_outer_dot(h, x, z, 1.7, norm if g is None else g, norm)
        assert_near(dBt, 1.7 * h64.T @ ((norm64 if g is None else g64) * x64), fine)
        assert_near(dm, (x64 * z64).sum(axis=0) / norm64, fine)


def test_drop_keeps_the_dtype_and_scales_what_is_kept(dtype):
    x = numbers(9, 21, dtype=dtype, seed=0)
    dropped = lora_drop(x, MASKS[1])
    assert dropped.dtype == dtype
    assert_near(dropped, exact(x)[0] * kept(MASKS[1], 9, 21), dtype)


def test_what_is_dropped_may_be_infinite():
    x = torch.full((1, 64), math.inf)
    keep = MASKS[1].keep(1, 64)
    assert not keep.all()
    assert lora_drop(x, MASKS[1])[~keep].eq(0).all()


@pytest.mark.parametrize("mask", MASKS, ids=["all", "dropout"])
def test_the_operations_make_up_a_layers_exact_gradients(mask):
    """Against autograd on y = g ⊙ (x Wᵀ + s · x̃ Aᵀ Bᵀ), with g held constant."""
    M, K, N, r, s = 11, 13, 17, 3, 1.7
    x, W, A, B, g, dy = (
        numbers(*size, dtype=torch.float64, seed=seed)
        for seed, size in enumerate([(M, K), (N, K), (r, K), (N, r), (N,), (M, N)])
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, A, B)]
    dropped = leaves[0] * torch.from_numpy(kept(mask, M, K))
    expected_y = g * (leaves[0] @ W.T + s * dropped @ leaves[1].T @ leaves[2].T)
    expected = torch.autograd.grad(expected_y, leaves, dy)

    Bt = B.T.contiguous()
    h = lora_down(x, A, mask=mask)
    y = g * lora_up(x @ W.T, h, Bt, s)
    dh, dBt = lora_backward_y(dy, h, Bt, s, gain=g)
    dx = (g * dy) @ W
    dA = lora_backward_x(x, dx, dh, A, mask)
    for got, want in zip((y, dx, dA, dBt.T), (expected_y, *expected), strict=True):
        torch.testing.assert_close(got, want.detach(), **tolerance(torch.float64))
