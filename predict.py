"""Score a file or one example with a finished run: `python predict.py RUN --input FILE --output PRED`."""

import argparse
import sys
from pathlib import Path

from minibert.errors import InputError
from training.cli import Parser, add_computing, check_beside
from training.config import QUOTES
from training.exit import run_command


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises InputError unless it is a file or a text that is to be scored."""
    parser = Parser(prog="predict.py", description="Score sentences with a finished run.", allow_abbrev=False)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder that train.py wrote, or its adapter/"
    )
    parser.add_argument("--input", type=Path, help="a file in the task's format; labels are optional")
    parser.add_argument("--output", type=Path, help="where the predictions go, as CSV")
    parser.add_argument(
        "--text", nargs="+", metavar="TEXT", help="one example: a sentence, or the two of a pair"
    )
    parser.add_argument("--task", help="which task's head, if the run has several")
    parser.add_argument("--batch-size", type=int, default=64, help="examples at a time, at most (64)")
    about = "of the input file: around fields as in CSV, or plain characters [as in the run's data]"
    parser.add_argument("--quotes", choices=QUOTES, help=about)
    add_computing(parser)
    given = parser.parse_args(arguments)
    if (given.input is None) == (given.text is None):
        raise InputError("expected --input FILE with --output FILE, or --text")
    if (given.input is None) != (given.output is None):
        raise InputError("expected --input and --output together")
    if given.batch_size < 1:
        raise InputError(f"--batch-size: expected a whole number of at least 1, got {given.batch_size}")
    if given.output:
        check_beside(given.output, "--output", given.run, given.input)
    return given


def main() -> int:
    given = parse(sys.argv[1:])
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from training.scoring import Computing, score_file, score_text

    computing = Computing(given.precision, given.device)

    if given.text:
        print(score_text(given.run, given.task, given.text, computing))
    else:
        files = given.input, given.output
        count = score_file(given.run, given.task, *files, given.batch_size, given.quotes, computing)
        print(f"{given.output}: {count} predictions")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
