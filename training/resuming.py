"""Going on with the run that lies in a folder: from which state, and only if it is the same run."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from minibert.errors import InputError
from minibert.files import leftovers, write_json
from training.checkpoint import load_checkpoint, made_with
from training.config import Config, to_dict
from training.keeping import newest_whole
from training.loop import Trainer
from training.provenance import DROPOUT, EPOCH, MASKS, OLDER_MASKS, differences
from training.run_folder import RunFolder, keep_lines, read_run_config


def go_on(folder: RunFolder, trainer: Trainer, now: Mapping, anyway: bool) -> None:
    """Put the trainer where the newest whole checkpoint was; `now` is `provenance.made_with` of this run.

    Raises:
        InputError: if all checkpoints are damaged, or the run was made otherwise and it is not `anyway`.
    """
    must, may = differences({"settings": to_dict(read_run_config(folder))}, now)
    path = newest_whole(folder.checkpoint)
    if path:
        before = made_with(path)
        shared = before.get("processes", 1) > 1 or read_run_config(folder).micro_batch_size
        before.setdefault(DROPOUT, OLDER_MASKS if shared else MASKS)
        more = differences(before, now)
        must, may = list(dict.fromkeys(must + more[0])), may + more[1]
        anyway = anyway and before.get(EPOCH, now[EPOCH]) == now[EPOCH]
    if must and not anyway:
        raise InputError(f"--resume: {folder.path} was made with {'; '.join(must + may)}")
    _load(path, trainer)
    for one in leftovers(folder.path):
        one.unlink(missing_ok=True)
    if must or may:
        print(f"going on with a run that was made with {'; '.join(must + may)}", file=sys.stderr)
        trainer.progress.changes.append({"step": trainer.progress.step, "made_with": must + may})
    if must:
        write_json(to_dict(trainer.config), folder.config)
    keep_lines(folder.steps, "step", trainer.progress.step)


def as_begun(config: Config, folder: RunFolder) -> Config:
    """A run goes on in the precision that `auto` took when it began, whatever this machine would take."""
    if config.precision == "auto" and folder.config.exists():
        return replace(config, precision=read_run_config(folder).precision)
    return config


def load_newest(folder: RunFolder, trainer: Trainer) -> None:
    """The same state for a process that changes nothing in the folder; another has looked at it already."""
    _load(newest_whole(folder.checkpoint), trainer)


def _load(path: Path | None, trainer: Trainer) -> None:
    if path:
        trainer.progress, trainer.best_weights = load_checkpoint(
            path.parent, trainer.model, trainer.optimizer, trainer.scaler, path.name
        )
