"""The largest batch that memory has room for: `python -m experiments.batch_size --task sts --method lora`.

As the study did, the batch grows from 8, twofold, while it fits; then a line through what was measured,
peak = a + b · batch, says which multiple of 8 is the last to fit, and that is measured too. Nothing is tried
that the line says would not fit. Each size is a process of its own that trains two steps on the batch's worth
of the data's longest examples: the worst that an epoch can bring. Flags beside these are train.py's.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from experiments.batch_step import measure_apart
from minibert.errors import InputError
from minibert.files import check_output, write_text
from training.cli import Parser, parse
from training.exit import run_command

FIRST = 8  # examples; and the step between sizes
COLUMNS = ("batch", "tokens", "peak GiB", "of what there is", "examples/s")
GIB = 2**10  # MiB


@dataclass(frozen=True)
class Step:
    """A training step on a batch of some size, as measured.

    Attributes:
        peak: MiB, of the whole process, or allocated on a GPU.
        fits: whether it ended; a GPU may be out of memory.
    """

    tokens: int
    peak: float
    examples_per_second: float
    fits: bool = True


def largest(measure: Callable[[int], Step], room: float, most: int) -> dict[int, Step]:
    """All sizes that were measured on the way to the largest multiple of 8 whose peak is within `room` MiB.

    `most`: the number of examples there are; no size is above it.
    """
    sizes: dict[int, Step] = {}

    def fits(size: int) -> bool:
        if size not in sizes:
            sizes[size] = measure(size)
        return sizes[size].fits and sizes[size].peak <= room

    good, bad = 0, most // FIRST * FIRST + FIRST  # the largest that fits, the least that does not, so far
    size, failed = FIRST, False
    while good < size < bad:
        if fits(size):
            good = size
            size = min(2 * good, last_within(sizes, room), bad - FIRST)
        else:
            bad, failed = size, True
        if failed and size >= bad - FIRST:  # the line says too much, or there is none: halve what is left
            size = (good + bad) // 2 // FIRST * FIRST
    return dict(sorted(sizes.items()))


def last_within(sizes: Mapping[int, Step], room: float) -> int:
    """The last multiple of 8 that peak = a + b · batch, through the two largest that fitted, lets fit.

    Of one size alone nothing follows. The longest examples come first, so tokens, and the peak, grow more
    slowly than the batch: the line is on the safe side.
    """
    known = sorted(size for size, step in sizes.items() if step.fits)
    if len(known) < 2:
        return sys.maxsize - FIRST
    low, high = known[-2:]
    slope = (sizes[high].peak - sizes[low].peak) / (high - low)
    if slope <= 0:
        return sys.maxsize - FIRST
    return int(high + (room - sizes[high].peak) / slope) // FIRST * FIRST


def rows(sizes: Mapping[int, Step], memory: float) -> list[tuple[str, ...]]:
    return [
        (
            str(size),
            f"{step.tokens:,}",
            f"{step.peak / GIB:.2f}",
            f"{step.peak / memory:.0%}",
            f"{step.examples_per_second:.0f}",
        )
        if step.fits
        else (str(size), f"{step.tokens:,}", "out of memory", "", "")
        for size, step in sizes.items()
    ]


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m experiments.batch_size",
        description=__doc__,
        epilog="All settings of train.py are flags here too: python train.py --help.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", type=float, help="GiB there are [the GPU's; else what is available now]")
    parser.add_argument("--limit", type=float, default=0.9, help="the share of it that may be taken (0.9)")
    parser.add_argument("--out", type=Path, help="write the table there, as CSV")
    return parser


def main() -> int:
    given, settings = build_parser().parse_known_args()
    check_output(given.out, "--out")
    config, others = parse(settings)
    if others.resume or others.overfit_batch:
        raise InputError("expected settings of a run; --resume and --overfit-batch are train.py's alone")
    if config.method == "frozen":
        raise InputError("--method frozen: its encoder reads the data once, whatever the batch")
    if given.memory is not None and given.memory <= 0:
        raise InputError(f"--memory: expected GiB above 0, got {given.memory:g}")
    if not 0 < given.limit <= 1:
        raise InputError(f"--limit: expected a share above 0 and at most 1, got {given.limit:g}")
    from experiments.batch_step import examples_in, memory_of
    from experiments.summary import markdown

    memory = given.memory * GIB if given.memory else memory_of(config.device)
    room, seen = given.limit * memory, examples_in(config)
    print(f"{memory / GIB:.2f} GiB, of which a run may take {room / GIB:.2f}; {seen:,} examples", flush=True)
    sizes = largest(partial(told, config), room, seen)
    fitting = [size for size, step in sizes.items() if step.fits and step.peak <= room]
    table = rows(sizes, memory)
    print(markdown(table, COLUMNS))
    if given.out:
        text = [COLUMNS, *((cell.replace(",", "") for cell in row) for row in table)]
        write_text("".join(",".join(row) + "\n" for row in text), given.out)
    if not fitting:
        peak = sizes[FIRST].peak / GIB if FIRST in sizes else 0
        raise InputError(f"expected room for a batch of {FIRST}, {peak:.2f} GiB; got {room / GIB:.2f} GiB")
    print(f"largest batch: {max(fitting)}")
    return 0


def told(config, size: int) -> Step:
    print(f"a batch of {size} ...", file=sys.stderr, flush=True)
    return Step(**measure_apart(config, size))


if __name__ == "__main__":
    sys.exit(run_command(main))
