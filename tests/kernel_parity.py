"""Each Triton operation against float64: run by test_kernels_triton.py, in a process of its own.

Triton decides on its interpreter when a kernel is decorated, so the process must have TRITON_INTERPRET=1
from its start (CPU tensors), or not at all (a GPU). Products are written out in NumPy; the masks are those
of a Philox of this file's own.
"""

import math
import os
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.launch import TABLE, Launch, architecture
from kernels.lora_backward_x import lora_backward_x
from kernels.lora_backward_y import lora_backward_y
from kernels.lora_down import lora_down
from kernels.lora_drop import lora_drop
from kernels.lora_merge import dora_gain, dora_norm, lora_merge
from kernels.lora_outer import lora_outer, lora_outer_dot
from kernels.lora_up import lora_up
from kernels.philox import Mask

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
RANKS = (1, 3, 8, 12, 16, 64)
MASK = Mask(0.3, seed=-(2**40) - 17, step=5, site=3, first_row=2)
STORED = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 7e-3}
# M, K or N, and whether there is a mask and a gain: no multiple of any tile, nor of 8
CASES = ((70, 96, False), (37, 83, True))


@pytest.fixture(autouse=True)
def poisoned():
    """What torch.empty gives is NaN until it is written, and PyTorch's own part is deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def launches(operation: str) -> list[tuple[int, torch.dtype, Launch]]:
    """What there is to run: every rank with each of its launches, in the dtypes they are dispatched for."""
    found = []
    rows = (75, 80, 90) if INTERPRETED else (architecture(DEVICE),)
    for row in (*rows, "fp32"):
        for rank in RANKS:
            fits = [launch for limit, launch in TABLE.get((operation, row), ()) if rank <= limit][:1]
            for launch in fits:
                dtypes = [torch.float32] if row == "fp32" else [torch.float16, torch.float32]
                # The interpreter computes nonsense with bf16 operands of tl.dot.
                if row != "fp32" and (launch.form != "dot" or not INTERPRETED and row >= 80):
                    dtypes += [torch.bfloat16] * (INTERPRETED or row >= 80)
                found += [(rank, dtype, launch) for dtype in dtypes]
    return list(dict.fromkeys(found))


def each(operation: str):
    """Parametrises a test by what the operation is launched with."""
    ids = [f"r{rank}-{str(dtype)[6:]}-{launch.form}" for rank, dtype, launch in launches(operation)]
    return pytest.mark.parametrize(("rank", "dtype", "launch"), launches(operation), ids=ids)


cases = pytest.mark.parametrize(("M", "width", "full"), CASES, ids=["bare", "full"])


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def beside_others(M: int, rank: int) -> Tensor:
    """h [M, r] as it is with the h of other layers side by side: its rows do not follow one another."""
    return numbers(M, rank + 8, seed=3)[:, :rank]


def exact(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().cpu().double().numpy().copy() for tensor in tensors]


def philox_bits(rows: int, columns: int, mask: Mask) -> np.ndarray:
    """16 bits an element: Philox4x32-7 in unsigned 64-bit arithmetic, as Salmon et al. write it."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    row, group = np.meshgrid(np.arange(rows), np.arange(-(-columns // 8)), indexing="ij")
    counter = np.zeros((*row.shape, 4), dtype=np.uint64)
    counter[..., 0], counter[..., 1] = group, row + mask.first_row
    counter[..., 2], counter[..., 3] = mask.step, mask.site
    key = np.array([mask.seed % 2**32, mask.seed // 2**32 % 2**32], dtype=np.uint64)
    for _ in range(7):
        left = counter[..., 0] * np.uint64(0xD2511F53)
        right = counter[..., 2] * np.uint64(0xCD9E8D57)
        words = (right >> shift ^ counter[..., 1] ^ key[0], right & low,
                 left >> shift ^ counter[..., 3] ^ key[1], left & low)  # fmt: skip
        counter = np.stack(words, axis=-1)
        key = (key + np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)) & low
    return counter.astype("<u4").view("<u2").reshape(rows, -1)[:, :columns]


def kept(mask: Mask | None, rows: int, columns: int) -> np.ndarray:
    """keep / (1 - p)"""
    if mask is None:
        return np.ones((rows, columns))
    dropped = round(65536 * mask.p)
    return (philox_bits(rows, columns, mask) >= dropped) * (65536 / (65536 - dropped))


def assert_near(got: Tensor, expected: np.ndarray, within: float) -> None:
    """By the Frobenius norm; prints the error for the table of maxima. NaN is not near."""
    error = np.linalg.norm(exact(got)[0] - expected) / max(np.linalg.norm(expected), 1e-30)
    print(f"error {error:.1e} of {within:.0e}")
    assert error <= within


def summed(dtype: torch.dtype, launch: Launch) -> float:
    """The error of an fp32 result: a tensor core's operands are rounded to the activations' dtype."""
    return STORED[dtype] if launch.form == "dot" else STORED[torch.float32]


@cases
@each("down")
def test_down(M, width, full, rank, dtype, launch):
    x, A, g = numbers(M, width, dtype=dtype, seed=0), numbers(rank, width, seed=1), numbers(width, seed=2)
    mask, gain = (MASK, g) if full else (None, None)
    x64, A64, g64 = exact(x, A, g if full else torch.ones(width))
    expected = 1.7 * (g64 * x64 * kept(mask, M, width)) @ A64.T
    assert_near(lora_down(x, A, 1.7, mask, gain, launch=launch), expected, summed(dtype, launch))


@cases
@each("up")
def test_up(M, width, full, rank, dtype, launch):
    y, h, Bt = numbers(M, width, dtype=dtype, seed=0), numbers(M, rank, seed=1), numbers(rank, width, seed=2)
    mask = MASK if full else None
    y64, h64, Bt64 = exact(y, h, Bt)
    expected = y64 + 1.7 * kept(mask, M, width) * (h64 @ Bt64)
    assert lora_up(y, h, Bt, 1.7, mask, launch=launch) is y
    assert_near(y, expected, STORED[dtype])


@cases
@each("outer")
def test_outer(M, width, full, rank, dtype, launch):
    h, x, g = beside_others(M, rank), numbers(M, width, dtype=dtype, seed=1), numbers(width, seed=2)
    mask, gain = (MASK, g) if full else (None, None)
    h64, x64, g64 = exact(h, x, g if full else torch.ones(width))
    expected = 1.7 * h64.T @ (g64 * x64 * kept(mask, M, width))
    assert_near(lora_outer(h, x, 1.7, mask, gain, launch=launch), expected, summed(dtype, launch))


@pytest.mark.parametrize(("M", "width"), [case[:2] for case in CASES])
@each("outer")
def test_outer_dot(M, width, rank, dtype, launch):
    h, dy, z = (numbers(M, size, dtype=kind, seed=size) for size, kind in
                ((rank, torch.float32), (width, dtype), (width, dtype)))  # fmt: skip
    g, norm = numbers(width, seed=2), numbers(width, seed=3).abs() + 1
    h64, dy64, z64, g64, norm64 = exact(h, dy, z, g, norm)
    dBt, dm = lora_outer_dot(h, dy, z, 1.7, g, norm, launch=launch)
    assert_near(dBt, 1.7 * h64.T @ (g64 * dy64), summed(dtype, launch))
    assert_near(dm, (dy64 * z64).sum(axis=0) / norm64, STORED[torch.float32])


@cases
@each("backward_x")
def test_backward_x(M, width, full, rank, dtype, launch):
    x, dx = numbers(M, width, dtype=dtype, seed=0), numbers(M, width, dtype=dtype, seed=1)
    dh, A = numbers(M, rank, seed=2), numbers(rank, width, seed=3)
    mask = MASK if full else None
    x64, dx64, dh64, A64 = exact(x, dx, dh, A)
    dA = lora_backward_x(x, dx, dh, A, mask, launch=launch)
    assert_near(dA, dh64.T @ (x64 * kept(mask, M, width)), summed(dtype, launch))
    assert_near(dx, dx64 + kept(mask, M, width) * (dh64 @ A64), STORED[dtype])


@cases
@each("backward_y")
def test_backward_y(M, width, full, rank, dtype, launch):
    dy, h = numbers(M, width, dtype=dtype, seed=0), beside_others(M, rank)
    Bt, g = numbers(rank, width, seed=2), numbers(width, seed=3)
    dy64, h64, Bt64, g64 = exact(dy, h, Bt, g if full else torch.ones(width))
    dh, dBt = lora_backward_y(dy, h, Bt, 1.7, g if full else None, launch=launch)
    assert_near(dh, 1.7 * (g64 * dy64) @ Bt64.T, summed(dtype, launch))
    assert_near(dBt, 1.7 * h64.T @ (g64 * dy64), summed(dtype, launch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("N", "K"), [(5, 96), (3, 1100)])
def test_merge_and_norm(N, K, rank, dtype):
    W, A, B = numbers(N, K, dtype=dtype, seed=0), numbers(rank, K, seed=1), numbers(N, rank, seed=2)
    m = numbers(N, seed=3)
    w64, A64, B64, m64 = exact(W, A, B, m)
    V = w64 + 0.7 * B64 @ A64
    norms = np.sqrt((V**2).sum(axis=1))
    merged, norm, gain = lora_merge(W, A, B, 0.7)
    assert norm is None
    assert gain is None
    assert_near(merged, V, STORED[dtype])
    transposed = B.mT.contiguous().mT  # as a layer that keeps Bᵀ has it
    gV = torch.empty_like(W)
    merged, norm, gain = lora_merge(W, A, transposed, 0.7, m, torch.float16, gV)
    assert_near(merged, V, STORED[torch.float16])
    assert_near(norm, norms, STORED[torch.float32])
    assert_near(gain, m64 / norms, STORED[torch.float32])
    assert_near(gV, V * (m64 / norms)[:, None], STORED[dtype])
    assert_near(dora_norm(W, A, B, 0.7), norms, STORED[torch.float32])
    for got, expected in zip(dora_gain(W, A, B, 0.7, m), (norms, m64 / norms), strict=True):
        assert_near(got, expected, STORED[torch.float32])


def test_a_row_of_zeros_has_the_smallest_norm():
    W, A, B = torch.zeros(3, 40), numbers(2, 40, seed=0).cpu(), torch.zeros(3, 2)
    W, A, B = (tensor.to(DEVICE) for tensor in (W, A, B))
    assert dora_norm(W, A, B, 1.0).eq(torch.finfo(torch.float32).tiny).all()
    gain = lora_merge(W, A, B, 1.0, torch.full((3,), torch.finfo(torch.float32).tiny, device=DEVICE))[2]
    assert gain.eq(1).all()


@pytest.mark.parametrize("shape", [(37, 96), (70, 83), (1, 5)], ids=str)
@pytest.mark.parametrize("tile", [(16, 32), (8, 64)], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.999])
def test_masks_are_an_independent_philoxs_whatever_the_tile(shape, tile, p):
    mask = Mask(p, seed=2**63 + 12345, step=2**31 - 1, site=77, first_row=1000)
    ones = torch.ones(*shape, device=DEVICE)
    expected = philox_bits(*shape, mask) >= round(65536 * p)
    dropped = lora_drop(ones, mask, launch=Launch("rank-1", *tile, 4))
    np.testing.assert_array_equal(exact(dropped)[0] != 0, expected)
    np.testing.assert_array_equal(mask.keep(*shape).numpy(), expected)
    assert_near(dropped, expected / (1 - round(65536 * p) / 65536), STORED[torch.float32])


def every_operation(launch_row: int = 75) -> dict[str, Tensor]:
    """A result of each, on several programs along every axis of its grid."""
    M, K, r = 70, 136, 3
    x, A, g = numbers(M, K, dtype=torch.float16, seed=0), numbers(r, K, seed=1), numbers(K, seed=2)
    h, y = numbers(M, r, seed=3), numbers(M, K, dtype=torch.float16, seed=4)

    def launch(operation: str) -> Launch:
        return next(launch for limit, launch in TABLE[operation, launch_row] if r <= limit)

    dx = y.clone()
    results = {
        "down": lora_down(x, A, 1.3, MASK, g, launch=launch("down")),
        "up": lora_up(y, h, A, 1.3, MASK, launch=launch("up")),
        "outer": lora_outer(h, x, 1.3, MASK, g, launch=launch("outer")),
        "outer_dot": lora_outer_dot(h, x, y, 1.3, g, g.abs(), launch=launch("outer"))[1],
        "backward_x": lora_backward_x(x, dx, h, A, MASK, launch=launch("backward_x")),
        "dx": dx,
        "drop": lora_drop(x, MASK),
        "norm": dora_norm(x, A, h, 0.5),
    }
    m = h[:, 0].contiguous()
    results["merged"], results["merged norm"], results["gain"] = lora_merge(x, A, h, 0.5, m)
    if launch_row >= 80:
        results["dh"], results["dBt"] = lora_backward_y(x, h, A, 1.3, g, launch=launch("backward_y"))
    return results


def assert_same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        assert torch.isfinite(tensor).all(), name
        assert torch.equal(tensor, two[name]), name


@pytest.mark.parametrize("row", [75, 80])
def test_two_runs_give_the_same_bits(row):
    if not INTERPRETED and row > architecture(DEVICE):
        pytest.skip(f"these launches are for sm_{row}")
    assert_same_bits(every_operation(row), every_operation(row))


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the order of programs is the hardware's")
@pytest.mark.parametrize("row", [75, 80])
def test_the_order_of_programs_does_not_matter(row, monkeypatch):
    """The interpreter runs one program after another; here, in a random order."""
    from triton.runtime.interpreter import interpreter_builder

    set_index = interpreter_builder.set_grid_idx
    seen = set()

    def shuffled(*index: int) -> None:
        sizes = interpreter_builder.grid_dim
        orders = [random.Random(size).sample(range(size), size) for size in sizes]
        place = tuple(order[i] for order, i in zip(orders, index, strict=True))
        seen.add((index, place))
        set_index(*place)

    straight = every_operation(row)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)
    assert_same_bits(straight, every_operation(row))
    assert any(index != place for index, place in seen)  # otherwise this tests nothing


