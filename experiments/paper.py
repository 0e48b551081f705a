"""The study's tables, run again: `python -m experiments.paper --table 1`, its values beside ours.

`--scale full` is the study's own size: bert-base-uncased, its epochs. `--scale small` is for a laptop: the
default model, fewer steps; what that leaves out is printed with the table. `--recipe study` sets what the
study set where the table itself does not say (adapter dropout .1, alpha 16, a Siamese head on u and v),
`--recipe ours` this project's defaults. The tables of a scale and recipe share one folder: a run that two
of them have is made once, and a table that was stopped goes on where it was.

The verdict is on d, our dev score less the study's: `reproduced` if |d| is within 1.96 standard errors,
beyond them `beaten` or `behind`. The standard error is that of two dev sets, √(se² + se'²), with se² =
p(1 - p)/n of an accuracy and (1 - r²)²/(n - 1) of a correlation; how seeds differ stands beside the score.
The gap is a row's score less that of the row which the table is about, of full fine-tuning for instance: a
finding that another encoder can share. Its verdict is on our gap less the study's, with the standard errors
of all four scores; as two runs share a dev set's examples, that is more than their difference errs.
"""

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from experiments.cells import SETTINGS, Cell, cell_name
from experiments.tables import DEV_ROWS, OVERALL, TABLES, TASK_NAMES, Row, Table
from experiments.verdicts import Scored, gap, standard_error, verdict
from lora.methods import METHODS
from minibert.errors import InputError
from training.cli import Parser
from training.config import Config, check
from training.exit import run_command

SMALL_STEPS = {"sst": 534, "sts": 378, "qqp": 438}  # two passes over SST and STS, 14,000 of Quora's pairs
COMMON = ("model", "data", "max_steps")
TEST = "test"  # the scores on the test set: those of table 8's best
SMALL = (
    "Small cuts the study's size: {model} instead of bert-base-uncased, seeds {seeds}, at most {steps} "
    "steps (of several tasks the most of them each). MiniLM has seen Quora's duplicates before: its Quora "
    "and STS scores do not compare with bert-base's."
)


def config_of(row: Row, scale: str, recipe: str, **changes) -> Config:
    """The run of a row; `changes` are settings that the caller decides.

    Raises:
        InputError: if the settings are in conflict.
    """
    names = str(row.settings["task"]).split("+")
    settings: dict[str, object] = {"model": "bert-base-uncased"} if scale == "full" else {}
    if recipe == "study":
        if METHODS[str(row.settings["method"])].layer:
            settings |= {"alpha": 16.0, "lora_dropout": 0.1}
        if row.settings.get("pair") == "siamese":
            settings["features"] = "uv"
    settings |= row.settings
    if scale == "small":
        settings.pop("epochs", None)
        settings["max_steps"] = len(names) * max(SMALL_STEPS[name] for name in names)
    return check(Config(**settings | changes))


def cells_of(
    rows: Sequence[Row], scale: str, recipe: str, seeds: Sequence[int], **changes
) -> list[list[Cell]]:
    """For each row its runs, a seed each; rows of the same settings have the same."""
    configs = [[config_of(row, scale, recipe, seed=seed, **changes) for seed in seeds] for row in rows]
    return [[Cell(run_name(told(one)), told(one), one) for one in row] for row in configs]


def run_name(given: Mapping[str, object]) -> str:
    """What a run is told, but for what all runs of a folder have alike."""
    parts = {"task": Config.task, "method": Config.method} | given
    return cell_name(
        parts | {"seed": given.get("seed", 0)}, [name for name in SETTINGS if name not in COMMON]
    )


def told(config: Config) -> dict[str, object]:
    """What the command line of a run says."""
    from training.cli import chosen

    return chosen(config)


def of_task(result: Mapping, split: str, task: str) -> float:
    value = result[split]
    return value[task] if isinstance(value, Mapping) else value


def scored(row: Row, runs: Sequence[Mapping], task: str) -> Scored:
    ours = mean(of_task(run, "dev", task) for run in runs)
    errors = (
        standard_error(task, row.dev[task], DEV_ROWS[task]),
        standard_error(task, ours, runs[0]["rows"][task]["dev"]),
    )
    return Scored(row.dev[task], ours, errors)


def rows_of(table: Table) -> list[Row]:
    """Those that need runs: its own, then those of other tables that it compares them with."""
    return [*table.rows, *(row for row in table.references().values() if row not in table.rows)]


def lines(table: Table, results: Sequence[Sequence[Mapping]]) -> list[tuple[str, ...]]:
    """A line for each task of each row that has finished runs; `results` are those of each of `rows_of`."""
    rows = rows_of(table)
    beside = {
        task: scored(row, runs, task)
        for task, row in table.references().items()
        if (runs := results[rows.index(row)])
    }
    return [
        line(row, runs, task, beside.get(task))
        for row, runs in zip(table.rows, results, strict=False)
        if runs
        for task in row.dev
    ]


