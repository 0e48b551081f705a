"""What a finished run made of its base model's weights: every linear layer that trains, before and after.

Letters: N output features, K input features. Weights as stored, [N, K].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lora.layers import LoRALinear, merged_weight
from lora.methods import METHODS, merge
from lora.placement import IN_LAYER, linear_names
from minibert.errors import InputError
from minibert.files import check_fits, object_in, read_json
from minibert.hub import resolve
from minibert.model import Bert
from minibert.weights import load_bert
from training.adapter_folder import weights_sha256
from training.config import Config
from training.provenance import check_sha256
from training.run_folder import RunFolder, check_unchanged, load_run, read_run_config


@dataclass(frozen=True)
class Update:
    """A linear layer's weight before training and after, [N, K] in fp64.

    Attributes:
        adapter_norm: ‖s · B A‖, where the layer has an adapter.
    """

    name: str
    before: Tensor
    after: Tensor
    adapter_norm: float | None

    @property
    def layer(self) -> int | None:
        """Which BERT layer it is in; the pooler is in none."""
        inside = IN_LAYER.fullmatch(self.name)
        return int(inside[1]) if inside else None

    @property
    def part(self) -> str:
        """What it is in its layer: attention.self.query"""
        inside = IN_LAYER.fullmatch(self.name)
        return inside[2] if inside else self.name


@dataclass(frozen=True)
class Trained:
    """A finished run's encoder with its adapters, and the base model that it came from.

    Attributes:
        base: the folder of the base model.
        sha256: of the base's files of weights: two runs of one base have the same.
    """

    path: Path
    config: Config
    bert: Bert
    base: Path
    sha256: dict[str, str]

    @cached_property
    def start(self) -> Bert:
        """The encoder before training."""
        return load_bert(self.base).eval()

    @property
    def merged(self) -> Bert:
        """A plain encoder with the trained one's outputs."""
        return merge(self.bert).eval()

    def updates(self) -> Iterator[Update]:
        """One linear layer at a time, in order; none of a frozen run.

        Raises:
            InputError: if a weight is not finite.
        """
        for name, before, after, adapter_norm in self._pairs():
            if not (before.isfinite().all() and after.isfinite().all()):
                raise InputError(f"{self.path}: expected finite weights, those of {name} are not")
            yield Update(name, before, after, adapter_norm)

    def _pairs(self) -> Iterator[tuple[str, Tensor, Tensor, float | None]]:
        if METHODS[self.config.method].layer:
            for name, layer in self.bert.named_modules():
                if isinstance(layer, LoRALinear):
                    yield name, layer.weight.detach().double(), *_merged(layer)
        elif METHODS[self.config.method].trains_encoder:
            for name in linear_names(self.bert.config.num_hidden_layers, self.config.pooling == "pooler"):
                both = (self.start, self.bert)
                weights = (one.get_submodule(name).weight.detach().double() for one in both)
                yield name, *weights, None

    def outside(self) -> float:
        """Of ‖Δ‖² over all parameters the share that no update has: embeddings, norms, biases."""
        if not METHODS[self.config.method].trains_encoder:
            return 0.0
        start, now = self.start.state_dict(), self.bert.state_dict()
        linears = {f"{name}.weight" for name in linear_names(self.bert.config.num_hidden_layers, True)}
        changes = {name: (now[name].double() - start[name].double()).square().sum().item() for name in now}
        total = sum(changes.values())
        return (
            sum(change for name, change in changes.items() if name not in linears) / total if total else 0.0
        )


@torch.no_grad()
def _merged(layer: LoRALinear) -> tuple[Tensor, float]:
    """W' = g ⊙ (W + s · B A) in fp64, with g = m/‖W + s · B A‖ of DoRA, else 1; and ‖s · B A‖."""
    weight, _, *factors = (None if one is None else one.double() for one in layer.parameters_of_y)
    lora_A, lora_B, _ = factors
    return merged_weight(weight, *factors, layer.scaling), layer.scaling * (lora_B @ lora_A).norm().item()


def read_trained(path: Path, task: str | None = None) -> Trained:
    """A finished run, or an adapter folder; of a run with an adapter for each task, `task` says whose.

    Raises:
        InputError: if the run or its base cannot be used, is not what it was, or has no such task.
    """
    written = read_run_config(RunFolder(path))
    names = [one.name for one in written.tasks]
    if task is not None and task not in names:
        raise InputError(f"{path}: --task: expected one of the run's tasks, {', '.join(names)}; got {task!r}")
    if written.adapters == "per-task" and task is None:
        raise InputError(f"{path}: has an adapter for each task; --task chooses, of {', '.join(names)}")
    config, model, _ = load_run(path, task)
    check_unchanged(path, written)
    base = resolve(config.model)
    trained = Trained(path, config, model.bert, base, weights_sha256(base))
    if METHODS[config.method].trains_encoder:
        _check_base(trained)
    return trained


def _check_base(trained: Trained) -> None:
    """A full run needs no base to predict, so nothing else has looked at it.

    Raises:
        InputError: if it is not the one that the run began with.
    """
    result = RunFolder(trained.path).result
    known = object_in(object_in(read_json(result), "sha256", result), "model", result)
    check_sha256(trained.base, known, result)
    where = f"{trained.path}: the trained model does not fit its base {trained.base}"
    check_fits(trained.bert.state_dict(), trained.start.state_dict(), where)
