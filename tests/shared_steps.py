"""Steps of several runs in fp64, and what they computed: in this process, or in each that torchrun starts.

    torchrun --nproc-per-node 2 tests/shared_steps.py MODEL DATA OUT

writes OUT/CASE-RANK.safetensors: the losses [steps], and the gradient of each step before it is clipped; and
OUT/threads-RANK: the names of the threads that are left in the end.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_runs import settings

from training.processes import ALONE, Processes, joined
from training.run import Run

STEPS = 20
SIAMESE = {"pair": "siamese", "features": "cosine"}
# The data has 24 rows: of batches of 23 the second is one row, for which there is work in one process alone.
CASES = {
    "lora": {"task": "sts", "method": "lora", "lora_dropout": 0.1, "batch_size": 7},
    "dora": {"task": "sst", "method": "dora", "batch_size": 23, "hidden_layers": 1},
    "frozen": {"task": "qqp", "method": "frozen", "encoder_dropout": None},
    "full": {"task": "sst+sts", "method": "full", "batch_size": 10, "lr": 1e-3},
    "alike": {"task": "sts", "method": "rslora", "order": "like-length", "pair": "siamese"},
    "features": {"task": "qqp", "method": "lora", "pair": "siamese", "features": "uv-diff-prod"},
    "pearson": {"task": "sts", "method": "lora", "loss": "pearson", **SIAMESE},
    "cosent": {"task": "sts", "method": "lora", "loss": "cosent", "batch_size": 23, **SIAMESE},
    "simcse": {"task": "qqp", "method": "lora", "loss": "simcse", **SIAMESE},
    "simcse-unsup": {"task": "sts", "method": "lora", "loss": "simcse-unsup", **SIAMESE},
    "contrastive": {"task": "qqp", "method": "lora", "loss": "contrastive", **SIAMESE},
    "by task": {"task": "sst+qqp+sts", "method": "lora", "adapters": "per-task", "lora_dropout": 0.1,
                "pair": "siamese", "batch_size": 5},
}  # fmt: skip
# Masks are each process's and each piece's own, so equality with the whole batch is without any.
NO_DROPOUT = {"dropout": 0.0, "encoder_dropout": 0.0, "lora_dropout": 0.0}
SHARED = {name: one | NO_DROPOUT for name, one in CASES.items() if one.get("loss") != "simcse-unsup"}


def steps(model: Path, data: Path, changes: dict, processes: Processes = ALONE) -> dict[str, torch.Tensor]:
    """What each step computed; all that trains is updated as in a run."""
    defaults = {"encoder_dropout": 0.1, "dropout": 0.3, "epochs": 20}
    trainer = Run(settings(model, data, **defaults | changes), processes=processes).trainer
    for _ in trainer.encode_training_data():
        pass
    trainer.model.double().train()
    trainer.model.bert.compute_dtype = torch.float64
    for one in trainer.plan.datasets.values():
        if one.features is not None:
            one.features.vectors = one.features.vectors.double()
    found = {"loss": [], "tokens": []}
    for step in range(STEPS):
        clip = trainer._clip

        def kept(task: str, clip=clip, step=step) -> float:
            named = trainer.model.named_parameters()
            found[f"{step} {task}"] = torch.cat([p.grad.flatten() for _, p in named if p.grad is not None])
            return clip(task)

        trainer._clip = kept
        line = trainer.step()
        trainer._clip = clip
        found["loss"].append(line["loss"])
        found["tokens"].append(line["tokens"])
    return found | {name: torch.tensor(found[name], dtype=torch.float64) for name in ("loss", "tokens")}


def main() -> None:
    model, data, out = map(Path, sys.argv[1:])
    with joined("cpu") as processes:
        for name, changes in SHARED.items():
            found = steps(model, data, changes, processes)
            save_file(found, out / f"{name}-{processes.rank}.safetensors")
    threads = "".join(sorted(name.read_text() for name in Path("/proc/self/task").glob("*/comm")))
    (out / f"threads-{processes.rank}").write_text(threads)


if __name__ == "__main__":
    main()
