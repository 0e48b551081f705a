"""Settings that are a number for each of some tasks, as `sst=0.5 sts=1`. Imports no torch."""

from collections.abc import Sequence


def check_numbers(given: Sequence[str], tasks: Sequence[str], low: float, high: float, wanted: str) -> None:
    """Raises:
    ValueError: for a part that is no TASK=NUMBER, of a task that the run lacks or that came before, or with
        a number out of range.
    """
    seen = set()
    for part in given:
        task, equals, number = part.partition("=")
        if not equals:
            raise ValueError(f"expected TASK=NUMBER, as in {tasks[0]}=0.5, got {part!r}")
        if task not in tasks:
            raise ValueError(f"expected tasks of the run, {', '.join(tasks)}; got {task!r}")
        if task in seen:
            raise ValueError(f"expected each task once, got {task!r} twice")
        seen.add(task)
        try:
            fits = low <= float(number) <= high
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"expected {wanted} for {task}, got {number!r}")


def numbers(given: Sequence[str]) -> dict[str, float]:
    """Of parts that were checked, by task."""
    return {task: float(number) for task, _, number in (part.partition("=") for part in given)}
