"""What a GPU day has found so far, as a long CSV, a Markdown page and a plot. Imports no torch."""

import csv
import importlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from minibert.files import replacing

COLUMNS = ("part", "case", "side", "measure", "value")
SIDES = ("ours", "peer")
BAD = ("failed", "error")  # outcomes of a test
# Columns of a training step's table, and what they show.
STEP = {"ms": "step_ms", "peak MiB": "peak_mib", "launches": "launches", "GPU ms": "gpu_ms", "waits": "waits",
        "first step s": "first_step_s"}  # fmt: skip
TINY = "Tiny shapes on a CPU: this shows that the command works. The times say nothing about a GPU."


class Findings:
    """What was measured, what was left out and why, and what failed.

    Attributes:
        measured: (part, case) -> its measures; a training step's case ends with its side.
        skipped: reason -> what it kept from being measured.
        failed: what ended with an error -> why.
        kernels: the lines of kernels.bench, the header first.
    """

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.measured: dict[tuple[str, str], dict] = {}
        self.skipped: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}
        self.kernels: list[dict[str, str]] = []

    def add(self, part: str, case: str, measures: Mapping) -> None:
        if "skipped" in measures:
            self.skip(measures["skipped"], f"{part} {case}")
        else:
            self.measured[part, case] = dict(measures)

    def skip(self, reason: str, *what: str) -> None:
        self.skipped.setdefault(reason, []).extend(what)

    def part(self, name: str) -> dict[str, dict]:
        return {case: measures for (part, case), measures in self.measured.items() if part == name}

    def pairs(self) -> dict[str, dict[str, dict]]:
        """Of training steps: case -> side -> measures"""
        found: dict[str, dict[str, dict]] = {}
        for case, measures in self.part("steps").items():
            shape, _, side = case.rpartition(" ")
            found.setdefault(shape, {})[side] = measures
        return found

    def ratios(self) -> dict[str, float]:
        """The peer's time over ours, where both were measured"""
        return {
            case: sides["peer"]["step_ms"] / sides["ours"]["step_ms"]
            for case, sides in self.pairs().items()
            if len(sides) == 2
        }

    def share(self, case: str, measures: Mapping) -> float | None:
        """The matrix products' share of a step, if they ran at the rate of the large product."""
        ceiling = self.part("ceilings").get(case.split()[2])
        return ceiling and measures["tflop"] / (measures["step_ms"] / 1e3) / ceiling["tflop_per_s"]

    def wrong(self) -> dict[str, str]:
        """The checks that failed: losses that differ, tests that fail, and what ended with an error."""
        found = {
            f"losses of {method}": "they differ by {difference:.1e}, allowed {allowed:.0e}".format(**measures)
            for method, measures in self.part("losses").items()
            if measures["verdict"] != "agree"
        }
        found |= {
            name: measures.get("reason", "failed")
            for name, measures in self.part("tests").items()
            if measures["outcome"] in BAD
        }
        return found | self.failed


def csv_text(findings: Findings) -> str:
    """A line for each number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (part, case), measures in findings.measured.items():
        shape, _, side = case.rpartition(" ") if part == "steps" else (case, "", "")
        writer.writerows((part, shape, side, name, value) for name, value in measures.items())
    writer.writerows(
        ("steps", case, "peer/ours", "ratio", f"{one:.4f}") for case, one in findings.ratios().items()
    )
    writer.writerows(
        ("skipped", what, "", "reason", why) for why, all_ in findings.skipped.items() for what in all_
    )
    writer.writerows(("failed", what, "", "reason", why) for what, why in findings.failed.items())
    return text.getvalue()


def kernels_text(findings: Findings) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(findings.kernels[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(findings.kernels)
    return text.getvalue()


def markdown(findings: Findings, state: str) -> str:
    """The page; `state` says how much of the time is spent."""
    facts = findings.part("facts").get("", {})
    card = facts.get("card", "an unknown card")
    parts = [f"# GPU day: {card}\n", f"{TINY}\n" if findings.tiny else "", f"{state}\n"]
    parts += [table(("what", "result"), summary(findings))]
    sections = {
        "What failed": table(("what", "why"), list(findings.wrong().items())),
        "Training steps": steps_table(findings),
        "Losses on the device and on the CPU": losses_table(findings),
        "Kernels": kernels_table(findings),
        "Ceilings": ceilings_table(findings),
        "Skipped": table(
            ("reason", "what"), [(why, several(what)) for why, what in findings.skipped.items()]
        ),
        "Machine": table(("what", "value"), [(name, str(value)) for name, value in facts.items()]),
    }
    parts += [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n".join(part for part in parts if part)


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Nothing where there are no lines"""
    if not lines:
        return ""
    cells = [columns, ["---"] * len(columns), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in cells)


