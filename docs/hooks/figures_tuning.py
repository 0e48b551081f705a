"""Figures of the methods, their mathematics, the kernels and the scores."""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from frame import BLUE, GREEN, INK, ORANGE, RED, bare, powers, sized
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn

from experiments.tables import DEV_ROWS, TABLES
from kernels.costs import DEVICES, frozen, lora_merged, lora_split
from kernels.costs import layer as costs_of
from lora.layers import LoRALinear
from lora.methods import METHODS, apply_method
from minibert.model import Bert, BertConfig

FIGURES = ("full", "lora", "rslora", "dora", "forms", "gradients", "kernels", "noise", "study")
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


@sized(4.6, 2.3)
def full(figure: Figure) -> None:
    """fp32: four bytes a weight; of what trains as many for the gradient and each of AdamW's two moments."""
    with torch.device("meta"):
        base = Bert(BertConfig())
    axes, left = figure.add_subplot(), {}
    for name in ("lora", "full"):
        bert = copy.deepcopy(base)
        apply_method(bert, METHODS[name])
        held = sum(one.numel() for one in bert.parameters())
        trained = sum(one.numel() for one in bert.parameters() if one.requires_grad)
        parts = {"weights": held, "gradients": trained, "AdamW's moments": 2 * trained}
        for (part, numbers), colour in zip(parts.items(), (BLUE, ORANGE, GREEN), strict=True):
            label = part if name == "lora" else None
            axes.barh(
                name, 4 * numbers / 2**20, left=left.get(name, 0), color=colour, label=label, height=0.6
            )
            left[name] = left.get(name, 0) + 4 * numbers / 2**20
    axes.set_xlabel("MiB, bert-base in fp32, activations left out")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)


@sized(4.6, 2.6)
def lora(figure: Figure) -> None:
    """To scale: K = N = 384, r = 8, drawn twice as wide as it is."""
    axes = bare(figure.add_subplot(), 10.6, 5.4)
    N, r = 3.84, 0.16
    for x, width, y, height, colour, name in (
        (0.3, N, 0.3, N, BLUE, "W\nN × K\nfrozen"),
        (5.7, r, 0.3, N, ORANGE, ""),
        (6.5, N, 4.14 - r, r, ORANGE, ""),
    ):
        axes.add_patch(
            Rectangle((x, y), width, height, facecolor=f"{colour}80", edgecolor=INK, linewidth=0.8)
        )
        axes.text(x + width / 2, y + height / 2, name, ha="center", va="center", fontsize=9)
    axes.text(4.65, 2.2, "+  s", fontsize=12, va="center")
    axes.text(5.78, 4.5, "B: N × r", ha="center", fontsize=9)
    axes.text(8.4, 4.5, "A: r × K", ha="center", fontsize=9)
    axes.text(8.4, 2.2, "6,144 numbers train\nbeside 147,456", ha="center", va="center", fontsize=9)


@sized(4.6, 2.6)
def rslora(figure: Figure) -> None:
    """Measured: the size of s · B A x for A and B with independent entries of one size, alpha 16."""
    torch.manual_seed(0)
    x, axes = torch.randn(256, 384), figure.add_subplot()
    for name, colour in (("lora", BLUE), ("rslora", ORANGE)):
        sizes = []
        for r in RANKS:
            A, B = torch.randn(r, 384) / math.sqrt(384), torch.randn(384, r)
            sizes.append((METHODS[name].scaling(16, r) * x @ A.T @ B.T).std())
        axes.plot(RANKS, sizes, "o-", color=colour, markersize=4)
        axes.annotate(
            {"lora": "s = α / r", "rslora": "s = α / √r"}[name],
            (RANKS[-3], sizes[-3]),
            (0, 8),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.8, 40)
    powers(axes.yaxis)
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.set_xlabel("rank r")
    axes.set_ylabel("size of the update's output")


@sized(4.6, 2.9)
def dora(figure: Figure) -> None:
    """One row of a weight in the plane."""
    w, update, m = np.array([2.0, 0.6]), np.array([0.2, 1.5]), 1.7
    V = w + update
    end = m * V / np.linalg.norm(V)
    axes = figure.add_subplot()
    bare(axes, 3.4, 2.4).set_aspect("equal")
    turn = np.linspace(0, math.pi / 2, 60)
    for radius in (np.linalg.norm(w), m):
        axes.plot(radius * np.cos(turn), radius * np.sin(turn), ":", color=INK, linewidth=0.6)
    for start, stop, colour, name, place in (
        ((0, 0), w, BLUE, "W, one row", (2.06, 0.5)),
        (w, V, ORANGE, "s · B A", (2.2, 1.4)),
        ((0, 0), V, INK, "V", (2.25, 2.15)),
        ((0, 0), end, RED, "m V / ‖V‖", (0.32, 1.02)),
    ):
        look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", stop, start, arrowprops=look)
        axes.text(*place, name, fontsize=9)


