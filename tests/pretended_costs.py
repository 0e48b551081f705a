"""What a training step costs on the pretended device, and what it may cost: 6 layers, bf16, sm_90.

`python tests/pretended_cuda.py` prints the counts, with PEFT's beside them where it is installed. Whoever
lowers a count lowers its budget in the same commit.
"""

import importlib.util
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from pretended_device import COUNTS
from small_runs import settings, write_data
from tiny_bert import TINY, build_tiny

from training.run import Run

SHAPE = replace(TINY, hidden_size=96, num_hidden_layers=6, intermediate_size=192)


class Cost(NamedTuple):
    """Of one step: kernel launches, copies from pageable memory, other waits of the host."""

    launches: int
    copies: int
    waits: int


CASES = {
    "lora": {"method": "lora"},
    "lora with dropout": {"method": "lora", "lora_dropout": 0.1},
    "dora": {"method": "dora"},
    "full": {"method": "full"},
    "three tasks, an adapter each": {"method": "lora", "task": "sst+qqp+sts", "adapters": "per-task"},
}
BUDGETS = {
    "lora": Cost(412, 0, 1),
    "lora with dropout": Cost(470, 0, 1),
    "dora": Cost(485, 0, 1),
    "full": Cost(403, 0, 1),
    "three tasks, an adapter each": Cost(971, 0, 1),
}


def model_and_data(folder: Path) -> tuple[Path, Path]:
    return build_tiny(folder / "model", shape=SHAPE), write_data(folder / "data")


def cost_of(model: Path, data: Path, changes: dict) -> Cost:
    """The second step's: the first casts what is cast once. COUNTS has the details."""
    config = settings(model, data, device="cuda", precision="bf16", pooling="mean", **changes)
    trainer = Run(config).trainer
    trainer.model.train()
    trainer.step()
    COUNTS.clear()
    trainer.step()
    return counted()


def counted() -> Cost:
    return Cost(*(sum(counter.values()) for counter in (COUNTS.launches, COUNTS.copies, COUNTS.waits)))


def print_table() -> None:
    """Each case: its cost and budget, the commonest operations, and every wait and copy."""
    with tempfile.TemporaryDirectory() as folder:
        model, data = model_and_data(Path(folder))
        for name, changes in CASES.items():
            cost = cost_of(model, data, changes)
            print(f"{name}: {cost}, budget {BUDGETS[name]}")
            print_details(
                COUNTS.launches.most_common(12), COUNTS.copies.most_common(), COUNTS.waits.most_common()
            )
        if importlib.util.find_spec("peft") and importlib.util.find_spec("transformers"):
            for name in ("lora", "lora with dropout", "dora", "full"):
                print(f"transformers and PEFT, {name}: {cost_of_peer(model, **CASES[name])}")
                print_details(COUNTS.launches.most_common(12))


def print_details(*tables) -> None:
    for title, table in zip(("launches", "pageable copies", "waits"), tables, strict=False):
        print(f"  {title}: " + "; ".join(f"{count} {name}" for name, count in table))


def cost_of_peer(model: Path, method: str, lora_dropout: float = 0.0) -> Cost:
    """A step of the usual stack on 8 padded sequences, as its documentation shows it."""
    from benchmarks.peer import build_model, build_optimizer, logging, loss_of

    logging.set_verbosity_error()

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        peer = build_model(model, method, 1, 8, lora_dropout).to("cuda").train()
    optimizer = build_optimizer(peer, 1e-3, fused=True)
    lengths = torch.tensor([5, 8, 9, 12, 14, 17, 20, 21])
    mask = (torch.arange(21) < lengths[:, None]).long()
    rows = {"input_ids": mask * 7, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}
    labels = torch.linspace(0, 5, 8)
    for _ in range(2):
        COUNTS.clear()
        batch = {name: tensor.to("cuda") for name, tensor in rows.items()}
        with torch.autocast("cuda", torch.bfloat16):
            logits = peer(**batch)
        loss = loss_of(logits, labels.to("cuda"))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return counted()


def exceeded(cost: Cost, budget: Cost) -> list[str]:
    """The counts that are above their budget."""
    triples = zip(Cost._fields, cost, budget, strict=True)
    return [f"{count} {name}, budget {most}" for name, count, most in triples if count > most]
