"""A run's model card: README.md in its folder, as Hugging Face reads it, made of what the run knows.

Equal runs have equal cards: neither times nor the folder's name are in it. The licence is left to the user,
so no hash is kept of the file. Texts of the data are counted, never shown: they may be private.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora.methods import METHODS
from minibert.hub import published
from tasks.base import Task
from training.build import Splits
from training.cli import command_of
from training.config import Config, to_dict
from training.data_notes import ORIGINS, UNKNOWN, found, limits
from training.evaluate import Prediction
from training.report import constants, epochs
from training.snippets import Snippet, snippets

FEWEST = 4  # dev examples, for an interval
LANGUAGE = "en"  # of the data this project knows
MINILM = (
    "all-MiniLM-L6-v2 was trained on a billion sentence pairs, Quora's duplicates among them: scores on "
    "Quora and STS do not compare with those of encoders that saw none."
)
ALWAYS = (
    "The epoch was chosen by the dev score, which is therefore a little too high; there is no score on "
    "unseen labelled data.",
    "One run of one seed: the interval is over the choice of dev examples alone, and says nothing of seeds.",
    "The base model brings what its own training data held, biases among it; nothing here looked for them.",
)


@dataclass(frozen=True)
class Scored:
    """A task of the run: its rows, what the kept weights say of dev, and dev's labels [n]."""

    task: Task
    splits: Splits
    dev: Prediction
    labels: np.ndarray
    origin: str | None  # of the data: demo, cs224n or not known


def model_card(config: Config, result: Mapping, scored: Sequence[Scored], has_classifier: bool) -> str:
    """The whole file; `result` is what result.json will say.

    `has_classifier`: the head is what transformers' BertForSequenceClassification has.
    """
    tasks, base = " + ".join(task.name for task in config.tasks), code(_name(config.model))
    intervals = {one.task.name: interval_of(one) for one in scored}
    parts = [
        front_matter(config, result, scored),
        f"# {tasks} by {config.method}, on {base}",
        *(task.about for task in config.tasks if task.about),
        about(config, result),
        "## Scores",
        scores(config, result, scored, intervals),
        "## Data",
        *(data(config, result, one) for one in scored),
        "## Limits and biases",
        bullets(known_limits(config, result, scored)),
        "## Use",
        use(config),
        *(shown(one) for one in snippets(config, has_classifier)),
        "## Settings",
        "Those that are not at their default are in the command that makes the run again:",
        indented(shlex.join(command_of(config))),
        "All of them, and what it ran on:",
        indented(json.dumps(to_dict(config) | {"versions": result["versions"]}, indent=2)),
    ]
    return "\n\n".join(parts) + "\n"


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def front_matter(config: Config, result: Mapping, scored: Sequence[Scored]) -> str:
    """YAML; every text from outside is a quoted scalar in ASCII."""
    known = {one.origin for one in scored}
    model, method = published(config.model), METHODS[config.method]
    siamese = all(config.siamese(task) for task in config.tasks)
    kind = "sentence-similarity" if siamese else "text-classification"
    lines = ["---", "# license: yours to choose; the base model and the data have their own"]
    lines += [f"language: {LANGUAGE}"] if None not in known else []
    lines += [f"base_model: {quoted(model.repo)}"] if model else []
    lines += [f"library_name: {'peft' if method.layer else 'transformers'}", f"pipeline_tag: {kind}", "tags:"]
    lines += [f"- {tag}" for tag in ("minibert", config.method, *(task.name for task in config.tasks))]
    lines += ["model-index:", f"- name: {quoted(f'{config.task}-{config.method}')}", "  results:"]
    for task in config.tasks:
        lines += [
            "  - task:",
            f"      type: {kind}",
            "    dataset:",
            f"      name: {quoted(f'{task.name}, {_name(config.data)}, dev')}",
            f"      type: {quoted(task.name)}",
            "      split: dev",
            "    metrics:",
        ]
        for name, value in result["metrics"]["dev"][task.name].items():
            lines += [f"    - type: {name}", f"      value: {value:.6f}"]
    return "\n".join([*lines, "---"])


def about(config: Config, result: Mapping) -> str:
    trained, total = result["trainable_parameters"], result["total_parameters"]
    lines = [f"{trained:,} of {total:,} parameters were trained ({trained / total:.2%})."]
    if config.scaling is not None:
        scale = f"alpha {config.alpha:g} (the update is scaled by {config.scaling:.4g})"
        targets = " ".join(code(one) for one in (*config.targets, *config.rank_pattern))
        lines.append(f"Adapters of rank {config.rank}, {scale}, on {targets}.")
    if any(task.is_pair for task in config.tasks):
        how = "each sentence on its own" if config.pair == "siamese" else "both sentences as one sequence"
        compared = f", compared by {config.features}" if config.pair == "siamese" else ""
        lines.append(f"A pair is read as {how}{compared}.")
    lines.append(f"Pooling {config.pooling}; what is longer than {config.max_length} tokens is cut.")
    lines.append(f"Kept: the weights after {epochs(result['best_epoch'])} of {result['epochs']}.")
    return bullets(lines)


