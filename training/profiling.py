"""Where a training step's time goes, by PyTorch's profiler: no part of what a run computes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function

from minibert.errors import InputError
from minibert.files import replacing, write_text

WARM_UP = 5  # steps that are not looked at: libraries choose and keep their kernels in the first
ROWS = 30  # of a table
MODULE = "module "  # what stands before a module's name


class StepProfile:
    """Writes FOLDER/profile.txt and FOLDER/trace.json once `steps` steps after a warm-up are done.

    The text has the operators by their own time, and the model's modules on the way forward, the layers taken
    together; chrome://tracing and ui.perfetto.dev open the trace. Looking takes time itself, so the shares
    count more than the milliseconds. Of a run or an epoch that ends earlier it is what there was, as scoring
    is no step; 0 steps are none.

    Raises:
        InputError: if a run of `total` steps is over before there is one to look at.
    """

    def __init__(self, steps: int, model: nn.Module, folder: Path, total: int):
        if steps and total <= WARM_UP:
            raise InputError(f"--profile: expected a run of more than {WARM_UP} steps, this one has {total}")
        self.steps, self.model, self.folder = steps, model, folder
        self.waited = self.looked = 0
        self.profiler: profile | None = None
        self.opened = ExitStack()

    def step(self, ends_epoch: bool) -> None:
        """After each training step."""
        if self.profiler:
            self.looked += 1
            if self.looked == self.steps or ends_epoch:
                self._write()
        elif self.looked < self.steps:
            self.waited += 1
            if self.waited >= WARM_UP and not ends_epoch:
                activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
                self.opened.enter_context(named_modules(self.model))
                self.profiler = self.opened.enter_context(profile(activities=activities))

    def _write(self) -> None:
        self.opened.close()
        profiler, self.profiler, self.steps = self.profiler, None, 0
        if profiler and self.looked:
            write_text(tables(profiler.key_averages(), self.looked), self.folder / "profile.txt")
            with replacing(self.folder / "trace.json") as temporary:
                profiler.export_chrome_trace(str(temporary))

    def __enter__(self) -> "StepProfile":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()


@contextmanager
def named_modules(model: nn.Module) -> Iterator[None]:
    """Inside, each module's forward is a range of the profile: `module bert.encoder.layer.*.output`"""
    handles, ranges = [], []

    def begin(name: str) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    for path, module in model.named_modules():
        name = MODULE + (re.sub(r"\.\d+(?=\.|$)", ".*", path) or "model")
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        handles.append(module.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tables(events: EventList, steps: int) -> str:
    """Operators by their own time, modules by all that they call; of a step, as shares of the former."""
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = {one.key: (getattr(one, own), one.count) for one in events if not one.key.startswith(MODULE)}
    modules = {
        one.key.removeprefix(MODULE): (one.cpu_time_total, one.count)
        for one in events
        if one.key.startswith(MODULE)
    }
    total = sum(spent for spent, _ in operators.values())
    parts = [f"{steps} steps of {total / steps / 1e3:.1f} ms in operators\n"]
    for title, rows in (("operator, by its own time", operators), ("module, forward", modules)):
        parts.append(_table(title, rows, total, steps))
    return "\n".join(parts)


def _table(title: str, rows: Mapping[str, tuple[float, int]], total: float, steps: int) -> str:
    """name -> microseconds and calls of all steps"""
    lines = [f"{'share':>6}  {'ms/step':>9}  {'calls/step':>10}  {title}\n"]
    most = sorted(rows.items(), key=lambda row: -row[1][0])
    for name, (spent, count) in most[:ROWS]:
        lines.append(f"{spent / total:6.1%}  {spent / steps / 1e3:9.3f}  {count / steps:10.1f}  {name}\n")
    rest = sum(spent for _, (spent, _) in most[ROWS:])
    if rest:
        lines.append(f"{rest / total:6.1%}  {rest / steps / 1e3:9.3f}  {'':10}  {len(most) - ROWS} others\n")
    return "".join(lines)
