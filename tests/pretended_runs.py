"""Whole runs on the pretended device: `python tests/pretended_cuda.py -m pytest tests/pretended_runs.py`.

Not found by pytest on its own: `test_pretended_cuda.py` starts it in a process that has the device.
"""

import signal
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_costs import BUDGETS, CASES, cost_of, exceeded, model_and_data
from pretended_device import COUNTS, CUDA, Pretended
from small_runs import call, column, flags, lines_of, settings
from stopped_runs import stopping
from tolerances import TOLERANCE
from torch import Tensor, nn

import predict
import train
from kernels.dropout import install_dropout, seed_generator
from kernels.lora_down import lora_down
from minibert.attention import SelfAttention, fused_attention
from minibert.layers import apply_all
from minibert.sequences import Sequences
from training import loop
from training.embedding import Encoder
from training.run import Run

STILL = {"dropout": 0.0, "encoder_dropout": 0.0}
DROPPING = {"dropout": 0.3, "encoder_dropout": 0.1}
SIDES = {"pair": "siamese", "features": "cosine"}
SAME_BITS = {
    "frozen": {"method": "frozen"},
    "full": {"method": "full", "pooling": "pooler"},
    "lora": {"method": "lora", "pooling": "mean"},
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora", "pooling": "mean"},
    "siamese": {"pair": "siamese", "hidden_layers": 1},
    "cross-entropy": {"task": "sst"},
    "pearson": {"loss": "pearson"},
    "cosent": {"loss": "cosent"},
    "cosine": {"loss": "cosine", **SIDES},
    "contrastive": {"loss": "contrastive", "task": "qqp", **SIDES},
    "simcse": {"loss": "simcse", **SIDES},
    "three tasks": {"task": "sst+qqp+sts"},
    "an adapter each": {"task": "sst+qqp+sts", "method": "lora", "adapters": "per-task", "pooling": "mean"},
    "recompute": {"recompute": True},
    "micro-batches": {"micro_batch_size": 3},
}
# Without dropout, in half precision: a CPU computes bf16's low-rank products otherwise, and has no fp16.
NEAR = {"fp16": torch.float16, "bf16": torch.bfloat16}
WITH_DROPOUT = {
    "merged": {"method": "lora"},
    "split": {"method": "lora", "lora_dropout": 0.1},
    "split dora": {"method": "dora", "lora_dropout": 0.1, "precision": "bf16"},
    "simcse-unsup": {"loss": "simcse-unsup", "lora_dropout": 0.1, **SIDES},
    "an adapter each": {"task": "sst+sts", "adapters": "per-task", "lora_dropout": 0.1},
    "recompute": {"lora_dropout": 0.1, "recompute": True},
    "micro-batches": {"lora_dropout": 0.1, "micro_batch_size": 3},
}