def interval_of(one: Scored) -> tuple[float, float] | None:
    """95 % of the first metric over dev examples; None of too few, or of predictions that are not finite."""
    if len(one.labels) < FEWEST or not one.dev.is_finite:
        return None
    from tasks.bootstrap import interval, score_of  # SciPy's, which takes half a second to import

    score = score_of(one.task.metrics[0], one.dev.predictions[None], one.labels)
    return interval(score, len(one.labels))


def scores(
    config: Config,
    result: Mapping,
    scored: Sequence[Scored],
    intervals: Mapping[str, tuple[float, float] | None],
) -> str:
    rows = [
        "| task | metric | dev | 95 % interval | examples | train (a sample) |",
        "|---|---|---|---|---|---|",
    ]
    for one in scored:
        name = one.task.name
        for metric, value in result["metrics"]["dev"][name].items():
            ends = intervals[name] if metric == one.task.metrics[0] else None
            told = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
            train = result["metrics"]["train"][name].get(metric)
            seen = "" if train is None else f"{train:.4f}"
            rows.append(f"| {name} | {metric} | {value:.4f} | {told} | {len(one.labels):,} | {seen} |")
    note = (
        "The interval is by the bootstrap over dev examples (BCa, 1,999 resamples; percentile above 3,000)."
    )
    return "\n".join([*rows, "", note])


def data(config: Config, result: Mapping, one: Scored) -> str:
    where = ORIGINS[one.origin] if one.origin else UNKNOWN
    named = "" if config.data in ORIGINS else f", read from {code(_name(config.data))}"
    counts = [
        f"{len(rows):,} {split}" for split, rows in vars(one.splits).items() if rows and split != "skipped"
    ]
    hashes = result["sha256"]["data"]
    files = [f"| {code(name)} | `{hashes[name]}` |" for name in one.task.files.values() if name in hashes]
    return "\n".join(
        [
            f"**{one.task.name}**: {where}{named}. Examples: {', '.join(counts)}.",
            "",
            "| file | sha256 |",
            "|---|---|",
            *files,
            "",
            bullets(found(one.task, one.splits)),
        ]
    )


def known_limits(config: Config, result: Mapping, scored: Sequence[Scored]) -> list[str]:
    whose: dict[str, list[str]] = {}
    for one in scored:
        for text in limits(one.origin, one.task):
            whose.setdefault(text, []).append(one.task.name)
    told = [f"{', '.join(names)}: {text}" for text, names in whose.items()]
    model = published(config.model)
    if model and model.repo.endswith("/all-MiniLM-L6-v2"):
        told.append(MINILM)
    told += [f"{one}." for one in constants(result)]
    if result["resumed_anyway"]:
        told.append("The run was gone on with after something of it had changed; see result.json.")
    return [*told, *ALWAYS]


def use(config: Config) -> str:
    """With this project, whose commands read any run."""
    task = config.tasks[0]
    texts = '"A quiet, lovely film."' if not task.is_pair else '"A cat sleeps." "A cat is asleep."'
    which = f" --task {task.name}" if len(config.tasks) > 1 else ""
    return (
        "Each piece below runs as it is, in this folder. With minibert itself:\n\n"
        f"```bash\npython -m predict .{which} --text {texts}\n```"
    )


def shown(one: Snippet) -> str:
    shell = f"```bash\n{one.shell}\n```\n\n" if one.shell else ""
    return f"### {one.title}\n\n{one.about}\n\n{shell}```python\n{one.code}\n```"


def _name(place: str) -> str:
    """A model's or data's name; of a folder the last part, for the rest is this machine's alone."""
    return Path(place).name if Path(place).is_absolute() else place


def code(text: str) -> str:
    """Any text as code within a line, whatever it holds; in a table too."""
    text = " ".join(re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text).split())
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def quoted(text: str) -> str:
    """As a scalar of YAML in double quotes, in ASCII."""
    return '"' + "".join(one if _plain(one) else f"\\U{ord(one):08X}" for one in text) + '"'


def _plain(one: str) -> bool:
    return " " <= one <= "~" and one not in '"\\'


def indented(text: str) -> str:
    """A block of code that nothing in it can end."""
    return "\n".join(f"    {line}" for line in code_lines(text))


def code_lines(text: str) -> Sequence[str]:
    return text.encode("utf-8", "backslashreplace").decode("utf-8").splitlines() or [""]