@pytest.mark.skipif(not INTERPRETED, reason="reads the interpreter's own stores")
@pytest.mark.parametrize("row", [75, 80])
def test_no_two_programs_write_to_the_same_place(row, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    set_size, store = builder.set_grid_dim, builder.create_masked_store
    writer, launches_seen = {}, []

    def new_launch(*size: int) -> None:
        writer.clear()
        launches_seen.append(size)
        set_size(*size)

    def recorded(pointer, value, mask, *rest):
        for address in np.broadcast_to(pointer.data, mask.data.shape)[mask.data].tolist():
            assert writer.setdefault(address, builder.grid_idx) == builder.grid_idx
        return store(pointer, value, mask, *rest)

    monkeypatch.setattr(builder, "set_grid_dim", new_launch)
    monkeypatch.setattr(builder, "create_masked_store", recorded)
    every_operation(row)
    assert writer
    assert sum(math.prod(size) > 1 for size in launches_seen) >= 6


def test_no_tokens_give_no_gradient():
    x, dx, h, A = (numbers(*size, seed=0) for size in ((0, 40), (0, 40), (0, 3), (3, 40)))
    assert lora_down(x, A).shape == (0, 3)
    assert lora_up(dx, h, A, mask=MASK).shape == (0, 40)
    assert lora_backward_x(x, dx, h, A).eq(0).all()
    assert lora_outer(h, x).eq(0).all()
