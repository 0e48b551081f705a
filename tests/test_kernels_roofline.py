"""The static costs of an adapted layer: what the design is to reach, and counts that follow from sizes."""

import pytest

from kernels.roofline import (
    LAYERS,
    PATHS,
    dora_merged,
    launches,
    layer,
    lora_merged,
    lora_split,
    moved,
    parse,
)
from minibert.errors import InputError


@pytest.fixture
def bert():
    """The layer the design is judged by: 768 -> 768 at 4,096 tokens and rank 8, on a T4."""
    return layer(4096, 768, 768, 8, 75)


@pytest.mark.parametrize(
    ("make", "forward", "backward", "megabytes", "saved"),
    [(lora_split, 3, 6, 81, 6.45), (lora_merged, 2, 7, 59, 6.4), (dora_merged, 2, 9, 65, 12.7)],
)
def test_a_layer_reaches_what_it_was_designed_for(bert, make, forward, backward, megabytes, saved):
    path = make(bert)
    assert launches(path.forward) <= forward
    assert launches(path.backward) <= backward
    assert moved(path) <= megabytes * 1e6
    assert path.saved <= saved * 1e6


def test_a_matrix_product_reads_both_operands_and_writes_one(bert):
    assert bert.gemm().bytes == 2 * (4096 * 768 + 768 * 768 + 4096 * 768)


@pytest.mark.parametrize("path", PATHS)
def test_more_tokens_move_more_and_launch_as_much(path):
    for sizes in LAYERS.values():
        for K, N in sizes:
            small, large = (PATHS[path](layer(M, K, N, 8, 80)) for M in (1024, 4096))
            assert moved(small) < moved(large) < 4 * moved(small)
            assert launches(small.backward) == launches(large.backward)


@pytest.mark.parametrize("flag", ["--tokens", "--rank"])
def test_less_than_one_of_anything_is_refused(flag: str):
    with pytest.raises(InputError, match=f"{flag}: expected at least 1, got 0"):
        parse([flag, "0"])
