"""Do settings differ, or only seem to? `python -m experiments.compare RUNS...`: paired tests on dev."""

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.summary import markdown
from minibert.files import check_output, write_text
from training.cli import Parser
from training.exit import run_command

if TYPE_CHECKING:
    from experiments.comparison import Comparison, Row

COLUMNS = ("setting", "seeds", "mean ± sd", "95 % interval", "to the best", "p after Holm", "ties")


def table(comparison: "Comparison") -> str:
    return markdown([_line(row) for row in comparison.rows], COLUMNS)


def _line(row: "Row") -> tuple[str, ...]:
    sd = "" if row.sd is None else f" ± {row.sd:.4f}"
    tested = ("", "") if row.p_holm is None else (f"{row.difference:+.4f}", _p(row.p_holm))
    ties = "best" if row.p_holm is None else "yes" if row.ties else "no"
    span = f"{row.low:.4f} to {row.high:.4f}"
    return row.setting, str(len(row.seeds)), f"{row.mean:.4f}{sd}", span, *tested, ties


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< .0001"


def _span(values: tuple[float, float]) -> str:
    low, high = (f"{value:.4f}" for value in values)
    return low if low == high else f"{low} to {high}"


def remarks(comparison: "Comparison") -> str:
    """What the table's numbers are about, and what they cannot show."""
    about = f"{comparison.task}, {comparison.metric}, {comparison.examples} dev examples. "
    lines = [about + "The interval is over dev examples, with these seeds."]
    if comparison.detectable is None:
        return lines[0]
    lines.append(f"p: {comparison.test}, paired, Holm over all pairs of settings. A tie: p at least .05.")
    if any(len(row.seeds) == 1 for row in comparison.rows):
        alone = all(len(row.seeds) == 1 for row in comparison.rows)
        known = "how much seeds differ is not known here: p is about these models, not about the settings"
        lent = "settings with one seed are taken to vary from seed to seed as the others do"
        lines.append(f"Note: {known if alone else lent}.")
    shown, of_models = _span(comparison.detectable), _span(comparison.detectable_by_examples)
    among = " among the ties" if any(row.ties for row in comparison.rows[1:]) else ""
    whole = "" if shown == of_models else f"; between these very models, whatever their seeds, {of_models}"
    lines.append(
        f"Smallest true difference that one such test at 5 % finds with 80 % power: {shown}{among}{whole}."
    )
    return "\n".join(lines)


def lines(compared: Sequence[tuple[str, "Comparison"]]) -> str:
    """A line per setting, as CSV: every number of the tables and those behind them; beside each its data."""
    from experiments.comparison import Row

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    about = ("task", "metric", "examples", "test")
    writer.writerow(["data", *about, *(one.name for one in fields(Row))])
    for data, comparison in compared:
        for row in comparison.rows:
            told = vars(row) | {"seeds": " ".join(map(str, row.seeds))}
            of = (Path(data).name, *(getattr(comparison, name) for name in about))
            writer.writerow([*of, *("" if value is None else value for value in told.values())])
    return text.getvalue()


def main() -> int:
    parser = Parser(prog="python -m experiments.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="finished runs, seeds and settings")
    parser.add_argument("--task", help="this task alone [a table for each that the runs have]")
    parser.add_argument("--data", help="where the labels are, if no longer where the runs say")
    parser.add_argument("--csv", type=Path, help="also write a line per setting there")
    given = parser.parse_args()
    check_output(given.csv, "--csv")
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from experiments.comparison import by_settings, compare, read_parts
    from experiments.left_out import say

    parts, left_out = read_parts(given.runs, given.data, given.task)
    compared = [(part[0].record.config.data, compare(*by_settings(part))) for part in parts]
    shown = [f"{table(comparison)}\n\n{remarks(comparison)}" for _, comparison in compared]
    if len(parts) > 1:
        titles = (f"{comparison.task} on {data}" for data, comparison in compared)
        shown = [f"## {title}\n\n{text}" for title, text in zip(titles, shown, strict=True)]
    print("\n\n".join(shown))
    if len(parts) > len({comparison.task for _, comparison in compared}):
        print("runs on different data are apart; if the files are the same: --data", file=sys.stderr)
    say(left_out)
    if given.csv:
        write_text(lines(compared), given.csv)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
