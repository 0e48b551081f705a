"""A layer's weights cast in one call: the same bits as one after the other, and fewer calls."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from small_runs import settings
from torch.utils._python_dispatch import TorchDispatchMode

from training.casting import cast_layer_by_layer
from training.loop import Trainer
from training.recompute import recompute_layers
from training.run import Run


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[function.overloadpacket.__name__] += 1
        return function(*args, **kwargs or {})


def steps(model: Path, data: Path, cast: bool, recompute: bool, **changes) -> tuple[list, dict, Counter]:
    """Two steps' lines, the weights they leave, and the operations of the second."""
    trainer = Run(settings(model, data, method="full", encoder_dropout=0.1, **changes)).trainer
    if cast:
        cast_layer_by_layer(trainer.model.bert)
    if recompute:
        recompute_layers(trainer.model.bert, trainer.dropout_key)
    trainer.model.train()
    lines = [trainer.step()]
    with Calls() as calls:
        lines.append(trainer.step())
    return lines, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, calls.of


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_steps_are_the_same_bit_for_bit(recompute: bool, pooling: str, tiny: Path, small_data: Path) -> None:
    changes = {"recompute": recompute, "precision": "bf16", "pooling": pooling}
    lines, weights, _ = steps(tiny, small_data, cast=True, **changes)
    expected_lines, expected, _ = steps(tiny, small_data, cast=False, **changes)
    assert lines == expected_lines
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_layer_takes_one_call_there_and_one_back(tiny: Path, small_data: Path) -> None:
    *_, calls = steps(tiny, small_data, cast=True, recompute=False, precision="bf16")
    *_, without = steps(tiny, small_data, cast=False, recompute=False, precision="bf16")
    layers, weights = 2, 16
    assert calls["_foreach_copy_"] == 2 * layers
    assert without["_to_copy"] - calls["_to_copy"] == 2 * layers * weights


def test_in_fp32_nothing_is_cast(tiny: Path, small_data: Path) -> None:
    *_, calls = steps(tiny, small_data, cast=True, recompute=False, precision="fp32")
    assert calls["_foreach_copy_"] == 0


@pytest.mark.parametrize(("method", "casts"), [("full", True), ("lora", False)])
def test_a_trainer_does_so_on_another_device_where_the_encoder_trains(
    method: str, casts: bool, tiny: Path, small_data: Path
) -> None:
    run = Run(settings(tiny, small_data, method=method))
    bert = run.trainer.model.bert
    assert bert.call_layer is torch.nn.Module.__call__
    Trainer(run.config, run.trainer.model, run.data["train"], torch.device("meta"))
    assert (bert.call_layer is not torch.nn.Module.__call__) == casts
