"""The static costs of an adapted layer: what the design is to reach, and counts that follow from sizes."""

import importlib.util

import pytest
import torch
from small_runs import call
from torch import nn

from kernels import peft_costs, roofline
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
from kernels.peft_costs import VARIANTS, Passes, Saved, count
from kernels.roofline import parse
from minibert.errors import InputError

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")


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


@needs_peft
@pytest.mark.parametrize(
    ("variant", "forward", "backward", "megabytes", "saved"),
    [
        ("PEFT LoRA, dropout", 6, 8, 160, 9.5),
        ("PEFT LoRA", 5, 7, 128.7, 6.4),
        ("PEFT DoRA", 17, 16, 290.3, 18.9),
        ("PEFT DoRA, dropout", 18, 18, 336.7, 22.1),
    ],
)
def test_peft_is_counted_as_by_hand(variant, forward, backward, megabytes, saved):
    """The first three were counted before this counted them; DoRA without a matrix kept by a dead graph."""
    path = count(4096, 768, 768, 8, *VARIANTS[variant])
    assert (launches(path.forward), launches(path.backward)) == (forward, backward)
    assert path.moved() / 1e6 == pytest.approx(megabytes, abs=0.15)
    assert path.saved / 1e6 == pytest.approx(saved, abs=0.06)


@needs_peft
def test_a_path_of_ours_moves_keeps_and_launches_less_than_peft_on_every_layer():
    for sizes in LAYERS.values():
        for K, N in sizes:
            one = layer(4096, K, N, 8, 75)
            for variant, settings in VARIANTS.items():
                theirs, ours = count(4096, K, N, 8, *settings), PATHS[variant.removeprefix("PEFT ")](one)
                assert ours.moved() < 0.6 * theirs.moved()
                assert ours.saved < theirs.saved
                assert launches(ours.forward + ours.backward) < launches(theirs.forward + theirs.backward)


def test_operations_are_counted_and_views_and_allocations_are_not():
    x, W = torch.ones(3, 5), torch.ones(5, 7)
    with Passes() as passes:
        product = x @ W.T.contiguous().T.view(5, 7)
        product.add_(1.0)
        torch.empty_like(product)
        product.expand(2, 3, 7)
    copied, multiplied, added = passes.seen
    assert copied.bytes == 4 * (2 * 35)
    assert multiplied == Pass(4 * (15 + 35 + 21), flops=2 * 3 * 5 * 7)
    assert added.bytes == 4 * (2 * 21)  # read and written


def test_what_autograd_keeps_is_counted_once_and_neither_weights_nor_a_dead_graph():
    model, saved = nn.Linear(5, 7), Saved()
    x = torch.ones(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        (model(x) * torch.ones(3, 7)).sum().detach()
        y = model(x)
        y = y * y
    assert saved.bytes(model) == 4 * (15 + 21)  # x, and its product twice
    y.sum().backward()
    assert x.grad is not None


def test_the_table_has_every_layer_and_path():
    ended = call(roofline.main, "--tokens", 64, "--rank", 2)
    assert ended.code == 0, ended.err
    rows = [line for line in ended.out.splitlines() if " -> " in line]
    ways = len(PATHS) + (len(VARIANTS) if peft_costs.installed() else 0)
    assert len(rows) == ways * sum(map(len, LAYERS.values()))
    for line in (rows[0], rows[ways]):
        assert "frozen" in line
        assert line.endswith("0 us")


def test_without_peft_its_rows_are_left_out_and_a_line_says_so(monkeypatch):
    monkeypatch.setattr(peft_costs, "installed", lambda: False)
    ended = call(roofline.main)
    assert ended.code == 0
    assert ended.out.count("PEFT") == 1
    assert ended.out.endswith("PEFT is not installed: its rows are left out\n")


@pytest.mark.parametrize("flag", ["--tokens", "--rank"])
def test_less_than_one_of_anything_is_refused(flag: str):
    with pytest.raises(InputError, match=f"{flag}: expected at least 1, got 0"):
        parse([flag, "0"])


def test_every_device_has_an_architecture_of_the_launch_table():
    assert {device.architecture for device in DEVICES.values()} == {75, 80, 90}
