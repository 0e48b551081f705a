"""One example through a finished run, as a page: `python -m experiments.explain RUN --text "..."`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minibert.errors import InputError
from minibert.files import check_output, write_text
from training.cli import Parser
from training.exit import run_command


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError before anything is read."""
    parser = Parser(prog="python -m experiments.explain", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder that train.py wrote, or its adapter/"
    )
    parser.add_argument("--text", required=True, help="the sentence, or the first of a pair")
    parser.add_argument("--pair", metavar="TEXT", help="the second sentence, for a task of pairs")
    parser.add_argument("--task", help="which task's head, if the run has several")
    parser.add_argument(
        "--nearest", type=int, default=8, metavar="N", help="training examples to show (8); 0 reads none"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("explanation.html"), help="the page (explanation.html)"
    )
    given = parser.parse_args(arguments)
    if given.nearest < 0:
        raise InputError(f"--nearest: expected a whole number of at least 0, got {given.nearest}")
    if given.out.suffix != ".html":
        raise InputError(f"--out: expected a file that ends in .html, got {given.out}")
    check_output(given.out, "--out")
    return given


def main() -> int:
    given = parse(sys.argv[1:])
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from experiments.blocks import page
    from experiments.explanation import explain
    from experiments.explanation_page import TITLE, completeness, cut_off, parts_of

    texts = [given.text] if given.pair is None else [given.text, given.pair]
    found = explain(given.run, given.task, texts, given.nearest)
    write_text(page(TITLE, parts_of(found, given.run), ["attention"]), given.out)
    if found.kept < found.tokens:
        print(cut_off(found), file=sys.stderr)
    print(completeness(found))
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
