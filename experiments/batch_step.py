"""What a training step on the longest examples takes: `measure_apart(config, batch)`.

`python -m experiments.batch_step CONFIG.json` prints it as JSON, in a fresh process: a peak never falls.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from minibert.errors import InputError
from training.config import Config, from_dict, to_dict
from training.exit import run_command

STEPS = 2  # the second has AdamW's moments from the start
OUT_OF_MEMORY = "out of memory"


def measure_apart(config: Config, size: int) -> dict:
    """The fields of `experiments.batch_size.Step`.

    Raises:
        InputError: with the process's last line, if it fails by anything but memory.
    """
    from minibert.files import write_json

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        write_json(to_dict(replace(config, batch_size=size, max_steps=STEPS)), path)
        command = [sys.executable, "-m", "experiments.batch_step", str(path)]
        root = Path(__file__).parents[1]
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if ended.returncode == 0:
        return json.loads(ended.stdout.splitlines()[-1])
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("error: ")
    # The system ends by SIGKILL what takes more than there is.
    if OUT_OF_MEMORY in last or ended.returncode == -9:
        return {"tokens": 0, "peak": 0.0, "examples_per_second": 0.0, "fits": False}
    raise InputError(f"a batch of {size}: {last}")


def measure(config: Config) -> dict:
    import numpy as np

    from training.memory import peak_memory_mib
    from training.run import Run

    run = Run(config)
    trainer, data = run.trainer, run.data["train"]

    longest = {
        name: one.longest_first(np.arange(len(one)))[: config.batch_size] for name, one in data.items()
    }
    if not trainer.together:  # a step is one task's
        name = max(longest, key=lambda name: data[name].lengths(longest[name]).sum())
        longest = {name: longest[name]}
    pieces = trainer.plan.pieces(longest)
    trainer.plan.pieces_of = lambda step, without=(): pieces
    trainer.model.train()
    for _ in range(STEPS):
        line = trainer.step()
    return {
        "tokens": line["tokens"],
        "peak": peak_memory_mib(run.device),
        "examples_per_second": sum(map(len, longest.values())) / trainer.step_seconds,
    }


def examples_in(config: Config) -> int:
    """Training examples of the largest task."""
    from training.build import read_splits

    return max(len(one.train) for one in read_splits(config).values())


def memory_of(device: str) -> float:
    """MiB: all of a GPU's, or what the system and this process's group have available.

    Raises:
        InputError: where the system does not say; --memory does.
    """
    import torch

    from training.precision import choose_device

    chosen = choose_device(device)
    if chosen.type == "cuda":
        return torch.cuda.get_device_properties(chosen).total_memory / 2**20
    available = available_mib()
    if available is None:
        raise InputError("--memory: expected GiB, as this system does not say what it has")
    return available


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


def main() -> int:
    path = Path(sys.argv[1])
    print(json.dumps(measure(from_dict(json.loads(path.read_text()), str(path)))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
