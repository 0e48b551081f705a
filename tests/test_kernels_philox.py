"""The low-rank path's dropout mask: published numbers, the right share, a pure function of its key."""

import math

import numpy as np
import pytest
import torch

from kernels.philox import Mask, philox

# Of Random123's own test vectors: counter, key -> words of philox4x32-7
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
VECTORS = {
    ((0, 0, 0, 0), 0): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ((2**32 - 1,) * 4, 2**64 - 1): (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    (PI, 0x299F31D0_A4093822): (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
}
KEY = {"p": 0.1, "seed": 2**40 + 17, "step": 5, "site": 3}


@pytest.mark.parametrize(("given", "words"), VECTORS.items(), ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(given, words):
    counter, key = given
    assert philox(counter, key) == words
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(tensors, key)) == words


def test_every_element_reads_its_own_sixteen_bits():
    """Written out for a single element at a time, in Python's own integers."""
    mask = Mask(**KEY, first_row=11)
    keep = mask.keep(4, 19)
    for row in range(4):
        for column in range(19):
            word = philox((column // 8, 11 + row, 5, 3), KEY["seed"])[column % 8 // 2]
            assert keep[row, column] == ((word >> 16 * (column % 2)) % 2**16 >= round(0.1 * 2**16))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5])
def test_the_share_of_kept_elements_is_within_five_sigma(p: float):
    mask, rows, columns = Mask(**KEY | {"p": p}), 1000, 1000
    keep = mask.keep(rows, columns).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(keep.mean() - (1 - p)) < 5 * sigma / math.sqrt(keep.numel()) + 1e-5
    for position in range(8):
        assert abs(keep[:, position::8].mean() - (1 - p)) < 5 * sigma / math.sqrt(keep.numel() / 8)


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 1 / 3, 0.999, 1 - 1e-9])
def test_the_expectation_is_the_input_exactly(p: float):
    mask = Mask(**KEY | {"p": p})
    assert (1 - mask.threshold / 65536) * mask.scale == pytest.approx(1, abs=1e-15)
    assert abs(mask.threshold / 65536 - p) <= 2**-16


@pytest.mark.parametrize(
    "other", [{"seed": 2**40 + 18}, {"seed": 17}, {"step": 6}, {"site": 4}, {"first_row": 64}], ids=str
)
def test_masks_of_different_keys_are_uncorrelated(other):
    one, two = (Mask(**KEY | change | {"p": 0.5}).keep(64, 4096) for change in ({}, other))
    agreement = (one == two).double().mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(one.numel())


def test_neighbouring_rows_and_columns_are_uncorrelated():
    keep = Mask(**KEY | {"p": 0.5}).keep(256, 4096)
    for shift, along in ((1, 0), (1, 1), (2, 1), (8, 1)):
        agreement = (keep == keep.roll(shift, along)).double().mean()
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(keep.numel())


def test_a_part_of_the_rows_draws_what_the_whole_does():
    whole = Mask(**KEY).keep(40, 21)
    np.testing.assert_array_equal(Mask(**KEY, first_row=13).keep(9, 21), whole[13:22])


def test_a_narrower_tensor_draws_the_first_columns():
    np.testing.assert_array_equal(Mask(**KEY).keep(6, 13), Mask(**KEY).keep(6, 48)[:, :13])


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63, 2**64 - 1, 2**70 + 3])
def test_a_seed_counts_by_its_64_bits(seed: int):
    mask = Mask(**KEY | {"seed": seed})
    assert -(2**63) <= mask.signed_seed < 2**63
    assert (mask.signed_seed - seed) % 2**64 == 0
    np.testing.assert_array_equal(mask.keep(3, 64), Mask(**KEY | {"seed": mask.signed_seed}).keep(3, 64))


@pytest.mark.parametrize(
    "wrong",
    [{"p": 1}, {"p": -0.1}, {"p": math.nan}, {"step": -1}, {"site": 2**31}, {"first_row": -1}],
    ids=str,
)
def test_a_mask_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be in \[0, "):
        Mask(**KEY | wrong)
