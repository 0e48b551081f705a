"""How much memory a run will take, before it takes it: counted, and within 20 % of what CPU runs took.

What is counted, in bytes; c is the size of a number in the dtype that activations have:

    weights       what the model holds, and the c of each encoder weight that a step merges or casts
    training      16 of each number that trains (gradient, AdamW's two moments, the best epoch's copy)
    activations   of each token in each layer that gradients reach: 5 H + I, and the input of each linear
                  whose weight learns from it (H, I), DoRA's output before gain and bias (H, I), times c; a
                  byte of each value that dropout may drop;
                  attention's N T (c + 1)
    features      of an encoder that never changes what it makes of each text, 4 H
    libraries     what oneDNN, the tokenizer and the data take beside what was imported

malloc holds more than is in use, by a factor that was fitted, as `libraries` was, to runs of
all-MiniLM-L6-v2: docs/memory.md.

Letters: H hidden size, I intermediate size, N heads, T tokens of a sequence.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora.by_task import LinearByTask
from lora.layers import LoRALinear
from lora.methods import METHODS
from minibert.errors import InputError
from minibert.model import Bert
from tasks.model import TaskModel
from training.config import Config
from training.precision import DTYPES

LIBRARIES = 110.0  # MiB
HELD = {"encoder": 1.3, "shared": 2.0, "per-task": 4.8}  # of what activations take, by what trains
MARGIN = 0.2  # an estimate may be off by so much


@dataclass(frozen=True)
class Footprint:
    """MiB above what the imports take."""

    weights: float
    training: float
    activations: float
    features: float = 0.0
    libraries: float = LIBRARIES

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value:,.0f}" for name, value in vars(self).items() if round(value))
        return f"about {self.total:,.0f} MiB above the imports: {parts}"


def footprint(
    config: Config, model: TaskModel, tokens: int, sequences: int, texts: int, epochs: float = 2
) -> Footprint:
    """Of a run that has so many texts; its largest pass through the model has `tokens` in `sequences`.

    `model` may be on the meta device. From the second epoch on a step has the best epoch's copy beside it.
    """
    size, dtype = DTYPES[config.precision].itemsize, DTYPES[config.precision]
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    other = sum(
        m.weight.numel() for m in model.bert.modules() if isinstance(m, nn.Linear) and m.weight.dtype != dtype
    )
    kind = "encoder" if METHODS[config.method].trains_encoder else config.adapters
    changes = any(p.requires_grad for p in model.bert.parameters())
    counted = tokens * token_bytes(config, model.bert, tokens / max(sequences, 1), size)
    return Footprint(
        weights=(held + other * size) / 2**20,
        training=trains * (16 if epochs > 1 else 12) / 2**20,
        activations=HELD[kind] * counted / 2**20,
        features=0.0 if changes else 4 * texts * model.bert.config.hidden_size / 2**20,
    )


def token_bytes(config: Config, bert: Bert, length: float, size: int) -> float:
    """What a token of a sequence of so many leaves for the way back, in all layers."""
    shape = bert.config
    hidden, wide, heads = shape.hidden_size, shape.intermediate_size, shape.num_attention_heads
    of_layers = []
    for layer in bert.encoder["layer"]:
        inputs = {"attention.self": 0, "attention.output": 0, "intermediate": 0, "output": 0}
        products = masks = 0
        for name, module in layer.named_modules():
            if learns(module) and "lora_" not in name:
                place = next(one for one in inputs if name.startswith(one))
                inputs[place] = one_of(module).in_features  # query, key and value share theirs
                masks += one_of(module).in_features if config.lora_dropout else 0
                products += one_of(module).out_features if config.method == "dora" else 0
        values = 5 * hidden + wide + sum(inputs.values()) + products
        masks += 2 * hidden if config.encoder_dropout else 0
        of_layers.append((sum(inputs.values()), values * size + masks + heads * length * (size + 1)))
    reached = next((i for i, (learnt, _) in enumerate(of_layers) if learnt), len(of_layers))
    kept = [taken for _, taken in of_layers[reached:]]
    if config.recompute and kept:
        return max(kept) + len(kept) * hidden * size
    return sum(kept)


def learns(module: nn.Module) -> bool:
    if isinstance(module, LoRALinear | LinearByTask):
        return True
    return type(module).__name__ == "Linear" and module.weight.requires_grad


def one_of(module: nn.Module) -> nn.Linear:
    """Itself, or of an adapter for each task the first"""
    return next(iter(module.adapters.values())) if isinstance(module, LinearByTask) else module


def available_mib(
    meminfo: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """What can be had without swapping, or less where a control group (a container) allows less.

    None where the system does not say.
    """
    try:
        told = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(told["MemAvailable"].split()[0]) / 2**10
    except (OSError, KeyError, ValueError):
        return None
    try:
        most, taken = (int((groups / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or one that says "max"
        return available
    return min(available, (most - taken) / 2**20)


def check_fits(needed: Footprint, device: torch.device) -> None:
    """Say so on stderr where memory will be tight.

    Raises:
        InputError: if the run would not fit even with the estimate's whole error in its favour.
    """
    on_gpu = device.type == "cuda"
    there = torch.cuda.mem_get_info(device)[0] / 2**20 if on_gpu else available_mib()
    if there is None or needed.total <= there:
        return
    said = f"the run takes {needed}; there are {there:,.0f} MiB"
    advice = "try --micro-batch-size, --recompute, a smaller --batch-size or --max-length, or --method lora"
    if (1 - MARGIN) * needed.total > there:
        raise InputError(f"{said}; {advice}")
    print(f"warning: {said}, which may be too few; {advice}", file=sys.stderr)
