"""One run from all sides: `python -m experiments.evaluate RUN`; or `--overall SST_RUN QQP_RUN STS_RUN`."""

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.errors import InputError
from minibert.files import check_folder, write_json, write_text
from training.cli import Parser, check_beside
from training.exit import run_command

if TYPE_CHECKING:
    from experiments.evaluation import Evaluation
    from experiments.scored import Scored


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m experiments.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--task", help="which of its tasks, if the run has several")
    parser.add_argument("--data", help="where the labels are, if no longer where the run says")
    parser.add_argument(
        "--no-model", action="store_true", help="leave out what needs the model: pairs both ways, lengths"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="[RUN/evaluation.json]")
    parser.add_argument(
        "--overall",
        type=Path,
        nargs=3,
        metavar=("SST_RUN", "QQP_RUN", "STS_RUN"),
        help="the course's score over its three tasks, instead",
    )
    given = parser.parse_args(arguments)
    if (given.run is None) == (given.overall is None):
        raise InputError("expected one RUN, or --overall with three")
    if given.overall and (given.task or given.no_model):
        raise InputError("--overall: takes the task of each place, and needs no model")
    if given.out and given.out.suffix != ".json":
        raise InputError(f"--out: expected the name of a .json file, got {given.out}")
    if given.out and check_folder(given.out.parent, "--out") == given.out.parent:
        for run in given.overall or [given.run]:
            check_beside(given.out, "--out", run)
    return given


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """As CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


def tables(result: "Evaluation") -> dict[str, str]:
    """File name -> what is easier to read as a table than in the JSON."""
    files = {}
    for name, rows in (
        ("classes", named_classes(result)),
        ("calibration", result.calibration and [asdict(one) for one in result.calibration.bins]),
        ("lengths", result.lengths and [asdict(one) for one in result.lengths]),
    ):
        if rows:
            files[f"{name}.csv"] = table([row.values() for row in rows], list(rows[0]))
    if result.confusion:
        classes = result.class_names
        rows = [[label, *row] for label, row in zip(classes, result.confusion, strict=True)]
        files["confusion.csv"] = table(rows, ["label", *(f"predicted {c}" for c in classes)])
    if result.worst:
        texts = [f"text{i + 1}" for i in range(len(result.worst[0].texts))]
        rows = []
        for one in result.worst:
            given = [result.class_names[c] for c in (one.label, one.prediction)] if result.confusion else ()
            rows.append([one.id, *(given or (one.label, one.prediction)), one.error, *one.texts])
        files["worst.csv"] = table(rows, ["id", "label", "prediction", "error", *texts])
    return files


def named_classes(result: "Evaluation") -> list[dict] | None:
    classes = result.to_dict()["classes"]
    return classes and [one | {"label": result.class_names[one["label"]]} for one in classes]


def submissions(run: "Scored") -> dict[str, str]:
    """File name -> the predictions of dev and, where there are any, of test, as the course wants them."""
    from experiments.scored import read_rows
    from experiments.submission import submission, submission_name
    from training.run_folder import RunFolder

    if run.task.own:
        return {}
    files, only = {}, len(run.record.config.tasks) == 1
    for split in ("dev", "test"):
        path = RunFolder(run.path).predictions(split, run.task.name, only)
        if path.is_file():
            predictions = {name: values[0] for name, values in read_rows(path, run.task).items()}
            files[submission_name(run.task.name, split)] = submission(run.task.name, predictions)
    return files


def evaluate_run(given: argparse.Namespace) -> None:
    from experiments.evaluation import evaluate
    from experiments.findings import findings
    from experiments.scored import read_scored

    run = read_scored(given.run, given.task, given.data)
    result = evaluate(run, with_model=not given.no_model)
    files = tables(result) | submissions(run)
    alone = len(run.record.config.tasks) == 1
    out = given.out or given.run / ("evaluation.json" if alone else f"evaluation-{run.task.name}.json")
    folder = out.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(text, folder / name)
        write_json(result.to_dict(), out)  # last: with it, all is there
    except OSError as error:
        raise InputError(f"--out: {out} cannot be written ({error.strerror or error})") from None
    print(findings(result))
    print(f"\n{out}, and in {folder}: {', '.join(sorted(files))}")


def evaluate_overall(given: argparse.Namespace) -> None:
    from experiments.scored import read_scored
    from experiments.submission import COURSE, overall
    from training.run_folder import RunFolder, read_run_config

    def one(path: Path, task: str) -> "Scored":
        several = len(read_run_config(RunFolder(path)).tasks) > 1
        return read_scored(path, task if several else None, given.data)

    result = overall([one(path, task) for path, task in zip(given.overall, COURSE, strict=True)])
    print(f"overall {result.overall:.4f} (standard error {result.error:.4f}), on dev")
    print(f"SST accuracy {result.sst:.4f}, Quora accuracy {result.qqp:.4f}, STS Pearson {result.sts:.4f}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(asdict(result), given.out)


def main() -> int:
    given = parse(sys.argv[1:])
    # Imported in these, not above: usage errors and --help answer without waiting for torch.
    (evaluate_overall if given.overall else evaluate_run)(given)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