def losses(tiny: Path, data: Path, device: str, steps: int = 2, **changes: object) -> list[float]:
    """The losses and the norms of the gradients of a run's first steps."""
    trainer = Run(settings(tiny, data, device=device, **changes)).trainer
    trainer.model.train()
    for _ in trainer.encode_training_data():
        pass
    trainer.compile_kernels()  # which leaves no trace
    lines = [trainer.step() for _ in range(steps)]
    return [line[name] for line in lines for name in ("loss", "grad_norm")]


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's attention as a GPU's: the form by hand sums in another order, so its last bits differ.

    That the two forms are equal within a tolerance is tests/test_minibert_attention.py's claim.
    """

    def forward(self: SelfAttention, x: Tensor, sequences: Sequences) -> Tensor:
        q, k, v = apply_all((self.query, self.key, self.value), x)
        dropout = self.dropout.p if self.dropout.training else 0.0
        return fused_attention(q, k, v, sequences, self.num_heads, dropout)

    monkeypatch.setattr(SelfAttention, "forward", forward)


@pytest.mark.usefixtures("fused_everywhere")
@pytest.mark.parametrize("case", SAME_BITS)
def test_a_run_is_the_cpus_to_the_bit(case: str, tiny: Path, small_data: Path) -> None:
    changes = SAME_BITS[case] | STILL
    if changes.get("method") not in ("frozen", "full"):
        changes["rank"] = 4  # up to 16 ranks in all, layers share a pass over x as they do on a CPU
    got, wanted = (losses(tiny, small_data, device, **changes) for device in ("cuda", "cpu"))
    if case == "cosent":  # a GPU sums over all pairs, a CPU over those it has selected
        wanted = pytest.approx(wanted, rel=TOLERANCE[torch.float32, "layer"])
    assert got == wanted


@pytest.mark.parametrize("precision", NEAR)
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_half_precision_is_near_the_cpus_fp32(
    method: str, precision: str, tiny: Path, small_data: Path
) -> None:
    got = losses(tiny, small_data, "cuda", 1, precision=precision, method=method, **STILL)
    wanted = losses(tiny, small_data, "cpu", 1, method=method, **STILL)
    assert got == pytest.approx(wanted, rel=TOLERANCE[NEAR[precision], "encoder"])


@pytest.mark.parametrize("case", WITH_DROPOUT)
def test_equal_runs_with_dropout_have_equal_losses(case: str, tiny: Path, small_data: Path) -> None:
    """To the bit, finite and moving. Nothing here seeds PyTorch's generators: a run's seed must be enough."""
    changes = WITH_DROPOUT[case] | DROPPING
    found = losses(tiny, small_data, "cuda", **changes)
    assert found == losses(tiny, small_data, "cuda", **changes)
    assert np.isfinite(found).all()
    assert len(set(found)) == len(found)
    if case == "recompute":
        assert found == losses(tiny, small_data, "cuda", **changes | {"recompute": False})


def test_each_piece_of_each_step_seeds_the_generator_for_itself(tiny: Path, small_data: Path) -> None:
    seeded = []

    def seen(device: torch.device, *numbers: int) -> None:
        seeded.append(numbers)
        seed_generator(device, *numbers)

    with patch.object(loop, "seed_generator", seen):
        losses(tiny, small_data, "cuda", 2, micro_batch_size=3, **DROPPING)
    # The first step is done twice: to compile the kernels, and to train.
    assert seeded == [(0, 0, step, piece) for step in (0, 0, 1) for piece in (0, 1, 2)]


def test_another_seed_rank_step_and_piece_have_other_masks() -> None:
    model, x, drawn = nn.Sequential(nn.Dropout(0.5)), torch.ones(64, device="cuda"), []
    install_dropout(model, 0)
    for numbers in product((0, 1), repeat=4):
        seed_generator(CUDA, *numbers)
        drawn += [tuple(model(x).tolist()) for _ in range(2)]
    assert len(set(drawn)) == 32


@pytest.mark.parametrize("kind", ["lora", "fp16", "an adapter each"])
def test_a_trained_run_is_resumed_and_used(kind: str, tiny: Path, small_data: Path, tmp_path: Path) -> None:
    """Stopped after its second step and gone on with it has the same losses; then it predicts and embeds."""
    changes = {
        "lora": {"method": "lora", "lora_dropout": 0.1, "task": "sst"},
        "fp16": {"method": "dora", "precision": "fp16", "task": "sst"},
        "an adapter each": {"task": "sst+sts", "method": "lora", "adapters": "per-task"},
    }[kind]
    arguments = {"device": "cuda", "epochs": 1, "max_steps": 4, **changes}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(train.main, *flags(tiny, small_data, out=whole, **arguments)).code == 0
    with stopping(2, signal.SIGTERM):
        assert call(train.main, *flags(tiny, small_data, out=parts, **arguments)).code == 143
    ended = call(train.main, *flags(tiny, small_data, out=parts, resume=True, **arguments))
    assert ended.code == 0, ended.err
    told = [[line["loss"] for line in lines_of(out / "steps.jsonl")] for out in (whole, parts)]
    assert told[0] == told[1]
    if kind == "lora":
        vectors = [
            Encoder.load(whole, "fp32", where).encode(["a good film", "bad"]) for where in ("cuda", "cpu")
        ]
        near = dict.fromkeys(("rtol", "atol"), TOLERANCE[torch.float32, "encoder"])
        np.testing.assert_allclose(*vectors, **near)
    task = ["--task", "sst"] if kind == "an adapter each" else []
    dev, scored = small_data / "ids-sst-dev.csv", tmp_path / "scored.csv"
    ended = call(predict.main, whole, "--input", dev, "--output", scored, *task, "--device", "cuda")
    assert ended.code == 0, ended.err
    assert len(column(scored, "prediction")) == 10


def test_a_tensor_on_the_cpu_among_the_devices_is_noticed(tiny: Path, small_data: Path) -> None:
    stays = patch.object(Sequences, "holding", lambda self, tensors: self)
    with stays, pytest.raises(RuntimeError, match="to be on the same device"):
        losses(tiny, small_data, "cuda")


def test_a_kernel_refuses_a_tensor_on_the_cpu() -> None:
    x = torch.ones(16, 8, device="cuda", dtype=torch.float16)
    assert isinstance(lora_down(x, torch.ones(4, 8, device="cuda")), Pretended)
    with pytest.raises(ValueError, match="cannot be accessed"):
        lora_down(x, torch.ones(4, 8))


def test_waits_and_copies_are_counted_by_place() -> None:
    COUNTS.clear()
    here = torch.arange(3.0).to("cuda")
    (copy,) = COUNTS.copies
    assert here.device == CUDA
    assert not COUNTS.waits
    here.sum().item()
    (wait,) = COUNTS.waits
    assert copy.startswith("tests/pretended_runs.py:")
    assert wait.startswith("tests/pretended_runs.py:")
    COUNTS.clear()
    torch.arange(3.0).pin_memory().to("cuda", non_blocking=True)
    assert not COUNTS.copies | COUNTS.waits


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return model_and_data(tmp_path_factory.mktemp("six"))


@pytest.mark.parametrize("case", CASES)
def test_a_step_keeps_to_its_budget(case: str, six_layers: tuple[Path, Path]) -> None:
    cost = cost_of(*six_layers, CASES[case])
    print(f"{case}: {cost}, budget {BUDGETS[case]}")
    assert not exceeded(cost, BUDGETS[case]), [COUNTS.launches, COUNTS.copies, COUNTS.waits]


@pytest.mark.parametrize(
    ("planted", "found"),
    [(lambda h: h + 0, "launches"), (lambda h: h * h.sum().item(), "waits"),
     (lambda h: h + torch.zeros(1).to(h), "copies")],
    ids=["launch", "wait", "copy"],
)  # fmt: skip
def test_what_is_added_to_a_step_is_counted(planted, found: str, six_layers: tuple[Path, Path]) -> None:
    gelu = F.gelu
    with patch.object(F, "gelu", lambda h: planted(gelu(h))):
        cost = cost_of(*six_layers, CASES["lora"])
    assert found in str(exceeded(cost, cost_of(*six_layers, CASES["lora"])))
