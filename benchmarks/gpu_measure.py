"""What benchmarks.gpu_day measures, in a process of its own: item after item.

`facts`, `losses:lora`, `ceilings:bf16` and `steps:bert-base:mixed:bf16:lora:ours` are items. A line of JSON
for each is added to the file that GPU_DAY_ROWS names. Nothing is caught here: an item that fails ends the
process, and gpu_day starts another one for the items that are left.
"""

import argparse
import faulthandler
import gc
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_tests import write
from benchmarks.models import product_weights, write_random_weights
from benchmarks.step import RandomIds, build_trainer
from kernels.timing import CudaTimer, Timer, Timing, sustained
from minibert.errors import InputError
from minibert.model import BertConfig
from minibert.weights import read_config
from training.config import Config, check
from training.machine import cores, cpu
from training.memory import peak_memory_mib
from training.precision import DTYPES, choose_precision

CPU = torch.device("cpu")
ITEM_LIMIT = 90  # seconds of one item; a GPU that hangs must not cost the others
PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "pytest")
SHAPES = {
    "bert-base": BertConfig(),
    "MiniLM": BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536),
    "tiny": BertConfig(2000, 32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64),
}
# Small, but its weights are large enough that a wrong update shows in the next loss.
LOSS_SHAPE, LOSS_STD = BertConfig(2000, 128, 4, 4, 512), 0.1
LOSS_STEPS, LOSS_TOLERANCE = 10, 1e-4  # noise in the last bit moves a loss by 1e-6, an alpha 1 % off by 2e-3
METHODS = {"lora": ("lora", 0.0), "lora-dropout": ("lora", 0.1), "dora": ("dora", 0.0), "full": ("full", 0.0)}
FLOPS = {"full": 6}  # of matrix products for each weight and token; 4 where weights get no gradient
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # the host waits in these


class Scale(NamedTuple):
    """How large and how often."""

    batch: int
    length: int
    warm_up: int  # steps before the clock starts
    blocks: int  # the time of a step is the median over blocks
    steps: int  # in each block
    width: int  # of the matrices whose product gives a ceiling
    copied: int  # bytes of the copy that gives the other


REAL = Scale(batch=32, length=128, warm_up=8, blocks=7, steps=5, width=8192, copied=2**30)
TINY = Scale(batch=4, length=16, warm_up=1, blocks=2, steps=1, width=64, copied=2**16)


class Meter:
    """The clock, the memory and the profile of a GPU; a CPU has the same methods, so that tests run them."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        self.wait()
        started = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - started) / times

    def start_peak(self) -> float:
        """MiB held now; peak_memory_mib counts from here on a GPU, and from the start on a CPU."""
        gc.collect()  # what earlier items leave in cycles is not ours
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return peak_memory_mib(self.device)

    def timer(self, repeats: int) -> Timer:
        if self.cuda:
            return CudaTimer(repeats, self.device)
        return lambda calls: [Timing(one, one) for one in (self.seconds(call, repeats) for call in calls)]

    def profile(self, step: Callable[[], object], steps: int = 3) -> dict[str, object]:
        """Of a step: kernels and copies launched, the time they take, and how often the host waits."""
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda]
        try:
            with profile(activities=activities) as profiler:
                for _ in range(steps):
                    step()
                self.wait()
        except RuntimeError as error:  # the times that are measured already are worth more than its counts
            return {"profile failed": str(error)}
        return counts(profiler.events(), "CUDA" if self.cuda else "CPU", steps)


def counts(events: Sequence, device: str, steps: int) -> dict[str, float]:
    """Nothing where the profiler saw nothing of the device, as without the right to read its counters.

    `time_range` and `device_type` have kept their names from torch 2.6 to 2.13; `cuda_time` has not. Only
    operations that call no other count, so that a CPU's are counted once.
    """
    work = [
        event
        for event in events
        if event.device_type.name == device
        and not event.cpu_children
        and not getattr(event, "is_user_annotation", False)
    ]
    if not work:
        return {}
    kernels = [event for event in work if not event.name.startswith(("Memcpy", "Memset"))]
    return {
        "launches": len(kernels) / steps,
        "copies": (len(work) - len(kernels)) / steps,
        "gpu_ms": sum(event.time_range.elapsed_us() for event in work) / 1e3 / steps,
        "waits": sum(event.name.split("_")[0] in WAITS for event in events) / steps,  # some end in _v3020
    }


class Place(NamedTuple):
    """Where items are measured, at which scale, and the folder for models."""

    device: torch.device
    scale: Scale
    scratch: Path

    def model(self, name: str, config: BertConfig, std: float = 0.02) -> Path:
        """A folder of random weights, written once."""
        folder = self.scratch / name
        if not folder.exists():
            unfinished = self.scratch / f"{name}.{os.getpid()}"
            write_random_weights(unfinished, config, std=std).rename(folder)
        return folder


def facts(place: Place) -> dict[str, object]:
    """Versions, the machine and, if there is one, its card."""
    found: dict[str, object] = {name: version(name) for name in PACKAGES}
    compilers = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    found |= {
        "python": platform.python_version(),
        "C compiler": compiler or "none: Triton cannot launch its kernels",
        "cpu": cpu(),
        "cores": cores(),
        "commit": said_by("git", "rev-parse", "HEAD"),
    }
    if place.device.type != "cuda":
        return found | {"card": f"no GPU: {cpu()}"}
    card = torch.cuda.get_device_properties(place.device)
    return found | {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "CUDA": torch.version.cuda,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def said_by(*command: str) -> str:
    """The first line of what a program says, or why it says nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return (done.stdout or done.stderr or "nothing").splitlines()[0].strip()


