"""Figures of the way from text to loss."""

import numpy as np
import torch
from frame import BLUE, GREEN, GREY, INK, ORANGE, RED, arrow, bare, box, cells, sized
from matplotlib.figure import Figure

from minibert.model import Bert, BertConfig
from minibert.sequences import Sequences
from tasks.losses import cross_entropy, mean_squared_error

FIGURES = ("tokens", "embeddings", "attention", "layer", "pooling", "heads", "losses")
LENGTHS = (5, 9, 3, 6)
OF_SEQUENCES = (BLUE, ORANGE, GREEN, RED)


@sized(4.6, 1.8)
def tokens(figure: Figure) -> None:
    axes = bare(figure.add_subplot(), 24, 8.6)
    axes.set_aspect("equal")
    axes.text(0, 7.3, "padded: 4 × 9 = 36 places", fontsize=9)
    for i, (length, colour) in enumerate(zip(LENGTHS, OF_SEQUENCES, strict=True)):
        cells(axes, 0, 5.8 - i, [colour] * length + [GREY] * (max(LENGTHS) - length))
    axes.text(0, 1.3, "packed: M = 23 tokens in one row", fontsize=9)
    row = [c for length, c in zip(LENGTHS, OF_SEQUENCES, strict=True) for c in [c] * length]
    cells(axes, 0, 0.05, row)


@sized(4.6, 2.2)
def embeddings(figure: Figure) -> None:
    torch.manual_seed(0)
    tables = Bert(BertConfig(64, 24, 1, 4, 48, 8)).embeddings.eval()
    ids, types, places = torch.tensor([7]), torch.tensor([0]), torch.tensor([3])
    with torch.no_grad():
        parts = (
            ("word 7", tables.word_embeddings(ids)),
            ("+ position 3", tables.position_embeddings(places)),
            ("+ token type 0", tables.token_type_embeddings(types)),
            ("→ LayerNorm", tables(ids, types, places)),
        )
    all_axes = figure.subplots(len(parts), 1)
    for axes, (name, vector) in zip(all_axes, parts, strict=True):
        edge = vector.abs().max()
        axes.imshow(vector.numpy(), cmap="coolwarm", vmin=-edge, vmax=edge, aspect="auto")
        axes.set_xticks([])
        axes.set_yticks([0], [name], fontsize=9)
        axes.tick_params(length=0)


@sized(3.4, 3.2)
def attention(figure: Figure) -> None:
    """Measured: where the gradient of a token's output by another token's input is not zero."""
    torch.manual_seed(0)
    attend = Bert(BertConfig(64, 16, 1, 2, 32, 16)).encoder["layer"][0].attention["self"]
    x = torch.randn(sum(LENGTHS), 16, requires_grad=True)
    y = attend(x, Sequences(LENGTHS))
    seen = torch.stack([torch.autograd.grad(row.sum(), x, retain_graph=True)[0].abs().sum(1) for row in y])
    axes = figure.add_subplot()
    axes.imshow((seen > 0).numpy(), cmap="Blues", vmin=0, vmax=1.5)
    for edge in np.cumsum(LENGTHS)[:-1] - 0.5:
        axes.axhline(edge, color=INK, linewidth=0.4)
        axes.axvline(edge, color=INK, linewidth=0.4)
    axes.set_xlabel("token that is read")
    axes.set_ylabel("token that reads")


@sized(4.6, 3.9)
def layer(figure: Figure) -> None:
    axes = bare(figure.add_subplot(), 10, 10.4)
    steps = (
        ("attention.self", 8.1, BLUE),
        ("attention.output.dense", 6.9, BLUE),
        ("+ residual, LayerNorm", 5.7, GREY),
        ("intermediate.dense, GELU   H → 4H", 4.1, ORANGE),
        ("output.dense   4H → H", 2.9, ORANGE),
        ("+ residual, LayerNorm", 1.7, GREY),
    )
    for text, y, colour in steps:
        box(axes, 2.6, y, 6.4, 0.8, text, colour if colour == GREY else f"{colour}40")
    for above, below in ((8.1, 7.7), (6.9, 6.5), (5.7, 4.9), (4.1, 3.7), (2.9, 2.5)):
        arrow(axes, (5.8, above), (5.8, below))
    axes.text(5.8, 10.0, "x [M, H]", ha="center", fontsize=9)
    axes.text(5.8, 0.3, "y [M, H]", ha="center", fontsize=9)
    arrow(axes, (5.8, 9.9), (5.8, 8.9))
    arrow(axes, (5.8, 1.7), (5.8, 0.8))
    for top, foot in ((9.4, 6.1), (5.3, 2.1)):
        axes.plot([5.8, 1.5, 1.5], [top, top, foot], color=INK, linewidth=0.9)
        arrow(axes, (1.5, foot), (2.6, foot))
        axes.text(1.3, (top + foot) / 2, "residual", rotation=90, ha="right", va="center", fontsize=9)


@sized(4.6, 2.0)
def pooling(figure: Figure) -> None:
    axes = bare(figure.add_subplot(), 24, 9)
    axes.set_aspect("equal")
    for y, name in ((6.4, "cls"), (3.4, "pooler"), (0.4, "mean")):
        taken = BLUE if name == "mean" else GREY
        cells(axes, 4.4, y, [BLUE, *[taken] * 7], 1.2)
        axes.text(0, y + 0.6, name, va="center", fontsize=9)
        arrow(axes, (14.4, y + 0.6), (17.2, y + 0.6))
        cells(axes, 17.4, y, [ORANGE], 1.2)
        said = {"cls": "as it is", "pooler": "tanh(W h + b)", "mean": "Σ h / T"}[name]
        axes.text(19.0, y + 0.6, said, va="center", fontsize=9)
    axes.text(5.0, 8.2, "[CLS]", ha="center", fontsize=8)


@sized(4.6, 2.5)
def heads(figure: Figure) -> None:
    """Least squares: the best w₁ u + w₂ v + b for the target u v is a plane, and here the flat one."""
    line = np.linspace(-1, 1, 41)
    u, v = np.meshgrid(line, line)
    target = u * v
    columns = np.stack([u.ravel(), v.ravel(), np.ones(u.size)], 1)
    weights = np.linalg.lstsq(columns, target.ravel(), rcond=None)[0]
    titles = ("u · v, what is asked", "best w₁ u + w₂ v + b")
    shown = (target, (columns @ weights).reshape(u.shape))
    for axes, title, values in zip(figure.subplots(1, 2, sharey=True), titles, shown, strict=True):
        axes.imshow(values, cmap="coolwarm", vmin=-1, vmax=1, extent=(-1, 1, -1, 1), origin="lower")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("u")
        axes.set_xticks([-1, 0, 1])
        axes.set_yticks([-1, 0, 1])
    figure.axes[0].set_ylabel("v")


@sized(4.6, 2.5)
def losses(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    away = torch.linspace(-3, 3, 61)
    label = torch.zeros(1)
    left.plot(away, [mean_squared_error(one.view(1, 1), label) for one in away], color=BLUE)
    left.set_title("mean squared error", fontsize=9)
    left.set_xlabel("score - label")
    lead = torch.linspace(-6, 6, 61)
    logits = torch.stack([lead, torch.zeros_like(lead)], 1)
    loss = [cross_entropy(one[None], torch.zeros(1, dtype=torch.long)) for one in logits]
    right.plot(lead, loss, color=ORANGE)
    right.set_title("cross-entropy, nats", fontsize=9)
    right.set_xlabel("lead of the right class's logit")
