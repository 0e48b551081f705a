"""Fine-tune a BERT-size encoder: `python train.py --task sts --method rslora`. All flags: `--help`."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.errors import InputError
from tasks.reader import read_split
from training.cli import parse
from training.config import Config
from training.exit import leave, run_command
from training.flags import keeping
from training.tracking import check_ready

if TYPE_CHECKING:
    from training.processes import Processes


def main() -> int:
    config, given = parse(sys.argv[1:])
    if given.dry_run:
        print(*given.inferred, *rows_of(config), sep="\n")
        return 0
    check_ready(given.track)
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from training.processes import joined

    with joined(config.device) as processes:
        return train(config, given, processes)


def rows_of(config: Config) -> list[str]:
    """How many rows each own task has, all read as a run reads them."""
    lines = []
    for task in filter(lambda task: task.own, config.tasks):
        how = config.strict, config.quotes
        counts = [f"{len(read_split(Path(config.data), task, one, *how)[0]):,} {one}" for one in task.files]
        lines.append(f"           {task.name}: {', '.join(counts)}")
    return lines


def train(config: Config, given: Namespace, processes: "Processes") -> int:
    from training.overfit import overfit_batch
    from training.resuming import as_begun
    from training.run import Run, default_out
    from training.run_folder import RunFolder

    if given.overfit_batch:
        if not processes.alone:
            raise InputError(f"--overfit-batch: expected one process, got {processes.count}")
        return overfit_batch(config)
    if config.batch_size < processes.count:
        at_least = f"expected an example for each of {processes.count} processes"
        raise InputError(f"--batch-size: {at_least}, got {config.batch_size}")
    folder = RunFolder(given.out or default_out(config))
    if processes.first:
        if given.overridden:
            print(f"other than in {given.config}: {', '.join(given.overridden)}")
        folder.check_free(given.resume)
    if given.resume and folder.result.exists():
        if processes.first:
            print(f"{folder.path} is finished; its result is in {folder.result}")
        return 0
    config = as_begun(config, folder) if given.resume else config
    if processes.first and given.inferred:
        print(*given.inferred, sep="\n")
    run, anyway = Run(config, processes=processes), given.resume_anyway
    return run.train(folder, given.resume, given.track, given.profile, keeping(given), anyway)


if __name__ == "__main__":
    leave(run_command(main))
