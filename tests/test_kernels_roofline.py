"""The static costs of an adapted layer: what the design is to reach, and counts that follow from sizes."""

import pytest
from small_runs import call

from kernels import roofline
from kernels.costs import (
    DEVICES,
    LAYERS,
    PATHS,
    Limits,
    Pass,
    dora_merged,
    dora_split,
    launches,
    layer,
    lora_merged,
    lora_split,
)
from kernels.roofline import parse
from minibert.errors import InputError


@pytest.fixture
def bert():
    """The layer the design is judged by: 768 -> 768 at 4,096 tokens and rank 8, on a T4."""
    return layer(4096, 768, 768, 8, 75)


@pytest.mark.parametrize(
    ("make", "forward", "backward", "megabytes", "saved"),
    [
        (lora_split, 3, 4, 81, 6.45),
        (lora_merged, 2, 5, 59, 6.4),
        (dora_split, 5, 5, 105, 12.75),
        (dora_merged, 3, 5, 80, 12.7),
    ],
)
def test_a_layer_reaches_what_it_was_designed_for(bert, make, forward, backward, megabytes, saved):
    path = make(bert)
    assert launches(path.forward) <= forward
    assert launches(path.backward) <= backward
    assert path.moved() <= megabytes * 1e6
    assert path.saved <= saved * 1e6


def test_a_matrix_product_reads_both_operands_and_writes_one(bert):
    assert bert.gemm().bytes == 2 * (4096 * 768 + 768 * 768 + 4096 * 768)
    assert bert.gemm().flops == 2 * 4096 * 768 * 768


def test_a_pass_takes_as_long_as_the_slower_of_its_bytes_and_its_products():
    limits = Limits(bandwidth=10.0, products=100.0)
    assert Pass(50, flops=400).seconds(limits) == 5
    assert Pass(50, flops=600).seconds(limits) == 6


@pytest.mark.parametrize("path", PATHS)
def test_more_tokens_move_more_and_launch_as_much(path):
    for sizes in LAYERS.values():
        for K, N in sizes:
            small, large = (PATHS[path](layer(M, K, N, 8, 80)) for M in (1024, 4096))
            assert small.moved() < large.moved() < 4 * small.moved()
            assert launches(small.backward) == launches(large.backward)


def test_the_table_has_every_layer_and_path():
    ended = call(roofline.main, "--tokens", 64, "--rank", 2)
    assert ended.code == 0, ended.err
    rows = [line for line in ended.out.splitlines() if " -> " in line]
    assert len(rows) == len(PATHS) * sum(map(len, LAYERS.values()))
    for line in (rows[0], rows[len(PATHS)]):
        assert "frozen" in line
        assert line.endswith("0 us")


@pytest.mark.parametrize("flag", ["--tokens", "--rank"])
def test_less_than_one_of_anything_is_refused(flag: str):
    with pytest.raises(InputError, match=f"{flag}: expected at least 1, got 0"):
        parse([flag, "0"])


def test_every_device_has_an_architecture_of_the_launch_table():
    assert {device.architecture for device in DEVICES.values()} == {75, 80, 90}
