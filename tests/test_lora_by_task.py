"""An adapter for each task on one weight: a task's rows by its own adapter, and nothing trained is shared."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lora.by_task import LinearByTask, adapt_by_task, with_adapters_of
from lora.layers import DoRALinear, LoRALinear
from lora.methods import METHODS, apply_method, merge
from minibert.model import Bert, BertConfig

K = N = 8
RANK = 3
ROWS = {"sst": 4, "qqp": 1, "sts": 6}
TASKS = tuple(ROWS)


SHAPE = BertConfig(
    vocab_size=9, hidden_size=K, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
)


METHOD_LAYER = {"lora": LoRALinear, "dora": DoRALinear}


def linears(encoder: Bert) -> tuple[nn.Module, nn.Module]:
    """Two that have their input in common."""
    attention = encoder.encoder["layer"][0].attention["self"]
    return attention.query, attention.key


def build(method: str) -> tuple[Bert, dict[str, int]]:
    """In fp64, and moved off the start, where all tasks' adapters are the same."""
    encoder = Bert(SHAPE).double()
    apply_method(encoder, METHODS[method], rank=RANK, alpha=5.0, seed=1)
    rows = adapt_by_task(encoder, TASKS)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    rows.update(ROWS)
    return encoder, rows


def by_hand(layer: LoRALinear, x: Tensor) -> Tensor:
    W = layer.weight + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    if isinstance(layer, DoRALinear):
        W = (layer.lora_magnitude_vector / W.detach().norm(dim=1))[:, None] * W
    return x @ W.T + layer.bias


ALONE: dict[str, Callable[[Bert, Tensor], list[Tensor]]] = {
    "one layer": lambda encoder, x: [layer(x) for layer in linears(encoder)],
    "layers that share their input": lambda encoder, x: list(LinearByTask.together(linears(encoder), x)),
}


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("called", ALONE)
def test_each_tasks_rows_are_its_own_adapters_and_so_are_their_gradients(method: str, called: str) -> None:
    encoder, _ = build(method)
    x = torch.randn(sum(ROWS.values()), K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, len(x), N, dtype=torch.float64)
    trained = [p for layer in linears(encoder) for p in layer.parameters() if p.requires_grad]
    found = torch.stack(ALONE[called](encoder, x))
    expected = torch.stack([
        torch.cat([by_hand(layer.adapters[task], part)
                   for task, part in zip(TASKS, x.split(list(ROWS.values())), strict=True)])
        for layer in linears(encoder)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * dy).sum(), [x, *trained]) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_a_task_that_has_no_rows_gets_no_gradient_and_filler_goes_with_the_last() -> None:
    encoder, rows = build("lora")
    rows.clear()
    rows.update({"sst": 4, "sts": 2})
    x = torch.randn(9, K, dtype=torch.float64)  # three rows of filler
    query, _ = linears(encoder)
    y = query(x)
    torch.testing.assert_close(y[4:], by_hand(query.adapters["sts"], x[4:]))
    y.sum().backward()
    gradients = {task: query.adapters[task].lora_A.weight.grad for task in TASKS}
    assert gradients["qqp"] is None
    assert all(gradients[task] is not None for task in ("sst", "sts"))


def test_all_tasks_have_one_weight_and_adapters_that_begin_as_one_task_alone_would() -> None:
    encoder = Bert(SHAPE)
    apply_method(encoder, METHODS["dora"], rank=RANK, seed=1)
    alone = copy.deepcopy(encoder)
    count = sum(p.numel() for p in encoder.parameters() if not p.requires_grad)
    adapt_by_task(encoder, TASKS)
    assert sum(p.numel() for p in encoder.parameters() if not p.requires_grad) == count
    for layer, single in zip(linears(encoder), linears(alone), strict=True):
        adapters = [layer.adapters[task] for task in TASKS]
        assert len({id(adapter.weight) for adapter in adapters}) == 1
        assert len({id(adapter.bias) for adapter in adapters}) == 1
        assert len({adapter.lora_A.weight.data_ptr() for adapter in adapters}) == len(TASKS)
        for adapter in adapters:
            torch.testing.assert_close(adapter.state_dict(), single.state_dict())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_one_tasks_encoder_is_that_of_a_run_of_the_task(method: str) -> None:
    encoder, rows = build(method)
    x = torch.randn(6, K, dtype=torch.float64)
    for task in TASKS:
        own = linears(with_adapters_of(encoder, task))
        assert [type(layer) for layer in own] == [METHOD_LAYER[method]] * 2
        assert own[0].lora_A.weight is linears(encoder)[0].adapters[task].lora_A.weight
        rows.clear()
        rows[task] = len(x)
        merged = linears(merge(encoder))
        for i in (0, 1):
            expected = own[i](x)
            torch.testing.assert_close(linears(encoder)[i](x), expected)
            torch.testing.assert_close(merged[i](x), expected)
            torch.testing.assert_close(LinearByTask.together(merged, x)[i], expected)
