"""An adapter for each task on one frozen encoder, which reads a batch of several tasks in one pass.

The batch is one row of tokens, task after task. Embeddings, attention, norms and GELU see the whole row;
an adapted linear sends each task's tokens through that task's adapter:

    y = [y_1; y_2; ...],  y_t = adapter_t(x_t)

as S-LoRA serves many adapters at once (Sheng et al. 2023), here in training too. No weight that trains is
touched by two tasks, so the gradients of one are what they would be without the others.

Letters: M tokens, K input features, N output features.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora.layers import LoRALinear

Rows = dict[str, int]  # task -> how many tokens of the row under way are its, in order


class LinearByTask(nn.Module):
    """One frozen linear with an adapter for each task; all have the same `weight` and `bias`.

    `rows`, shared by all layers of an encoder, is set before each pass.
    """

    def __init__(self, adapters: Mapping[str, LoRALinear], rows: Rows):
        super().__init__()
        self.adapters, self.rows = nn.ModuleDict(adapters), rows

    def parts(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each task's rows of x [M, K]; tokens beyond the last task's, a row's filler, go with them."""
        counts = list(self.rows.values())
        return zip(self.rows, x.split([*counts[:-1], len(x) - sum(counts[:-1])]), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """x [M, K] -> [M, N]"""
        return beneath([self.adapters[task](part) for task, part in self.parts(x)])

    @staticmethod
    def together(layers: Sequence["LinearByTask"], x: Tensor) -> tuple[Tensor, ...]:
        """y of each of several layers with one input x [M, K]; a task's adapters share their passes."""
        by_task = []
        for task, part in layers[0].parts(x):
            adapters = [layer.adapters[task] for layer in layers]
            merged = not isinstance(adapters[0], LoRALinear)
            by_task.append([one(part) for one in adapters] if merged else LoRALinear.together(adapters, part))
        return tuple(beneath(parts) for parts in zip(*by_task, strict=True))


def beneath(parts: Sequence[Tensor]) -> Tensor:
    """[M_t, N] of each task -> [M, N]"""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def adapt_by_task(encoder: nn.Module, tasks: Sequence[str]) -> Rows:
    """Give each adapted layer of an encoder a copy of its adapter for every task, in place; their rows.

    All tasks start with the same adapter, as runs of one task each would.
    """
    rows: Rows = {}
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, LoRALinear):
            # deepcopy asks its memo first: what is in there is not copied but taken.
            frozen = {id(one): one for one in (layer.weight, layer.bias) if one is not None}
            adapters = {task: copy.deepcopy(layer, dict(frozen)) for task in tasks}
            encoder.set_submodule(name, LinearByTask(adapters, rows))
    return rows


def with_adapters_of(encoder: nn.Module, task: str) -> nn.Module:
    """The encoder with one task's adapters alone, as a run of that task has it; all weights are shared."""
    taken: dict[int, object] = {id(one): one for one in (*encoder.parameters(), *encoder.buffers())}
    for module in encoder.modules():
        if isinstance(module, LinearByTask):
            taken[id(module)] = module.adapters[task]
    return copy.deepcopy(encoder, taken)
