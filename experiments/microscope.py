"""What training changed in the weights: `python -m experiments.microscope RUN [RUN...] --out FOLDER`.

Runs of one base model, by whatever method, on the same axes. FOLDER gets microscope.html, microscope.json,
modules.csv (a line for each run and module) and spectra.csv (its singular values).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.plots import check_installed
from minibert.errors import InputError
from minibert.files import check_folder, write_json, write_text
from training.cli import Parser
from training.exit import run_command


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError before anything is read."""
    parser = Parser(
        prog="python -m experiments.microscope", description=__doc__.partition(":")[0], allow_abbrev=False
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the folder of a finished run, or an adapter folder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the page goes")
    parser.add_argument("--task", help="whose adapter, of runs with one for each task")
    parser.add_argument("--by-layer", action="store_true", help="a row for each layer too")
    parser.add_argument(
        "--top", type=int, default=10, metavar="K", help="singular vectors of each W' that may intrude (10)"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="E", help="|cosine| below which they do (0.5)"
    )
    given = parser.parse_args(arguments)
    if given.top < 1:
        raise InputError(f"--top: expected a whole number of at least 1, got {given.top}")
    if not 0 < given.threshold <= 1:
        raise InputError(f"--threshold: expected a number above 0, at most 1, got {given.threshold}")
    check_folder(given.out, "--out")
    check_installed()
    return given


def main() -> int:
    given = parse(sys.argv[1:])
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from experiments.blocks import page
    from experiments.left_out import say
    from experiments.microscope_page import TITLE, parts_of
    from experiments.microscope_tables import as_json, modules_csv, not_measured, shown, spectra_csv
    from experiments.microscopy import magnify

    runs, left_out = magnify(given.runs, given.task, given.top)
    html = page(TITLE, parts_of(runs, given.threshold))
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        write_text(modules_csv(runs, given.threshold), given.out / "modules.csv")
        write_text(spectra_csv(runs), given.out / "spectra.csv")
        write_text(html, given.out / "microscope.html")
        write_json(
            as_json(runs, given.threshold), given.out / "microscope.json"
        )  # last: with it, all is there
    except OSError as error:
        raise InputError(f"--out: {given.out} cannot be written ({error.strerror or error})") from None
    print(shown(runs, given.threshold, given.by_layer))
    for line in not_measured(runs):
        print(line)
    say(left_out)
    print(f"\n{given.out / 'microscope.html'}, and beside it microscope.json, modules.csv, spectra.csv")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