def losses(place: Place, method: str) -> dict[str, object]:
    """The same steps in fp32 on the device and on a CPU, from the same weights and without dropout."""
    folder = place.model("losses", LOSS_SHAPE, LOSS_STD)
    still = {"dropout": 0.0, "encoder_dropout": 0.0, "precision": "fp32", "max_steps": LOSS_STEPS}
    size = {"max_length": place.scale.length, "batch_size": 8}
    config = check(Config(task="sts", method=method, pooling="mean", **still, **size))
    found = []
    for device in (place.device, CPU):
        trainer = build_trainer(config, folder, device, mixed(8, place.scale.length))
        trainer.model.train()
        for _ in trainer.encode_training_data():
            pass
        found.append([trainer.step()["loss"] for _ in range(LOSS_STEPS)])
    return compared(*found)


def compared(ours: Sequence[float], cpu: Sequence[float]) -> dict[str, object]:
    """The largest difference of a step's losses, as a part of the CPU's; a NaN agrees with nothing."""
    difference = float(np.max(np.abs(np.subtract(ours, cpu)) / np.abs(cpu)))
    verdict = "agree" if difference <= LOSS_TOLERANCE else "DIFFER"
    result = {"difference": difference, "allowed": LOSS_TOLERANCE, "verdict": verdict, "steps": len(cpu)}
    return result | {"losses": " ".join(f"{loss:.6g}" for loss in ours), "first": cpu[0], "last": cpu[-1]}


def ceilings(place: Place, precision: str) -> dict[str, float]:
    """What the device sustains: bytes of a large copy, read and written, and FLOPs of a large product."""
    width = place.scale.width // (2 if precision == "fp32" else 1)
    dtype = DTYPES[choose_precision(precision, place.device, BertConfig()).precision]
    timer = Meter(place.device).timer(10)
    found = sustained(timer, place.device, dtype, place.scale.copied, width)
    return {"copy_gb_per_s": found.bandwidth / 1e9, "tflop_per_s": found.products / 1e12}


class Case(NamedTuple):
    """A training step that both sides take."""

    folder: Path
    lengths: list[int]
    precision: str
    method: str
    dropout: float


