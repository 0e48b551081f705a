"""Fine-tune a BERT-size encoder: `python train.py --task sts --method rslora`. All flags: `--help`."""

import sys

from training.cli import parse
from training.exit import run_command
from training.tracking import check_ready


def main() -> int:
    config, given = parse(sys.argv[1:])
    check_ready(given.track)
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from training.run import Run, default_out, overfit_batch
    from training.run_folder import RunFolder

    if given.overfit_batch:
        return overfit_batch(config)
    folder = RunFolder(given.out or default_out(config))
    if given.resume and folder.result.exists():
        print(f"{folder.path} is finished; its result is in {folder.result}")
        return 0
    folder.check_free(given.resume)
    return Run(config).train(folder, given.resume, given.track, given.profile)


if __name__ == "__main__":
    sys.exit(run_command(main))