def line(row: Row, runs: Sequence[Mapping], task: str, beside: Scored | None) -> tuple[str, ...]:
    from experiments.runs import duration
    from experiments.summary import spread

    one = scored(row, runs, task)
    memory = max(run["memory_above_start_mib"] for run in runs) / 1024
    return (
        *row.label,
        TASK_NAMES[task] if len(row.dev) > 1 else "",
        f"{one.study:.4f}",
        spread([of_task(run, "dev", task) for run in runs]),
        verdict(one.ours - one.study, one.errors),
        *gap(one, beside),
        f"{row.train[task]:.4f}" if task in row.train else "",
        spread([of_task(run, "train", task) for run in runs]),
        f"{row.loss:g}" if row.loss else "",
        f"{mean(run['loss'] for run in runs):.3f}" if row.loss else "",
        duration(row.seconds) if row.seconds else "",
        duration(mean(run["train_seconds"] for run in runs)),
        f"{row.gib:.2f}" if row.gib else "",
        f"{memory:.2f}",
    )


def columns(table: Table) -> tuple[str, ...]:
    def pair(name: str) -> tuple[str, str]:
        return f"study's {name}", f"our {name}"

    return (*table.columns, "of", *pair("dev"), "verdict", *pair("gap"), "gap's verdict", *pair("train"),
            *pair("loss"), *pair("time"), *pair("GiB"))  # fmt: skip


def read_results(cells: Sequence[Sequence[Cell]], out: Path) -> list[list[dict]]:
    """For each row its finished runs' results, with the training loss of the best epoch."""
    import json

    from minibert.files import read_json

    results = []
    for row in cells:
        results.append([])
        for cell in row:
            if (path := out / cell.name / "result.json").is_file():
                result = read_json(path)
                epochs = (out / cell.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                result["loss"] = json.loads(epochs[result["best_epoch"] - 1])["loss"]
                results[-1].append(result)
    return results


def overall(table: Table, results: Sequence[Sequence[Mapping]]) -> str:
    """(SST accuracy + Quora accuracy + (1 + STS Pearson)/2)/3, of dev: the test labels are not published."""
    best = {
        str(row.settings["task"]): mean(run["dev"] for run in runs)
        for row, runs in zip(table.rows, results, strict=False)
        if runs
    }
    if set(best) != set(TASK_NAMES):
        return ""
    score = (best["sst"] + best["qqp"] + (1 + best["sts"]) / 2) / 3
    return (
        f"Overall {score:.3f} on dev; the study's {OVERALL:.3f} is on test, whose labels are not published: "
        "predictions-test.csv of each run has ours."
    )


def build_parser() -> Parser:
    parser = Parser(prog="python -m experiments.paper", description=__doc__, allow_abbrev=False)
    parser.add_argument("--table", required=True, choices=[*TABLES, TEST], metavar="{1-8,test}")
    parser.add_argument("--scale", choices=("small", "full"), default="small", help="the runs' size (small)")
    parser.add_argument("--recipe", choices=("study", "ours"), default="study", help="other settings (study)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run for each (0)")
    parser.add_argument("--data", default="cs224n", help="cs224n (downloaded), or a folder with its files")
    parser.add_argument("--model", help="another encoder than the scale's")
    parser.add_argument("--max-steps", type=int, help="end each run after so many steps")
    parser.add_argument("--out", type=Path, help="the runs' folder [runs/paper-SCALE-RECIPE]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    return parser


def main() -> int:
    given = build_parser().parse_args()
    if given.jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {given.jobs}")
    if len(set(given.seeds)) < len(given.seeds):
        raise InputError(f"--seeds: expected each once, got {' '.join(map(str, given.seeds))}")
    table = TABLES[given.table] if given.table != TEST else TABLES["8"].best()
    changes = {name: getattr(given, name) for name in ("data", "model", "max_steps")}
    changes = {name: value for name, value in changes.items() if value is not None}
    cells = cells_of(rows_of(table), given.scale, given.recipe, given.seeds, **changes)
    out = given.out or Path("runs") / f"paper-{given.scale}-{given.recipe}"
    from experiments.runs import run_cells
    from experiments.summary import markdown
    from minibert.files import write_text

    each = {cell.name: cell for row in cells for cell in row}
    check_data([cell.config for cell in each.values()])
    stopped, failed = run_cells(list(each.values()), out, given.jobs, say)
    results = read_results(cells, out)
    text = f"Table {given.table}: {table.title}. Recipe: {given.recipe}.\n\n"
    text += markdown(lines(table, results), columns(table)) + "\n"
    remarks = [table.note.capitalize() + "." if table.note else ""]
    if given.scale == "small":
        steps = ", ".join(f"{given.max_steps or n} of {TASK_NAMES[task]}" for task, n in SMALL_STEPS.items())
        model = given.model or Config.model
        remarks.append(SMALL.format(model=model, seeds=" ".join(map(str, given.seeds)), steps=steps))
    if given.table == TEST:
        remarks.append(overall(table, results))
    text += "".join(f"\n{remark}\n" for remark in remarks if remark)
    write_text(text, out / f"table-{given.table}.md")
    say(text)
    for name, error in failed.items():
        print(f"error: {name}: {error}", file=sys.stderr)
    if stopped:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 128 + stopped
    return 1 if failed else 0


def check_data(configs: Sequence[Config]) -> None:
    """Raises InputError if the data cannot be had: once, and not once more for each cell."""
    from training.build import data_folder

    for config in {config.task: config for config in configs}.values():
        data_folder(config)


say = partial(print, flush=True)

if __name__ == "__main__":
    sys.exit(run_command(main))