def several(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def summary(findings: Findings) -> list[tuple[str, str]]:
    """One screen: what agrees, what passed, how fast, what is missing."""
    lines, losses, ratios = [], list(findings.part("losses").values()), findings.ratios()
    if losses:
        agree = sum(measures["verdict"] == "agree" for measures in losses)
        largest = max(measures["difference"] for measures in losses)
        text = f"{agree} of {len(losses)} methods agree with the CPU; largest difference {largest:.1e}"
        lines.append(("losses", text))
    outcomes = Counter(measures["outcome"] for measures in findings.part("tests").values())
    if outcomes:
        text = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        lines.append(("tests that need a GPU", text))
    if ratios:
        values = list(ratios.values())
        spread = f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"
        faster = f"we are faster in {sum(ratio > 1 for ratio in values)} of {len(values)} cases"
        lines.append(("training steps", f"the peer takes {spread} times our time; {faster}"))
        lines += [(f"- {case}", f"{ratio:.2f} times our time") for case, ratio in list(ratios.items())[:8]]
    if findings.kernels:
        lines.append(("kernels", f"{len(findings.kernels)} cases"))
    skipped = sum(map(len, findings.skipped.values()))
    return [*lines, ("failed", str(len(findings.wrong()))), ("skipped", str(skipped))]


def steps_table(findings: Findings) -> str:
    """In each cell ours, then the peer's."""
    ratios, lines = findings.ratios(), []
    for case, sides in findings.pairs().items():
        shares = {side: findings.share(case, measures) for side, measures in sides.items()}
        cells = [
            " / ".join(number(sides.get(side, {}).get(name)) for side in SIDES) for name in STEP.values()
        ]
        cells.append(" / ".join(f"{shares[side]:.1%}" if shares.get(side) else "-" for side in SIDES))
        lines.append((case, f"**{ratios[case]:.2f}**" if case in ratios else "-", *cells))
    note = "Each cell: ours / transformers + PEFT. A step is the median of several blocks of steps.\n\n"
    return note + table(("case", "peer/ours", *STEP, "of products"), lines) if lines else ""


def number(value: float | None) -> str:
    """Three digits or, of a large one, all before the point"""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def losses_table(findings: Findings) -> str:
    numbers = ("difference", "allowed", "first", "last")
    lines = [
        (method, measures["verdict"], *(f"{measures[name]:.3g}" for name in numbers))
        for method, measures in findings.part("losses").items()
    ]
    return table(("method", "verdict", *numbers), lines)


def ceilings_table(findings: Findings) -> str:
    lines = [
        (precision, number(measures["copy_gb_per_s"]), number(measures["tflop_per_s"]))
        for precision, measures in findings.part("ceilings").items()
    ]
    return table(("precision", "copy, GB/s", "matrix product, TFLOP/s"), lines)


def kernels_table(findings: Findings) -> str:
    """Medians over the shapes of a model; kernels.csv has each."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for line in findings.kernels:
        groups.setdefault((line["model"], line["dtype"], line["tokens"], line["what"]), []).append(line)
    lines = []
    for names, shapes in groups.items():
        ratios = [middle(shapes, name) for name in ("unfused_gpu_us", "PEFT_gpu_us", "at_least_us")]
        lines.append((*names, *ratios))
    columns = ("model", "dtype", "tokens", "what", "unfused/ours", "PEFT/ours", "least time/ours")
    return table(columns, lines)


def middle(lines: Sequence[Mapping[str, str]], name: str) -> str:
    """The median of a time over ours"""
    ratios = [float(line[name]) / float(line["ours_gpu_us"]) for line in lines if line[name]]
    return f"{median(ratios):.2f}" if ratios else "-"


def plot(findings: Findings, path: Path) -> None:
    """A bar for each case: the peer's time over ours."""
    ratios = findings.ratios()
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(8, 1.5 + 0.25 * len(ratios)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.barh(range(len(ratios)), list(ratios.values()), color="tab:blue")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(ratios)), list(ratios), fontsize=7)
    axes.invert_yaxis()
    card = findings.part("facts").get("", {}).get("card", "")
    title = f"{card}{', tiny shapes' if findings.tiny else ''}: a training step"
    axes.set(xlabel="time of transformers + PEFT / our time", title=title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
