"""The usual stack, trained on the same task: transformers' AutoModel and PEFT in a plain PyTorch loop.

`python -m benchmarks.peer --model FOLDER --data FOLDER --settings default|best` prints one line of JSON. What
computes here is transformers and PEFT as their documentation shows them; of this project there are only the
reader of the data files, the metrics and the measure of memory, so that both sides read and count the same.

default: fp32, batches as they come, PyTorch's AdamW, padded to each batch's longest.
best:    batches of like length, fused AdamW; fp32, or bf16 by autocast.
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
    set_seed,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from tasks import TASKS
from tasks.base import Example, Task
from tasks.metrics import METRICS
from tasks.reader import read_examples
from training.memory import memory_once_imported, peak_memory_mib
from training.precision import choose_device

WEIGHT_DECAY, WARMUP, MAX_NORM = 0.01, 0.1, 1.0  # the defaults of train.py
HEAD_DROPOUT = 0.3


class SentenceModel(nn.Module):
    """An encoder, the mean of its hidden states, dropout and a linear head."""

    def __init__(self, encoder: nn.Module, hidden_size: int, num_outputs: int):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(HEAD_DROPOUT)
        self.head = nn.Linear(hidden_size, num_outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """three times [B, T] -> [B, C]"""
        inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, **inputs).last_hidden_state  # [B, T, H]
        mask = attention_mask.unsqueeze(-1)  # [B, T, 1]
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # [B, H]
        return self.head(self.dropout(pooled))


def build_model(folder: Path, method: str, num_outputs: int, rank: int, lora_dropout: float) -> SentenceModel:
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    hidden_size = encoder.config.hidden_size
    if method != "full":
        encoder = get_peft_model(
            encoder,
            LoraConfig(
                r=rank,
                lora_alpha=2 * rank,
                lora_dropout=lora_dropout,
                target_modules=["query", "key", "value", "dense"],
                use_dora=method == "dora",
            ),
        )
    return SentenceModel(encoder, hidden_size, num_outputs)


def tokenized(tokenizer, examples: Sequence[Example], task: Task, max_length: int) -> list[dict]:
    """A dictionary for each example, as a data collator takes them."""
    sides = [list(side) for side in zip(*(example.texts for example in examples), strict=True)]
    encoded = tokenizer(*sides, truncation=True, max_length=max_length)
    label = int if task.is_classification else float
    return [
        {name: encoded[name][i] for name in encoded} | {"label": label(example.label)}
        for i, example in enumerate(examples)
    ]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [B, C]: cross-entropy over classes, the squared error of a score"""
    if logits.shape[1] > 1:
        return F.cross_entropy(logits.float(), labels)
    return F.mse_loss(logits.float().squeeze(1), labels)


def build_optimizer(model: nn.Module, lr: float, fused: bool) -> torch.optim.AdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=fused or None)


def build_loader(rows: list[dict], batch_size: int, collate, grouped: bool) -> DataLoader:
    lengths = [len(row["input_ids"]) for row in rows]
    sampler = LengthGroupedSampler(batch_size, lengths=lengths) if grouped else None
    return DataLoader(rows, batch_size, shuffle=not grouped, sampler=sampler, collate_fn=collate)


def train_epoch(
    model: SentenceModel, loader: DataLoader, optimizer, schedule, bf16: bool
) -> tuple[float, float]:
    """Seconds, and the mean loss of the steps."""
    model.train()
    device, total, started = model.head.weight.device, 0.0, time.perf_counter()
    for batch in loader:
        batch = batch.to(device)
        labels = batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(**batch)  # [B, C]
        loss = loss_of(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
    return time.perf_counter() - started, total / len(loader)


@torch.inference_mode()
def dev_score(
    model: SentenceModel, rows: list[dict], batch_size: int, collate, task: Task, bf16: bool
) -> float:
    model.eval()
    device, logits = model.head.weight.device, []
    for batch in DataLoader(rows, batch_size, collate_fn=collate):
        batch.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits.append(model(**batch.to(device)).float().cpu())
    found = torch.cat(logits).numpy()  # [n, C]
    predictions = found.argmax(axis=1) if task.is_classification else found[:, 0]
    labels = torch.tensor([row["label"] for row in rows]).numpy()
    return METRICS[task.metrics[0]](predictions, labels)


def train(given: argparse.Namespace) -> dict:
    importlib.import_module(
        "transformers.models.bert.modeling_bert"
    )  # which AutoModel imports when it is used
    start = memory_once_imported()
    set_seed(given.seed)
    task, best = TASKS[given.task], given.settings == "best"
    bf16 = given.precision == "bf16"
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rows = {}
    for split in ("train", "dev"):
        examples, _ = read_examples(given.data / task.files[split], task, labelled=True)
        rows[split] = tokenized(tokenizer, examples, task, given.max_length)
    model = build_model(given.model, given.method, task.num_outputs, given.rank, given.lora_dropout)
    if not task.is_classification:  # as train.py does
        nn.init.constant_(model.head.bias, sum(row["label"] for row in rows["train"]) / len(rows["train"]))
    collate = DataCollatorWithPadding(tokenizer)
    loader = build_loader(rows["train"], given.batch_size, collate, grouped=best)
    model = model.to(device := choose_device(given.device))
    optimizer = build_optimizer(model, given.lr, fused=best)
    steps = given.epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    seconds, losses, scores = [], [], []
    for _ in range(given.epochs):
        spent, loss = train_epoch(model, loader, optimizer, schedule, bf16)
        seconds.append(spent)
        losses.append(loss)
        scores.append(dev_score(model, rows["dev"], given.batch_size, collate, task, bf16))
    tokens = given.epochs * sum(len(row["input_ids"]) for row in rows["train"])
    return {
        "epoch_seconds": sum(seconds) / given.epochs,
        "tokens": tokens,
        "tokens_per_second": tokens / sum(seconds),
        "memory_above_start_mib": peak_memory_mib(device) - (start if device.type == "cpu" else 0),
        "dev": scores[-1],
        "loss": losses[-1],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "precision": given.precision,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, default="sts")
    parser.add_argument("--method", choices=("lora", "dora", "full"), default="lora")
    parser.add_argument("--settings", choices=("default", "best"), default="default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    json.dump(train(given), sys.stdout)


if __name__ == "__main__":
    main()
