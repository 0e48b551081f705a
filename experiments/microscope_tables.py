"""What the microscope saw as tables: on the terminal, as CSV and as JSON; the page has the same cells."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields

from experiments.blocks import Cell
from experiments.microscopy import Group, Magnified, Module
from experiments.summary import markdown

GROUP = ("‖ΔW‖", "‖ΔW‖/‖W‖", "rank", "eff. rank", "rank 90 %", "ΔM", "ΔD", "intruders")
OF_RUN = ("r(ΔM, ΔD)", "outside", "MLM loss")  # what a layer does not have
RUN = ("#", "run", "method")
MODULE = ("layer", "part", *GROUP)


def measures(group: Group, threshold: float) -> list[Cell]:
    """GROUP's: sums of norms and intruders, means over modules of the rest."""
    means = [
        (group.mean(name), digits) for name, digits in (("rank", 1), ("effective_rank", 1), ("rank_90", 1))
    ]
    found = group.intruders(threshold)
    return [
        Cell(f"{group.change:.3f}", group.change),
        Cell(f"{group.relative:.2%}", group.relative),
        *(Cell(f"{value:.{digits}f}", value) for value, digits in means),
        *(Cell(f"{group.mean(name):.2e}", group.mean(name)) for name in ("magnitude", "direction")),
        Cell(f"{found} of {group.examined}", found),
    ]


def of_run(run: Magnified) -> list[Cell]:
    """OF_RUN's."""
    r, moved = run.correlation, run.drift
    loss = Cell("") if moved is None else Cell(f"{moved.after:.3f} ({moved.change:+.3f})", moved.change)
    return [
        Cell("") if r is None else Cell(f"{r:+.2f}", r),
        Cell(f"{run.outside:.1%}", run.outside),
        loss,
    ]


def run_rows(runs: Sequence[Magnified], threshold: float) -> list[list[Cell]]:
    """A row a run; of one whose encoder is frozen nothing but what it is."""
    rows = []
    for number, run in enumerate(runs, 1):
        about = [Cell(str(number), number), Cell(run.path.name or str(run.path)), Cell(run.config.method)]
        seen = measures(run.all, threshold) if run.modules else [Cell("")] * len(GROUP)
        rows.append(about + seen + of_run(run))
    return rows


def layer_rows(runs: Sequence[Magnified], threshold: float) -> list[list[Cell]]:
    """A row for each run and layer, numbered from 0 as in the weights' names."""
    return [
        [
            Cell(str(number), number),
            Cell(run.path.name or str(run.path)),
            Cell(run.config.method),
            Cell("pooler") if at is None else Cell(str(at), at),
            *measures(group, threshold),
        ]
        for number, run in enumerate(runs, 1)
        for at, group in run.layers.items()
    ]


def module_rows(run: Magnified, threshold: float) -> list[list[Cell]]:
    rows = []
    for one in run.modules:
        where = Cell("") if one.layer is None else Cell(str(one.layer), one.layer)
        rows.append([where, Cell(one.part), *measures(Group((one,)), threshold)])
    return rows


def shown(runs: Sequence[Magnified], threshold: float, by_layer: bool) -> str:
    """For the terminal."""
    text = markdown(_texts(run_rows(runs, threshold)), (*RUN, *GROUP, *OF_RUN))
    if by_layer and any(run.modules for run in runs):
        text += "\n\n" + markdown(_texts(layer_rows(runs, threshold)), (*RUN, "layer", *GROUP))
    return text


def _texts(rows: Iterable[Sequence[Cell]]) -> list[list[str]]:
    """As a table of Markdown takes them."""
    return [[cell.text.replace("|", "\\|") for cell in row] for row in rows]


def not_measured(runs: Sequence[Magnified]) -> list[str]:
    """In a line each, what a reader would miss."""
    lines = [
        f"{run.path}: nothing was changed, {run.config.method} trains the head alone"
        for run in runs
        if not run.modules
    ]
    if all(run.drift is None for run in runs):
        lines.append(
            f"masked-language-model loss: not measured, {runs[0].config.model} comes without a head for it"
        )
    return lines


def modules_csv(runs: Sequence[Magnified], threshold: float) -> str:
    """A line for each run and module."""
    names = [one.name for one in fields(Module) if one.name not in ("values", "closest")]
    rows = [
        [run.path, run.config.method, *(getattr(one, name) for name in names), one.intruders(threshold)]
        + [len(one.closest)]
        for run in runs
        for one in run.modules
    ]
    return _csv(["run", "method", *names, "intruders", "examined"], rows)


def spectra_csv(runs: Sequence[Magnified]) -> str:
    """A line for each run, module and singular value of ΔW that is not 0."""
    rows = [
        [run.path, one.name, place, value]
        for run in runs
        for one in run.modules
        for place, value in enumerate(one.values, 1)
        if value
    ]
    return _csv(["run", "name", "place", "singular_value"], rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([header, *rows])
    return text.getvalue()


def as_json(runs: Sequence[Magnified], threshold: float) -> dict:
    """All of it."""
    return {
        "model": runs[0].config.model,
        "threshold": threshold,
        "runs": [
            {
                "run": str(run.path),
                "task": run.config.task,
                "method": run.config.method,
                "seed": run.config.seed,
                "correlation": run.correlation,
                "outside": run.outside,
                "masked_language_model": None
                if run.drift is None
                else asdict(run.drift) | {"change": run.drift.change},
                "modules": [asdict(one) | {"intruders": one.intruders(threshold)} for one in run.modules],
                **(_totals(run.all, threshold) if run.modules else {}),
                "layers": [{"layer": at} | _totals(group, threshold) for at, group in run.layers.items()],
            }
            for run in runs
        ],
    }


def _totals(group: Group, threshold: float) -> dict[str, object]:
    names = ("rank", "effective_rank", "rank_90", "magnitude", "direction")
    return {
        "change": group.change,
        "relative": group.relative,
        "adapter_norm": group.adapter_norm,
        **{f"mean_{name}": group.mean(name) for name in names},
        "intruders": group.intruders(threshold),
        "examined": group.examined,
    }
