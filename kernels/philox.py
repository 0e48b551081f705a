"""Dropout's mask as a pure function of (seed, step, site, row, column): nothing has to be kept for backward.

Philox4x32 (Salmon et al. 2011) turns a counter of four 32-bit words and a key of two into 128 random bits.
With counter (column // 8, row, step, site) and the seed as key, one call serves 8 columns of a row with
16 bits each, lowest first. The same numbers come from `kept` in kernels/tiles.py, inside the kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al. 2011, table 2)
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
VALUES = 65536  # of the 16 bits that decide on one element


@dataclass(frozen=True)
class Mask:
    """x̃ = keep ⊙ x · scale for x [M, K], with P(keep) = 1 / scale exactly: p is rounded to 1/65536ths.

    `site` tells the layers of a model apart. `first_row` is the place of row 0 among the rows of all
    processes, or of a larger tensor that x is a part of.

    Raises:
        ValueError: if p is not in [0, 1), or step, site or first_row not in [0, 2^31).
    """

    p: float
    seed: int
    step: int
    site: int
    first_row: int = 0

    def __post_init__(self):
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.p}")
        for name in ("step", "site", "first_row"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} of a dropout mask must be in [0, 2^31), got {getattr(self, name)}")

    @property
    def threshold(self) -> int:
        """An element is kept if its 16 bits are at least this; 65535 at most, so something always is."""
        return min(round(VALUES * self.p), VALUES - 1)

    @property
    def scale(self) -> float:
        return VALUES / (VALUES - self.threshold)

    @property
    def signed_seed(self) -> int:
        """The seed's 64 bits read as a signed integer, which is what a kernel's argument holds."""
        return (self.seed + 2**63) % 2**64 - 2**63

    def __call__(self, x: Tensor) -> Tensor:
        """x̃, in fp32 or better: scaled before anything is rounded. The way for tests, slow on a CPU."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * self.scale).masked_fill(~self.keep(*x.shape, device=x.device), 0)

    def keep(self, rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
        """bool [rows, columns]"""
        row = torch.arange(self.first_row, self.first_row + rows, device=device)[:, None]  # [M, 1]
        group = torch.arange(-(-columns // 8), device=device)  # [K/8]
        words = philox((group, row, self.step, self.site), self.seed)
        bits = torch.stack(
            [part for word in words for part in (word & 0xFFFF, word >> 16)], -1
        )  # [M, K/8, 8]
        return (bits >= self.threshold).flatten(1)[:, :columns]  # [M, K]


# What x̃ is made by: a mask that kernels can draw themselves, or any function that applies one to [M, K].
Masking = Mask | Callable[[Tensor], Tensor]


def philox(counter: tuple[Tensor | int, ...], seed: int, rounds: int = ROUNDS) -> tuple[Tensor | int, ...]:
    """Four words of 32 random bits, in int64: its products wrap, but their 64 bits are right."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(rounds):
        product_0, product_1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32 & WORD) ^ c1 ^ k0,
            product_1 & WORD,
            (product_0 >> 32 & WORD) ^ c3 ^ k1,
            product_0 & WORD,
        )
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3
