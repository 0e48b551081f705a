"""What the processes of benchmarks.train_speed said, as a table and a plot. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.tables import with_range
from benchmarks.turns import Round, paired
from lora.methods import METHODS
from minibert.errors import InputError
from minibert.files import replacing

OURS, RATES = "ours", "matrix products"
# Each variant: which program, and what sets it apart. None: for methods without adapters there is no such.
VARIANTS = {
    OURS: ("ours",),
    "ours, adapters' dropout .1": ("ours", "--lora-dropout", "0.1"),
    "ours, batches of like length": ("ours", "--order", "like-length"),
    "peer, default": ("peer", "--settings", "default"),
    "peer, best in fp32": ("peer", "--settings", "best"),
    "peer, best in bf16": ("peer", "--settings", "best", "--precision", "bf16"),
}
BEST = ("peer, best in fp32", "peer, best in bf16")  # ours is compared with the faster
PEER = "transformers + PEFT"
COLOURS = dict(zip(VARIANTS, ("#1f5fa8", "#5b93cf", "#a3c4e8", "#c9c9c9", "#9a9a9a", "#6b6b6b"), strict=True))
# FLOPs for each weight and token: forward 2, for the input's gradient 2, and for the weight's another 2.
FLOPS = {"lora": 4, "dora": 4, "full": 6}
COLUMNS = (
    "method",
    "variant",
    "precision",
    "s/epoch",
    "tokens/s",
    "ratio",
    "peak MiB above start",
    "dev",
    "of bf16",
    "of fp32",
)


def variants_of(method: str, among: Sequence[str] = tuple(VARIANTS)) -> list[str]:
    """Those of `among` that a method has; ours, which the others are compared with, in any case."""
    has_adapters = METHODS[method].layer is not None
    return [
        name
        for name, words in VARIANTS.items()
        if (name in among or name == OURS) and (has_adapters or "--lora-dropout" not in words)
    ]


def measured(rounds: Sequence[Round], method: str) -> list[str]:
    """The variants of a method that have had their turns."""
    return [name for name in VARIANTS if f"{method}: {name}" in rounds[0]]


def check_alike(rounds: Sequence[Round], method: str) -> None:
    """Raises InputError unless all variants trained as many parameters on as many tokens."""
    for one in rounds:
        ours = one[f"{method}: {OURS}"]
        for name in measured(rounds, method):
            for key in ("tokens", "trainable_parameters"):
                did = one[f"{method}: {name}"][key]
                if did != ours[key]:
                    raise InputError(f"{method}: {name}: expected our {key}, {ours[key]}, got {did}")


def share_of_limit(one: Round, method: str, name: str, weights: int, dtype: str) -> float:
    """The least seconds for the encoder's products at the rate measured in this round / the seconds taken."""
    did = one[f"{method}: {name}"]
    return FLOPS[method] * weights * did["tokens_per_second"] / one[RATES][dtype]


def rows(rounds: Sequence[Round], methods: Sequence[str], weights: int) -> list[tuple[str, ...]]:
    """A line for each method and variant."""
    lines = []
    for method in methods:
        check_alike(rounds, method)
        for name in measured(rounds, method):
            told = [one[f"{method}: {name}"] for one in rounds]
            ratio = paired(rounds, f"{method}: {name}", f"{method}: {OURS}", "epoch_seconds")
            shares = [
                f"{median(share_of_limit(one, method, name, weights, dtype) for one in rounds):.1%}"
                for dtype in ("bf16", "fp32")
            ]
            lines.append(
                (
                    method,
                    name,
                    told[0]["precision"],
                    with_range([one["epoch_seconds"] for one in told], 2),
                    f"{median(one['tokens_per_second'] for one in told):.0f}",
                    with_range(ratio),
                    f"{median(one['memory_above_start_mib'] for one in told):.0f}",
                    with_range([one["dev"] for one in told], 4),
                    *shares,
                )
            )
    return lines


def rates_line(rounds: Sequence[Round]) -> str:
    """How fast the machine multiplied: what the shares are shares of."""
    bf16, fp32 = (median(one[RATES][dtype] for one in rounds) / 1e9 for dtype in ("bf16", "fp32"))
    return f"matrix products: {bf16:.0f} GFLOP/s in bf16, {fp32:.0f} in fp32"


def verdict(rounds: Sequence[Round], method: str) -> str | None:
    """How ours compares with the faster of the peer's best settings; None if they were not measured."""
    tried = [name for name in BEST if name in measured(rounds, method)]
    if not tried:
        return None
    ratios = {
        name: paired(rounds, f"{method}: {name}", f"{method}: {OURS}", "epoch_seconds") for name in tried
    }
    name = min(tried, key=lambda name: median(ratios[name]))
    return f"{method}: ours is {with_range(ratios[name])} times as fast as {name}, the peer's fastest"


def plot(rounds: Sequence[Round], methods: Sequence[str], weights: int, path: Path) -> None:
    """Real tokens a second, a bar for each variant of each method, below the rate of the products alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for i, method in enumerate(methods):
        names = measured(rounds, method)
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            rates = [one[f"{method}: {name}"]["tokens_per_second"] for one in rounds]
            middle = median(rates)
            ends = [[middle - min(rates)], [max(rates) - middle]]
            label = name.replace("peer", "transformers + PEFT")
            told = label in axes.get_legend_handles_labels()[1]
            look = {"color": COLOURS[name], "label": None if told else label}
            axes.bar(i + (place + 0.5) * width, middle, width, yerr=ends, **look)
        precision = rounds[0][f"{method}: {OURS}"]["precision"]
        limit = median(one[RATES][precision] for one in rounds) / (FLOPS[method] * weights)
        label = f"the matrix products in {precision} alone"
        axes.hlines(limit, i, i + 0.8, "black", "dashed", label=None if i else label)
    axes.set_xticks([i + 0.4 for i in range(len(methods))], methods)
    axes.set_ylabel("real tokens a second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
