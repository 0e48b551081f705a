"""Ranks, turned rows and intruders of matrices whose answers are known, and against numpy's own SVD."""

import math

import numpy as np
import pytest
import torch

from experiments.spectra import (
    closeness,
    effective_rank,
    left_vectors,
    magnitude_and_direction,
    rank_for_energy,
    singular_values,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def of_values(values: list[float], n: int, k: int) -> torch.Tensor:
    """A matrix [n, k] with these singular values and no others."""
    left, right = (np.linalg.qr(drawn(size, len(values), seed=size).numpy())[0] for size in (n, k))
    return torch.from_numpy(left @ np.diag(values) @ right.T)


@pytest.mark.parametrize("shape", [(7, 7), (12, 5), (5, 12)])
def test_singular_values_are_numpys(shape):
    change = drawn(*shape)
    expected = np.linalg.svd(change.numpy(), compute_uv=False)
    assert np.allclose(singular_values(change, 1.0).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_product_of_rank_r_has_rank_r_after_it_is_added_to_a_weight_and_taken_off(rank):
    before = drawn(12, 9, seed=1)
    after = before + 1e-3 * drawn(12, rank, seed=2) @ drawn(rank, 9, seed=3)
    change = after - before
    assert int((singular_values(change, before.norm().item()) > 0).sum()) == rank
    assert np.linalg.matrix_rank(change.numpy()) > rank  # without the weights' norm rounding counts too


@pytest.mark.parametrize("rank", [1, 4])
def test_equal_singular_values_count_as_many(rank):
    values = singular_values(of_values([2.0] * rank, 9, 6), 2.0)
    assert effective_rank(values) == pytest.approx(rank, abs=1e-9)


def test_the_effective_rank_is_exp_of_the_entropy_by_hand():
    shares = [6 / 10, 3 / 10, 1 / 10]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(singular_values(of_values([6.0, 3.0, 1.0], 8, 5), 6.0)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0, 1.0, 0.0], 0.9, 1), ([3.0, 1.0, 0.0], 0.91, 2), ([1.0, 1.0, 1.0], 0.9, 3), ([0.0, 0.0], 0.9, 0)],
)
def test_so_many_singular_values_have_a_share_of_the_energy(values, share, expected):
    assert rank_for_energy(torch.tensor(values, dtype=torch.float64), share) == expected


def test_no_change_has_no_rank_and_turns_nothing():
    before = drawn(4, 3)
    values = singular_values(torch.zeros(4, 3, dtype=torch.float64), before.norm().item())
    assert (effective_rank(values), rank_for_energy(values)) == (0.0, 0)
    assert magnitude_and_direction(before, before.clone()) == (0.0, 0.0)


def test_magnitude_and_direction_by_hand():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    # twice as long; turned by 60 degrees; both turned by 90 degrees and one longer
    after = torch.tensor([[6.0, 8.0], [0.5, math.sqrt(0.75)], [3.0, 0.0]], dtype=torch.float64)
    magnitude, direction = magnitude_and_direction(before, after)
    assert magnitude == pytest.approx((5 + 0 + 1) / 3)
    assert direction == pytest.approx((0 + 0.5 + 1) / 3)


def test_magnitude_and_direction_are_the_papers_means_over_rows():
    before, after = drawn(6, 5, seed=1).numpy(), drawn(6, 5, seed=2).numpy()
    lengths, new = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    cosines = (before * after).sum(axis=1) / (lengths * new)
    expected = (np.abs(new - lengths).mean(), (1 - cosines).mean())
    assert magnitude_and_direction(*map(torch.from_numpy, (before, after))) == pytest.approx(expected)


def test_a_row_of_zeros_has_no_direction():
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    after = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert magnitude_and_direction(before, after) == (0.5, 0.0)


def test_an_intruder_put_in_by_hand_is_found_and_nothing_else():
    # As far from each of W's left vectors as from the others, and made the largest.
    basis = np.linalg.qr(drawn(16, 16, seed=4).numpy())[0]
    weight = torch.from_numpy(basis @ np.diag(np.linspace(5, 1, 16)) @ basis.T)
    fresh = torch.from_numpy(basis @ np.full(16, 0.25))  # cosine 1/4 with every left vector of W
    loud = weight + 500 * torch.outer(fresh, torch.from_numpy(basis[:, 3]))
    cosines = closeness(left_vectors(weight), left_vectors(loud, 5))
    assert cosines.shape == (5,)
    assert cosines[0] == pytest.approx(0.25, abs=0.01)
    assert (cosines[1:] > 0.5).all()
    assert (closeness(left_vectors(weight), left_vectors(3 * weight, 5)) > 1 - 1e-9).all()


def test_closeness_is_the_largest_cosine_with_any_vector_of_numpys():
    weight, other = drawn(9, 6, seed=5), drawn(9, 6, seed=6)
    known, new = (np.linalg.svd(one.numpy(), full_matrices=False)[0] for one in (weight, other))
    expected = np.abs(known.T @ new[:, :4]).max(axis=0)
    assert np.allclose(closeness(left_vectors(weight), left_vectors(other, 4)).numpy(), expected)
