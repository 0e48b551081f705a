"""Runs whose scores compare - of one task, model and data - as the tables and plots of a report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from experiments.blocks import Block, Cell, Commands, Figures, Heading, Paragraph, Row, Table
from experiments.confusion import confusion, dev_labels
from experiments.listing import Run
from experiments.plots import Line, curves, pareto
from experiments.summary import by_setting, shown, spread, trained_share
from lora.methods import METHODS
from minibert.errors import InputError
from training.cli import chosen, command_of
from training.config import OF_ADAPTERS, OF_SEVERAL, Config

COSTS = {  # of result.json, as the plots call them
    "train_seconds": "training seconds",
    "memory_above_start_mib": "memory above start, MiB",
    "trainable_parameters": "trainable parameters",
}
SUMMARY = ("#", "method", "settings", "dev", "train", "seeds", "trained", "seconds", "MiB above start")
RUNS = ("run", "#", "seed", "dev", "train", "best epoch", "seconds", "MiB above start")
SPREADS = {"dev": 4, "train": 4, "train_seconds": 0, "memory_above_start_mib": 0}  # and their digits
NOTE = (
    "A row per setting; ± is the standard deviation over seeds. dev is that of each run's best epoch, which "
    "dev itself has chosen; train is scored on a sample. Seconds and memory compare only where the runs had "
    "the same machine, and to themselves."
)
SEVERAL = (
    "A run of several tasks has a row here as in the part of each of its others: dev and train are this "
    "task's, of the epoch that it kept; costs and training loss are those of all of them."
)
FRONT = (
    "Up and to the left is better; no setting beats one on the dashed line in both. ▼ is far below the "
    "frame, in which the others could not be told apart otherwise."
)


@dataclass(frozen=True)
class Comparison:
    """The settings, numbered from 1, and the names of those settings in which they differ."""

    lines: list[Line]
    names: list[str]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Comparison":
        """Raises InputError if two runs of a setting have the same seed."""
        lines = [Line(number, group) for number, group in enumerate(by_setting(runs), 1)]
        return cls(lines, differing([run.config for run in runs]))

    @property
    def config(self) -> Config:
        return self.lines[0].runs[0].config

    @property
    def metric(self) -> str:
        return self.lines[0].runs[0].result["metric"]

    def blocks(self) -> list[Block]:
        one = self.config
        return [
            Heading(f"{self.lines[0].runs[0].task}, {self.metric}"),
            Paragraph(f"Model {one.model}, data {one.data}."),
            self.summary(),
            Paragraph(f"{NOTE} {SEVERAL}" if any(line.runs[0].only for line in self.lines) else NOTE),
            *self.plots(),
            *self.grid(),
            *self.confusions(),
            *self.runs(),
        ]

    def label(self, line: Line) -> str:
        """The method, and the settings that tell it from the others."""
        config = line.runs[0].config
        return f"{config.method} {self.settings(config)}".strip()

    def settings(self, config: Config) -> str:
        told = [name for name in self.names if name != "method" and applies(config, name)]
        return ", ".join(f"{name.replace('_', '-')} {shown(getattr(config, name))}" for name in told)

    def summary(self) -> Table:
        rows = []
        for line in self.lines:
            results, config = [run.result for run in line.runs], line.runs[0].config
            share = results[0]["trainable_parameters"] / results[0]["total_parameters"]
            measured = []
            for name, digits in SPREADS.items():
                values = [result[name] for result in results]
                measured.append(Cell(spread(values, digits), mean(values)))
            told = [number(line.number), Cell(config.method), Cell(self.settings(config))]
            counted = [number(len(results)), Cell(trained_share(results[0]), share)]
            rows.append([*told, *measured[:2], *counted, *measured[2:]])
        return Table(SUMMARY, rows)

    def plots(self) -> list[Block]:
        legend = [(line.sample(), f"{line.number} {self.label(line)}") for line in self.lines]
        shown = [curves(self.lines, "loss", "training loss"), curves(self.lines, "dev", f"dev {self.metric}")]
        costs = [pareto(self.lines, name, label, self.metric) for name, label in COSTS.items()]
        return [
            Heading("By epoch", 3),
            Paragraph("A setting of several seeds has a thin line for each, and a thick one for their mean."),
            Figures(shown, legend),
            Heading("Score against cost", 3),
            Paragraph(FRONT),
            Figures(costs, legend),
        ]

    def grid(self) -> list[Block]:
        """Mean dev for each two values, of all lines or of a method's, where exactly two settings differ."""
        if len(self.names) == 2:
            return self._grid(self.lines, self.names, "")
        kinds: dict[tuple[str, str], list[Line]] = {}
        for line in self.lines:
            config = line.runs[0].config
            kinds.setdefault((config.method, config.pair), []).append(line)
        blocks = []
        for (method, pair), lines in kinds.items():
            names = differing([run.config for line in lines for run in line.runs])
            if len(names) == 2:
                of = f" of {method}, {pair}" if "pair" in self.names else f" of {method}"
                blocks += self._grid(lines, names, of)
        return blocks

    def _grid(self, lines: Sequence[Line], names: Sequence[str], of: str) -> list[Block]:
        down, across = names
        means = {
            tuple(getattr(line.runs[0].config, name) for name in names): [
                run.result["dev"] for run in line.runs
            ]
            for line in lines
        }
        low, high = (limit(map(mean, means.values())) for limit in (min, max))
        columns = sorted({key[1] for key in means})
        rows = []
        for value in sorted({key[0] for key in means}):
            row = [Cell(shown(value))]
            for other in columns:
                scores = means.get((value, other))
                shade = (mean(scores) - low) / (high - low or 1) if scores else None
                row.append(Cell(f"{mean(scores):.4f}", mean(scores), shade) if scores else Cell("no run"))
            rows.append(row)
        title = f"{down.replace('_', '-')} ↓ × {across.replace('_', '-')} →"
        return [
            Heading(f"Mean dev {self.metric}{of}", 3),
            Paragraph(
                f"Coloured from the lowest, {low:.4f}, to the highest, {high:.4f}, however near they are."
            ),
            Table(["", *map(shown, columns)], rows, title, matrix=True),
        ]

    def confusions(self) -> list[Block]:
        name = self.lines[0].runs[0].task
        task = next(one for one in self.config.tasks if one.name == name)
        if not task.is_classification:
            return []
        heading, classes = Heading("Confusion on dev", 3), task.class_names
        try:
            labels = dev_labels(self.config, task)
            tables = []
            for line in self.lines:
                rows = [
                    [Cell(label), *(Cell(f"{share:.0%}", share, share) for share in shares)]
                    for label, shares in zip(classes, confusion(line.runs, labels, classes), strict=True)
                ]
                title = f"{line.number} {self.label(line)}"
                tables.append(Table(["label", *classes], rows, title, matrix=True))
        except InputError as error:
            return [heading, Paragraph(f"Left out: {error}")]
        given = list(labels.values())
        counts = ", ".join(f"{given.count(c)} of {name}" for c, name in enumerate(classes))
        text = f"A row per label, a column per predicted class, mean over seeds. dev has {counts}."
        return [heading, Paragraph(text), Row(tables)]

    def runs(self) -> list[Block]:
        rows, commands = [], []
        for line in self.lines:
            for run in sorted(line.runs, key=lambda run: run.config.seed):
                result, scores = run.result, [run.result[split] for split in ("dev", "train")]
                row = [Cell(run.folder.name), number(line.number), number(run.config.seed)]
                row += [*(Cell(f"{score:.4f}", score) for score in scores), number(result["best_epoch"])]
                row += [Cell(f"{result[name]:.0f}", result[name]) for name in list(COSTS)[:2]]
                rows.append(row)
                name = " ".join(run.folder.name.split())
                commands.append(f"{shlex.join(command_of(run.config))}  # {name}")
        return [
            Heading("Every run", 3),
            Table(RUNS, rows),
            Commands("The commands that made them", commands),
        ]


def number(value: int) -> Cell:
    return Cell(str(value), value)


def applies(config: Config, name: str) -> bool:
    """Whether a setting does anything in the config's method and number of tasks."""
    method = METHODS[config.method]
    if name in OF_SEVERAL and len(config.tasks) == 1:
        return False
    if name == "encoder_dropout":
        return method.trains_encoder or method.layer is not None
    return method.layer is not None or name not in OF_ADAPTERS


def differing(configs: Sequence[Config]) -> list[str]:
    """The settings but the seed that differ where they apply, and do not merely follow from others."""
    told = [(config, chosen(config)) for config in configs]
    names = []
    for name in vars(configs[0]):
        among = [(getattr(config, name), one.get(name)) for config, one in told if applies(config, name)]
        if name != "seed" and all(any(one[i] != among[0][i] for one in among) for i in range(2)):
            names.append(name)
    return names
