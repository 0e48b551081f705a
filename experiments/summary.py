"""Runs -> a table: `python -m experiments.summary runs/*`. Mean and spread over seeds, a row per setting."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from minibert.errors import InputError
from training.exit import run_command

SAME = ("task", "pair", "method", "model", "data", "metric")  # what runs of one row have in common
COLUMNS = ("task", "pair", "method", "trained", "seeds", "dev", "train", "seconds", "peak MiB")


def read_results(folders: Sequence[Path]) -> list[dict]:
    """The result of each run.

    Raises:
        InputError: if a folder holds no finished run of one task.
    """
    from minibert.files import read_json

    results = []
    for folder in folders:
        path = folder / "result.json"
        if not path.is_file():
            raise InputError(f"{folder}: expected a finished run, there is no {path.name} in it")
        result = read_json(path)
        missing = [key for key in (*SAME, "seed", "dev", "train", "train_seconds") if key not in result]
        if missing or not isinstance(result["dev"], float):
            raise InputError(f"{path}: expected the result of a run of one task")
        results.append(result)
    return results


def rows(results: Sequence[dict]) -> list[tuple[str, ...]]:
    """A row for each setting, in the order given; seeds are never picked, a repeated one is an error.

    Raises:
        InputError: if two runs of a setting have the same seed.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for result in results:
        groups[tuple(str(result[key]) for key in SAME)].append(result)
    table = []
    for (task, pair, method, *_), group in groups.items():
        seeds = [result["seed"] for result in group]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"{task} {pair} {method}: two runs have the same seed, of {sorted(seeds)}")
        share = group[0]["trainable_parameters"] / group[0]["total_parameters"]
        seconds = f"{mean(result['train_seconds'] for result in group):.0f}"
        peak = f"{max(result['peak_memory_mib'] for result in group):.0f}"
        scores = [spread([result[split] for result in group]) for split in ("dev", "train")]
        table.append((task, pair, method, f"{share:.1%}", str(len(seeds)), *scores, seconds, peak))
    return table


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    if len(sys.argv) < 2:
        raise InputError("expected the folders of finished runs: python -m experiments.summary runs/*")
    print(markdown(rows(read_results([Path(folder) for folder in sys.argv[1:]]))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
