"""A run watched live, in TensorBoard or Weights & Biases: no part of what it computes. Imports no torch."""

import importlib
import importlib.util
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from minibert.errors import InputError
from minibert.files import write_text
from training.config import Config, to_dict

IMPORTED = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
OFFLINE = ("offline", "dryrun", "disabled")  # values of WANDB_MODE that need no account


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUN`.

    A resumed run hides what its predecessor logged after the checkpoint, and logs it again.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        indented = json.dumps(to_dict(config), indent=2).replace("\n", "\n    ")  # in Markdown: as it is
        self.writer.add_text("config", f"    {indented}", step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run at wandb.ai, or with WANDB_MODE=offline in the run's folder alone, for `wandb sync`.

    A resumed run goes on with the id that its predecessor left in the folder. The steps it does again are
    the very same, and W&B keeps the first.
    """

    def __init__(self, folder: Path, config: Config, step: int):
        self.wandb = importlib.import_module("wandb")
        identity = folder / "wandb" / "id.txt"
        if not (step and identity.is_file()):
            identity.parent.mkdir(exist_ok=True)
            write_text(secrets.token_hex(4), identity)
        try:
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "minibert"),
                id=identity.read_text(encoding="utf-8"),
                name=folder.absolute().name,
                dir=str(folder),
                config=to_dict(config),
                resume="allow",
                # What is logged is what this file says: no terminal, no source.
                settings=self.wandb.Settings(console="off", disable_git=True, save_code=False),
            )
        except self.wandb.Error as error:
            raise OSError(None, f"--track wandb: {error}; WANDB_MODE=offline needs no network") from None

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_ready(names: Sequence[str]) -> None:
    """Before anything is loaded; what the trackers import is no part of a run's own memory then.

    Raises:
        InputError: if a tracker's package is not installed, or W&B knows no account and is not offline.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder wandb/ where one stands is no package
            raise InputError(f"--track {name}: {name} is not installed: pip install {name}")
    for name in names:
        importlib.import_module(IMPORTED[name])
    if "wandb" in names and os.environ.get("WANDB_MODE") not in OFFLINE:
        wandb = importlib.import_module("wandb")
        try:
            wandb.login(verify=False)
        except wandb.Error as error:
            raise InputError(f"--track wandb: {error} Or set WANDB_MODE=offline.") from None


class Tracking:
    """Logs each step's and each epoch's line to all trackers, by the number of steps done.

    step/loss, step/lr, step/grad_norm (before clipping), step/tokens_per_second; epoch/loss and every
    metric as dev/TASK/METRIC and train/TASK/METRIC.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Config, step: int):
        self.trackers = [TRACKERS[name](folder, config, step) for name in dict.fromkeys(names)]

    def step(self, line: Mapping, seconds: float) -> None:
        values = {name: line[name] for name in ("loss", "lr", "grad_norm") if line[name] is not None}
        if seconds > 0:  # a clock may be coarser than a step
            values["tokens_per_second"] = line["tokens"] / seconds
        self._log({f"step/{name}": value for name, value in values.items()}, line["step"])

    def epoch(self, line: Mapping) -> None:
        values = {"epoch/loss": line["loss"]}
        for split, tasks in line["metrics"].items():
            for task, scores in tasks.items():
                values |= {f"{split}/{task}/{name}": score for name, score in scores.items()}
        self._log(values, line["step"])

    def _log(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.log(values, step)

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for tracker in self.trackers:
            tracker.close(failed=kind is not None)