@sized(4.6, 2.6)
def forms(figure: Figure) -> None:
    """By the formulas of kernels/costs.py, forward and backward together."""
    tokens, axes = [2**i for i in range(6, 14)], figure.add_subplot()
    for name, path, colour in (("split", lora_split, BLUE), ("merged", lora_merged, ORANGE)):
        of = [costs_of(M, 768, 768, 8, 75) for M in tokens]
        more = [path(one).moved() / frozen(one).moved() for one in of]
        axes.plot(tokens, more, "o-", color=colour, markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens[::2], [f"{M:,}" for M in tokens[::2]])
    axes.set_xlabel("tokens in the batch")
    axes.set_ylabel("bytes, of the frozen layer's")
    axes.legend(frameon=False)


@sized(4.6, 2.7)
def gradients(figure: Figure) -> None:
    """Measured: how far a difference quotient is from the gradient by hand, for every step size."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(24, 16, dtype=torch.float64), rank=4, scaling=2.0)
    nn.init.normal_(layer.lora_B.weight)
    x, dy = torch.randn(32, 24, dtype=torch.float64), torch.randn(32, 16, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return (layer(x).tanh() * dy).sum()

    loss().backward()
    A, direction = layer.lora_A.weight, torch.randn(4, 24, dtype=torch.float64)
    want = (A.grad * direction).sum()
    steps, errors = np.logspace(-12, -1, 45), ([], [])
    with torch.no_grad():
        start, here = A.clone(), loss()
        for h in steps:
            ahead = loss_at(A, start + h * direction, loss)
            behind = loss_at(A, start - h * direction, loss)
            for one, quotient in zip(errors, ((ahead - here) / h, (ahead - behind) / (2 * h)), strict=True):
                one.append(abs(quotient / want - 1))
    axes = figure.add_subplot()
    axes.loglog(steps, errors[0], color=BLUE, label="(L(A + h) - L(A)) / h")
    axes.loglog(steps, errors[1], color=ORANGE, label="(L(A + h) - L(A - h)) / 2h")
    powers(axes.xaxis, axes.yaxis)
    axes.set_xlabel("step size h")
    axes.set_ylabel("relative error")
    axes.legend(frameon=False, fontsize=9)


def loss_at(parameter: nn.Parameter, value: torch.Tensor, loss) -> torch.Tensor:
    parameter.copy_(value)
    return loss()


@sized(4.6, 3.0)
def kernels(figure: Figure) -> None:
    """Of a T4: its DRAM's and its tensor cores' limit from kernels/costs.py, and the layer's passes."""
    limits = DEVICES["t4"].limits
    intensity = np.logspace(-0.5, 3.5, 100)
    axes = figure.add_subplot()
    roof = np.minimum(intensity * limits.bandwidth, limits.products)
    axes.loglog(intensity, roof / 1e12, color=INK)
    one = costs_of(4096, 768, 768, 8, 75)
    skinny = 2 * 4096 * 768 * 8
    for name, flops, passed, colour in (
        ("x Wᵀ", one.gemm().flops, one.gemm(), BLUE),
        ("x Aᵀ, rank 8", skinny, one.down(768), ORANGE),
        ("+ s h Bᵀ, rank 8", skinny, one.up(), RED),
        ("W + s B A, rank 8", 2 * 768 * 768 * 8, one.merge(), GREEN),
    ):
        x = flops / passed.bytes
        y = min(x * limits.bandwidth, limits.products) / 1e12
        axes.plot(x, y, "o", color=colour, label=name)
    powers(axes.xaxis, axes.yaxis)
    axes.set_xlabel("FLOPs per byte from DRAM")
    axes.set_ylabel("TFLOP/s at most")
    axes.legend(frameon=False, fontsize=9)


@sized(4.6, 2.7)
def noise(figure: Figure) -> None:
    """The study's table 3, with the standard error that its dev set has."""
    rows = sorted((int(row.label[0]), row.dev["sst"]) for row in TABLES["3"].rows)
    ranks, scores = zip(*rows, strict=True)
    errors = [1.96 * math.sqrt(p * (1 - p) / DEV_ROWS["sst"]) for p in scores]
    axes = figure.add_subplot()
    axes.errorbar(range(len(ranks)), scores, yerr=errors, fmt="o", color=BLUE, capsize=4)
    axes.set_xticks(range(len(ranks)), ranks)
    axes.set_xlabel("rank")
    axes.set_ylabel("SST dev accuracy")


@sized(4.6, 2.6)
def study(figure: Figure) -> None:
    """Gaps to full fine-tuning in table 1, Siamese pairs left out, as docs/tables.md has them."""
    page = (Path(__file__).parents[1] / "tables.md").read_text(encoding="utf-8")
    section = page.split("## Table 1")[1].split("##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "|" in line]
    rows = [row for row in rows[2:] if row[6] and row[1] != "siamese"]
    axes = figure.add_subplot()
    names = [f"{row[0]}, {row[2]}" for row in rows]
    for place, label, colour, mark in ((6, "the study", BLUE, "o"), (7, "here", ORANGE, "s")):
        axes.plot([float(row[place]) for row in rows], names, mark, color=colour, label=label, markersize=5)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("dev score, less full fine-tuning's")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
