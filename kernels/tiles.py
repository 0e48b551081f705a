"""What the kernels share: tiles of row-major matrices, the mask, and what they are compiled for."""

import functools

import triton
import triton.language as tl
from triton.runtime import KernelInterface

from kernels.launch import Launch
from kernels.philox import ROUNDS, Mask

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
# The fewest rows tl.dot takes of fp32 operands: 1 in Triton 3.9, 16 in 3.4. Tensor cores take 16.
FEWEST_ROWS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 16


@triton.jit
def load_tile(pointer, rows, columns, height, width: tl.constexpr, stride: tl.constexpr = None):
    """[rows, columns] of a matrix [height, width], 0 outside of it, as stored; rows may lie farther apart.

    Whoever computes with it converts to fp32 first: on bf16 Triton's interpreter computes nonsense.
    """
    apart: tl.constexpr = width if stride is None else stride
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * apart + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_transposed(pointer, rows, columns, height, width: tl.constexpr, stride: tl.constexpr = None):
    """[columns, rows] of a matrix [height, width], 0 outside: loaded as it is used, so that none is moved."""
    apart: tl.constexpr = width if stride is None else stride
    inside = (rows[None, :] < height) & (columns[:, None] < width)
    return tl.load(pointer + rows[None, :] * apart + columns[:, None], mask=inside, other=0.0)


@triton.jit
def store_tile(pointer, tile, rows, columns, height, width: tl.constexpr):
    """[rows, columns] of a matrix [height, width], rounded to what it holds."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    offsets = rows[:, None] * width + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def arrives_last(arrived_ptr, programs):
    """Whether all others of so many programs have stored their parts, which may then be read here.

    The barrier and "release" put what is stored before the count, "acquire" what is read behind it. The count
    begins at 0, and the last program leaves it so.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    return last


@triton.jit
def sum_parts(part_ptr, total_ptr, parts, rows, columns, height, width: tl.constexpr, AT_ONCE: tl.constexpr):
    """total = the sum of `parts` matrices [height, width] at (rows, columns), always in the same order.

    Several are read at once, so that one does not wait for the one before, and past the L1 cache, which knows
    nothing of what other programs have stored.
    """
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    offsets = rows[:, None] * width + columns[None, :]
    totals = tl.zeros((AT_ONCE, rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, parts, AT_ONCE):
        part = (start + tl.arange(0, AT_ONCE))[:, None, None]
        read = (part < parts) & inside[None, :, :]
        pointers = part_ptr + part * height * width + offsets[None, :, :]
        totals += tl.load(pointers, mask=read, other=0.0, cache_modifier=".cg")
    tl.store(total_ptr + offsets, tl.sum(totals, axis=0), mask=inside)


@triton.jit
def fma(a, b, total):
    """a · b + total in one rounding and one instruction, whatever the compiler's default for a * b + c."""
    return tl.fma(tl.broadcast_to(a, total.shape), tl.broadcast_to(b, total.shape), total)


@triton.jit
def rank_1_updates(
    h_ptr,
    b_ptr,
    rows,
    columns,
    M,
    R: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """h [M, r] times b [r, N] at (rows, columns), one rank after another: no padding, no shared memory."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for r in tl.static_range(R):
        h = tl.load(h_ptr + rows * R + r, mask=rows < M, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + r * N + columns, mask=columns < N, other=0.0).to(tl.float32)
        total = fma(h[:, None], b[None, :], total)
    return total


@triton.jit
def kept(
    rows, first_column, seed, step, site, first_row, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which of a tile's elements dropout keeps, as Mask.keep has it. `first_column` is a multiple of 8.

    A call of Philox serves 8 columns; its words are laid side by side without leaving the registers.
    """
    groups = first_column // 8 + tl.arange(0, COLUMNS // 8)
    r0, r1, r2, r3 = tl.philox(seed, groups[None, :], (rows + first_row)[:, None], step, site, PHILOX_ROUNDS)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # [ROWS, COLUMNS / 8, 2, 2], in the order 0 1 2 3
    bits = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, COLUMNS / 8, 2, 2, 2]
    return tl.reshape(bits, (ROWS, COLUMNS)).to(tl.int32) >= threshold


def mask_arguments(mask: Mask | None) -> tuple[int, int, int, int, int]:
    """(seed, step, site, first_row, threshold) as the kernels take them; zeros where they are not read."""
    if mask is None:
        return (0, 0, 0, 0, 0)
    return (mask.signed_seed, mask.step, mask.site, mask.first_row, mask.threshold)


def padded_rank(rank: int, form: str) -> int:
    """The next power of two, and at least what tl.dot takes."""
    power = 1 << (rank - 1).bit_length()
    return max({"dot": 16, "dot-fp32": FEWEST_ROWS}.get(form, 1), power)


def compiled_for(
    kernel: KernelInterface, width: int, rank: int, mask: Mask | None, launch: Launch, stride: int = 0
) -> dict[str, object]:
    """The keyword arguments of a launch: a kernel's constants, and what the compiler is told.

    `stride` is that of the rows of h, where they may lie farther apart than its rank.
    """
    return dict(_compiled_for(kernel, width, rank, mask is not None, launch, stride or rank))


@functools.cache  # a step has some hundred launches of a few kinds
def _compiled_for(
    kernel: KernelInterface, width: int, rank: int, dropout: bool, launch: Launch, stride: int
) -> dict[str, object]:
    padded = padded_rank(rank, launch.form)
    values = {
        "K": width,
        "N": width,
        "R": rank,
        "RANKS": padded,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DROPOUT": dropout,
        "FORM": launch.form,
        # Partial sums that are read at once: 32 numbers in a thread
        "AT_ONCE": max(1, 1024 * launch.warps // (padded * launch.columns)),
        "STRIDE": stride,
    }
    constants = [name for name, kind in kernel.fn.__annotations__.items() if kind is tl.constexpr]
    return {
        **{name: values[name] for name in constants},
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
