"""What AdamW is given, what it computes, and the learning rate of each step."""

import math
from pathlib import Path

import pytest
import torch
from small_runs import settings
from tolerances import tolerance
from torch import nn

from training.build import build_model
from training.optimizer import build_optimizer, lr_factor
from training.run import Run


@pytest.mark.parametrize("method", ["frozen", "full", "lora", "rslora", "dora"])
def test_matrices_decay_and_vectors_do_not(method: str, tiny: Path, small_data: Path) -> None:
    model = build_model(settings(tiny, small_data, method=method, pooling="mean", encoder_dropout=0.0), tiny)
    groups = build_optimizer(model, 0.1, 0.03).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay, name
        elif name.endswith(("bias", "LayerNorm.weight", "lora_magnitude_vector")):
            assert decay[id(parameter)] == 0, name
        else:
            assert decay[id(parameter)] == 0.03, name
    if method == "dora":
        assert sum(name.endswith("lora_magnitude_vector") for name, _ in model.named_parameters()) == 12


def adamw(p, grads, lr, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """Loshchilov & Hutter 2019, algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * (m_hat / (v_hat.sqrt() + eps) + decay * p)
    return p


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_is_the_papers(dtype: torch.dtype) -> None:
    layer = nn.Linear(7, 5, dtype=dtype)
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    grads = [{name: torch.randn_like(p) * 10.0**-t for name, p in start.items()} for t in range(6)]
    optimizer = build_optimizer(layer, 0.01, 0.5)
    for step in grads:
        for name, parameter in layer.named_parameters():
            parameter.grad = step[name].clone()
        optimizer.step()
    for name, decay in (("weight", 0.5), ("bias", 0.0)):
        expected = adamw(start[name], [step[name] for step in grads], 0.01, decay)
        torch.testing.assert_close(layer.get_parameter(name).detach(), expected, **tolerance(dtype))


def test_one_group_is_left_out_where_it_would_be_empty() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    (group,) = build_optimizer(layer, 0.1, 0.1).param_groups
    assert group["params"] == [layer.weight]


HALF_COSINE = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0.5, 1, 1, 0.5]),
        ("linear", 1, [0.25, 0.5, 0.75, 1]),
        ("cosine", 0, HALF_COSINE),
        ("cosine", 0.5, [0.5, 1, 1, 0.5]),
        ("cosine", 1, [0.25, 0.5, 0.75, 1]),
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 0.25, [1, 1, 1, 1]),
        ("constant", 0.75, [1 / 3, 2 / 3, 1, 1]),
        ("linear", 0.1, [1, 0.75, 0.5, 0.25]),  # a tenth of four steps rounds to none
    ],
)
def test_the_learning_rate_rises_and_falls_as_by_hand(schedule: str, warmup: float, expected: list) -> None:
    assert [lr_factor(step, 4, warmup, schedule) for step in range(4)] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 0.06, 0.5, 0.99, 1])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_step_learns_and_none_above_the_peak(schedule: str, warmup: float, total: int) -> None:
    factors = [lr_factor(step, total, warmup, schedule) for step in range(total)]
    assert max(factors) == 1
    assert min(factors) > 0
    peak = factors.index(1)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def gradient_norm(run: Run) -> float:
    """Of the first step, through the first moments: they are a tenth of the gradients AdamW was given."""
    moments = [state["exp_avg"].double() for state in run.trainer.optimizer.state.values()]
    return 10 * math.sqrt(sum(float((m**2).sum()) for m in moments))


@pytest.mark.parametrize("most", [0.001, 1.0, 1e6, 0.0])
def test_gradients_are_clipped_to_the_norm_asked_for(most: float, tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, max_grad_norm=most, dropout=0.0))
    run.trainer.model.train()
    told = run.trainer.step()["grad_norm"]
    assert told > 2  # the same before clipping, whatever `most`
    assert gradient_norm(run) == pytest.approx(min(told, most) if most else told, rel=1e-4)


def test_gradients_do_not_add_up_over_steps(tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data))
    run.trainer.step()
    assert all(p.grad is None for p in run.trainer.model.parameters())
