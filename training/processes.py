"""The processes of a run: one, or as many as `torchrun` has started, which agree by gloo or NCCL.

Data parallel: each has the whole model and a share of each batch (`tasks.share`), and the sum of their
gradients is what one process would have. It is summed here, by one all_reduce a step over what trains, and
not by DistributedDataParallel: of LoRA that is a megabyte, a step's heads differ from step to step, and so
the loop stays the same for one process and for many.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import Tensor

from minibert.errors import InputError
from training.errors import TrainingError

PATIENCE = timedelta(minutes=30)  # for the others; one that dies is known at once
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")  # that torchrun puts into the environment


@dataclass(frozen=True)
class Processes:
    """This process's place among the run's; on its own by default."""

    rank: int = 0
    count: int = 1

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def mine(self, items: Iterable) -> Iterator:
        """Of what all have in the same order, every `count`-th from `rank` on."""
        return (item for i, item in enumerate(items) if i % self.count == self.rank)

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over all processes, in place.

        Raises:
            TrainingError: if one of them has ended.
        """
        if not self.alone:
            there = tensor.to(device_of_group())  # itself, but for what is scored on a GPU
            with others_there(self):
                dist.all_reduce(there)
            tensor.copy_(there)
        return tensor

    def largest(self, value: int) -> int:
        """Of the numbers that the processes have, the largest; all have called this before any goes on."""
        if self.alone:
            return value
        told = torch.tensor(value, device=device_of_group())
        with others_there(self):
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """What is inside is done by the first process, then by the others, who find what it has fetched."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def check_same(self, told: object) -> None:
        """Raises:
        InputError: if another process was told something else; by a checksum of its JSON.
        """
        checksum = zlib.crc32(json.dumps(told, sort_keys=True).encode())
        if self.largest(checksum) != checksum or self.largest(-checksum) != -checksum:
            raise InputError(
                f"process {self.rank} of {self.count}: expected the settings, data and model of the other "
                "processes, got others"
            )

    def place(self, value: float) -> Tensor:
        """[count], zeros but for this process's own; their sum has the value of each."""
        values = torch.zeros(self.count, device="cpu" if self.alone else device_of_group())
        values[self.rank] = value
        return values

    def sum_all(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its sum over all processes, in place, by one all_reduce."""
        if self.alone:
            return
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Processes()


@contextmanager
def others_there(processes: Processes) -> Iterator[None]:
    """Raises:
    TrainingError: if what happens inside fails for want of another process.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        this, reason = f"process {processes.rank} of {processes.count}", " ".join(str(error).split())[:200]
        said = "another process of the run has ended or does not answer"
        raise TrainingError(f"{this}: {said} ({reason})") from None


def not_from_torchrun(environment: Mapping[str, str]) -> list[str]:
    """The variables that are not what torchrun sets: a rank beyond the others would wait for ever."""
    given = {name: environment.get(name, "") for name in NUMBERS}
    numbers = {name: int(text) for name, text in given.items() if text.isdecimal()}
    least = {"WORLD_SIZE": 1, "MASTER_PORT": 1}
    most = {"RANK": numbers.get("WORLD_SIZE", math.inf) - 1, "MASTER_PORT": 2**16 - 1}
    wrong = [
        name
        for name in NUMBERS
        if name not in numbers or not least.get(name, 0) <= numbers[name] <= most.get(name, math.inf)
    ]
    return wrong + ([] if environment.get("MASTER_ADDR") else ["MASTER_ADDR"])


def device_of_group() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that torchrun has started; `device` is the run's, or auto.

    Raises:
        InputError: if torchrun has not said all that it does, or there is no GPU for each process.
        TrainingError: if another has ended before it has done all that it has to.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if count == "1":
        yield ALONE
        return
    wrong = not_from_torchrun(os.environ)
    if wrong:
        raise InputError(
            f"WORLD_SIZE is {count!r}, but {', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what "
            "torchrun sets: start several processes by torchrun --nproc-per-node N train.py ..."
        )
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and ":" in device:
        raise InputError(f"--device {device}: expected cuda; torchrun gives each process a GPU of its own")
    if on_gpu:
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise InputError(f"torchrun: expected a GPU for each process of a machine, got {there} GPUs")
        torch.cuda.set_device(local)
    # `torch.distributed.nn` is imported above though nothing here uses it. The first optimizer imports it,
    # and the group of that time stays for ever, as its functions' default argument: gloo's threads outlive
    # destroy_process_group, and one that frees a tensor while Python ends aborts the process.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    processes = Processes(dist.get_rank(), dist.get_world_size())
    yield processes
    # Only where all goes well: none ends well before the first has written all, and one that fails leaves
    # without a word to the others (`training.exit.leave`).
    last = torch.zeros(1, device=device_of_group())
    with others_there(processes):
        dist.all_reduce(last)
    # `last` outlives the group. In PyTorch 2.6 the end of the group holds the interpreter's lock and
    # joins gloo's thread; if that thread is the one to free the last tensor, it waits for the same lock.
    dist.destroy_process_group()