def mixed(batch: int, length: int) -> list[int]:
    """Lengths from a quarter of the longest to the longest."""
    return np.random.default_rng(0).integers(max(3, length // 4), length + 1, batch).tolist()


def steps(
    place: Place, model: str, lengths: str, precision: str, method: str, side: str
) -> dict[str, object]:
    """Time, memory and profile of one side's training step; what compiles does so before the clock starts."""
    batch, length = place.scale.batch, place.scale.length
    choose_precision(precision, place.device, SHAPES[model])  # or it says that this device has none
    folder = place.model(model, SHAPES[model])
    shape = {"equal": [length] * batch, "mixed": mixed(batch, length)}[lengths]
    case = Case(folder, shape, precision, *METHODS[method])
    meter = Meter(place.device)
    before = meter.start_peak()
    step, about = {"ours": our_step, "peer": peer_step}[side](case, place.device)
    first = meter.seconds(step)
    meter.seconds(step, place.scale.warm_up)
    times = [1e3 * meter.seconds(step, place.scale.steps) for _ in range(place.scale.blocks)]
    peak = peak_memory_mib(place.device) - before
    flops = FLOPS.get(case.method, 4) * product_weights(folder) * sum(shape)
    result = {"step_ms": median(times), "lowest_ms": min(times), "highest_ms": max(times)}
    result |= {"peak_mib": peak, "first_step_s": first, "tokens": sum(shape), "tflop": flops / 1e12}
    return result | meter.profile(step) | about


def our_step(case: Case, device: torch.device) -> tuple[Callable[[], object], dict[str, object]]:
    size = {"max_length": max(case.lengths), "batch_size": len(case.lengths), "max_steps": 10_000}
    same = {"method": case.method, "precision": case.precision, "lora_dropout": case.dropout}
    config = check(Config(task="sts", pooling="mean", **size, **same))
    trainer = build_trainer(config, case.folder, device, case.lengths)
    trainer.model.train()
    return trainer.step, {}


def peer_step(case: Case, device: torch.device) -> tuple[Callable[[], object], dict[str, object]]:
    """transformers with PEFT in a fast loop: SDPA, autocast, fused AdamW, no wait for a loss."""
    from benchmarks import peer

    model = peer.build_model(case.folder, case.method, 1, 8, case.dropout).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = peer.build_optimizer(model, 1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
    autocast = {"dtype": DTYPES[case.precision], "enabled": case.precision != "fp32"}
    *inputs, labels = padded(case)

    def step() -> None:
        ids, mask, types, wanted = (tensor.to(device) for tensor in (*inputs, labels))
        with torch.autocast(device.type, **autocast):
            logits = model(ids, mask, types)  # [B, 1]
        scaler.scale(peer.loss_of(logits, wanted)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, peer.MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step, {"attention": getattr(model.encoder.config, "_attn_implementation", "unknown")}


def padded(case: Case) -> tuple[torch.Tensor, ...]:
    """Ids, mask and token types [B, T], labels [B]: what a data loader hands to the loop"""
    vocabulary = read_config(case.folder).vocab_size
    rows = [
        torch.tensor(one.input_ids) for one in RandomIds(case.lengths, vocabulary)([""] * len(case.lengths))
    ]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask, torch.zeros_like(ids), torch.tensor([5.0 * (i % 2) for i in range(len(rows))])


PARTS = {"facts": facts, "losses": losses, "ceilings": ceilings, "steps": steps}


def measure(item: str, place: Place) -> dict[str, object]:
    part, *words = item.split(":")
    try:
        return PARTS[part](place, *words)
    except InputError as error:  # a precision that the device does not have
        return {"skipped": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_measure", description=__doc__)
    parser.add_argument("items", nargs="+")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--until", type=float, default=math.inf, help="start no item that may end later")
    parser.add_argument("--tiny", action="store_true", help="in small, on a CPU")
    options = parser.parse_args()
    device = CPU if options.tiny else torch.device("cuda")
    place = Place(device, TINY if options.tiny else REAL, options.scratch)
    took = 0.0
    for item in options.items:
        began = time.time()
        if began + took > options.until:
            break  # the next one would be cut off halfway, if it takes as long as the last
        faulthandler.dump_traceback_later(ITEM_LIMIT, exit=True)
        result = measure(item, place)
        write(item=item, **result)
        took = time.time() - began
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
