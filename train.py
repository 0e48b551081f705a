"""Fine-tune a BERT-size encoder: `python train.py --task sts --method rslora`. All flags: `--help`."""

import sys

from training.cli import parse
from training.exit import run_command
from training.flags import keeping
from training.tracking import check_ready


def main() -> int:
    config, given = parse(sys.argv[1:])
    check_ready(given.track)
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from training.overfit import overfit_batch
    from training.run import Run, default_out
    from training.run_folder import RunFolder

    if given.overfit_batch:
        return overfit_batch(config)
    if given.overridden:
        print(f"other than in {given.config}: {', '.join(given.overridden)}")
    folder = RunFolder(given.out or default_out(config))
    if given.resume and folder.result.exists():
        print(f"{folder.path} is finished; its result is in {folder.result}")
        return 0
    folder.check_free(given.resume)
    run, anyway = Run(config), given.resume_anyway
    return run.train(folder, given.resume, given.track, given.profile, keeping(given), anyway)


if __name__ == "__main__":
    sys.exit(run_command(main))
