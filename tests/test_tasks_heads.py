"""Heads: shapes, the features of pairs, hidden layers, dropout, and why the study's Siamese runs failed."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance

from tasks import TASKS
from tasks.heads import FEATURES, Head

FP64 = tolerance(torch.float64)

FORMULAS = {
    "uv": lambda u, v: [*u, *v],
    "uv-diff": lambda u, v: [*u, *v, *(abs(a - b) for a, b in zip(u, v, strict=True))],
    "uv-diff-prod": lambda u, v: [
        *u,
        *v,
        *(abs(a - b) for a, b in zip(u, v, strict=True)),
        *(a * b for a, b in zip(u, v, strict=True)),
    ],
    "cosine": lambda u, v: [sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)],
}


def test_a_cosine_head_starts_as_the_cosine_and_drops_nothing_of_it():
    pooled = torch.randn(14, 9, dtype=torch.float64)
    cosine = F.cosine_similarity(pooled[:7], pooled[7:])
    score, classes = head64(9, 1, 0, 0.3, "cosine"), head64(9, 2, 0, 0.3, "cosine")
    score.start_at_cosine(TASKS["sts"])
    classes.start_at_cosine(TASKS["qqp"])
    torch.testing.assert_close(score(pooled)[:, 0], 5 * cosine, **FP64)
    odds = classes(pooled)[:, 1] - classes(pooled)[:, 0]
    torch.testing.assert_close(odds, 10 * (cosine - 0.75), **FP64)
    score(pooled).sum().backward()
    assert score.output.weight.grad.shape == (1, 1)


def test_a_vector_of_nothing_has_a_cosine_of_zero_and_finite_gradients():
    pooled = torch.zeros(2, 9, dtype=torch.float64, requires_grad=True)
    head = head64(9, 1, features="cosine")
    assert head(pooled).item() == head.output.bias.item()
    head(pooled).sum().backward()
    assert pooled.grad.isfinite().all()


def head64(*arguments, **options) -> Head:
    return Head(*arguments, **options).double()


def by_hand(head: Head, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
    """dropout -> linear -> ReLU for each hidden layer, then dropout -> linear; in order of the state dict."""
    tensors = list(head.state_dict().values())
    for weight, bias in zip(tensors[:-2:2], tensors[1:-2:2], strict=True):
        x = (F.dropout(x, dropout) @ weight.T + bias).clamp(min=0)
    return F.dropout(x, dropout) @ tensors[-2].T + tensors[-1]


# One vector an example


@pytest.mark.parametrize("hidden_layers", [0, 1, 3])
@pytest.mark.parametrize(("batch", "hidden", "outputs"), [(8, 32, 5), (1, 13, 1), (7, 1, 2)])
def test_a_head_computes_its_layers_one_after_another(batch, hidden, outputs, hidden_layers):
    head = head64(hidden, outputs, hidden_layers).eval()
    pooled = torch.randn(batch, hidden, dtype=torch.float64)
    assert head(pooled).shape == (batch, outputs)
    torch.testing.assert_close(head(pooled), by_hand(head, pooled), **FP64)


@pytest.mark.parametrize("hidden_layers", [0, 1, 3])
def test_a_head_has_as_many_layers_as_it_says(hidden_layers: int):
    shapes = [tuple(p.shape) for p in Head(6, 5, hidden_layers).parameters() if p.ndim == 2]
    assert shapes == [(6, 6)] * hidden_layers + [(5, 6)]
    shapes = [tuple(p.shape) for p in Head(6, 1, hidden_layers, features="uv-diff").parameters()]
    widths = [18, *[6] * hidden_layers]
    assert shapes[::2] == [*((6, width) for width in widths[:-1]), (1, widths[-1])]


@pytest.mark.parametrize("dropout", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("hidden_layers", [0, 2])
@pytest.mark.parametrize("features", [None, "uv-diff-prod"])
def test_in_training_dropout_stands_before_every_linear_layer(dropout, hidden_layers, features):
    head = head64(16, 5, hidden_layers, dropout, features)
    pooled = torch.randn(40, 16, dtype=torch.float64)
    torch.manual_seed(1)
    logits = head(pooled)
    torch.manual_seed(1)
    u, v = pooled[:20], pooled[20:]
    x = torch.cat([u, v, (u - v).abs(), u * v], dim=1) if features else pooled
    torch.testing.assert_close(logits, by_hand(head, x, dropout), **FP64)
    assert torch.equal(head(pooled), logits) == (dropout == 0)


def test_in_evaluation_nothing_is_dropped():
    head = head64(16, 5, hidden_layers=2, dropout=0.9).eval()
    pooled = torch.randn(8, 16, dtype=torch.float64)
    assert torch.equal(head(pooled), head(pooled))
    torch.testing.assert_close(head(pooled), by_hand(head, pooled), **FP64)


@pytest.mark.parametrize("hidden_layers", [0, 2])
@pytest.mark.parametrize("features", [None, *FEATURES])
def test_every_weight_and_the_encoder_get_a_gradient(features, hidden_layers):
    head = head64(16, 5, hidden_layers, 0.0, features)
    pooled = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    head(pooled).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*head.parameters(), pooled))


# Two vectors an example


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("hidden_layers", [0, 2])
def test_the_sides_of_a_pair_are_compared_by_the_formula_left_ones_first(features, hidden_layers):
    head = head64(7, 2, hidden_layers, features=features).eval()
    u, v = torch.randn(2, 5, 7, dtype=torch.float64)
    x = [FORMULAS[features](a, b) for a, b in zip(u.tolist(), v.tolist(), strict=True)]
    logits = head(torch.cat([u, v]))
    assert logits.shape == (5, 2)
    torch.testing.assert_close(logits, by_hand(head, torch.tensor(x, dtype=torch.float64)), **FP64)


@pytest.mark.parametrize("features", FEATURES)
def test_the_width_is_that_of_all_parts(features):
    width, compare = FEATURES[features]
    assert torch.cat(compare(*torch.randn(2, 3, 4)), dim=1).shape == (3, width(4))


@pytest.mark.parametrize("features", FEATURES)
def test_which_side_is_left_matters_to_a_pair_and_which_pair_stands_beside_it_does_not(features):
    head = head64(7, 2, features=features).eval()
    u, v = torch.randn(2, 5, 7, dtype=torch.float64)
    logits = head(torch.cat([u, v]))
    assert torch.allclose(head(torch.cat([v, u])), logits) == (features == "cosine")  # which is symmetric
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(head(torch.cat([u[order], v[order]])), logits[order], **FP64)


# Why the study's Siamese runs failed


def swapped_sums(head: Head) -> tuple[torch.Tensor, torch.Tensor]:
    """f(a, b) + f(c, d) and f(a, d) + f(c, b), for random a, b, c, d."""
    a, b, c, d = torch.randn(4, 9, 7, dtype=torch.float64)

    def f(u, v):
        return head(torch.cat([u, v]))

    return f(a, b) + f(c, d), f(a, d) + f(c, b)


def test_a_linear_head_on_u_and_v_is_a_sum_of_a_left_part_and_a_right_part():
    left, right = swapped_sums(head64(7, 1, features="uv").eval())
    torch.testing.assert_close(left, right, **FP64)


@pytest.mark.parametrize(
    ("features", "hidden_layers"), [("uv", 1), ("uv-diff", 0), ("uv-diff-prod", 0), ("uv-diff-prod", 1)]
)
def test_a_difference_a_product_or_a_hidden_layer_make_a_head_more_than_that_sum(features, hidden_layers):
    left, right = swapped_sums(head64(7, 1, hidden_layers, features=features).eval())
    assert (left - right).abs().max() > 1e-3


def agreement() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair of four meanings, and whether its sides mean the same: u, v [16, 4], labels [16]."""
    meanings = torch.eye(4, dtype=torch.float64)
    left, right = zip(*itertools.product(range(4), repeat=2), strict=True)
    labels = torch.tensor(left) == torch.tensor(right)
    return meanings[list(left)], meanings[list(right)], labels.double()


def unexplained(features: str) -> float:
    """The share of the labels' variance that the best of all linear heads leaves; 1: it can only guess."""
    u, v, labels = agreement()
    x = torch.cat([*FEATURES[features][1](u, v), torch.ones(16, 1, dtype=torch.float64)], dim=1)
    best = torch.linalg.pinv(x) @ labels
    return float(((x @ best - labels) ** 2).mean() / labels.var(correction=0))


def test_no_linear_head_on_u_and_v_can_tell_pairs_that_agree_from_pairs_that_do_not():
    assert unexplained("uv") == pytest.approx(1)


@pytest.mark.parametrize("features", ["uv-diff", "uv-diff-prod"])
def test_a_linear_head_that_sees_the_difference_can(features: str):
    assert unexplained(features) == pytest.approx(0, abs=FP64["atol"])
