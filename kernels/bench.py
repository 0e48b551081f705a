"""Time the low-rank operations and whole layers on a CUDA GPU: `python -m kernels.bench --csv FILE.csv`.

Each is timed by the kernels and, as `unfused`, by PyTorch's own operations within `without_kernels`; a layer,
forward and backward, also in PEFT's form where that is installed. They take turns, on operands that come
from DRAM (kernels/timing.py). The least time is that of our passes by kernels/costs.py, at the bandwidth and
the FLOPs that the device sustains; `reached` is its share of our time.

PEFT is set up at its cheapest: everything in the activations' dtype, the adapters too, no autocast. By
default get_peft_model keeps the adapters of such a base in fp32, and each layer then casts x to it. With
dropout its DoRA drops out the base term's input too, in a second product.
"""

import argparse
import csv
import importlib
import importlib.util
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kernels.costs import DROPOUT, LAYERS, PATHS, Layer, Limits, layer, seconds
from minibert.errors import InputError
from minibert.files import check_output, replacing, write_text
from training.cli import Parser
from training.exit import run_command

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kernels.cases import Call, Case
    from kernels.timing import Timer, Timing

OLDEST = {"fp16": (7, 0), "bf16": (8, 0)}  # compute capability with tensor cores for it
KINDS = ("operations", "layers")
WAYS = ("ours", "unfused", "PEFT")
PLOTS = (".png", ".svg", ".pdf")


class Row(NamedTuple):
    """A case as it was timed; the seconds below which our passes cannot go."""

    model: str
    sizes: Layer
    name: str
    times: "Mapping[str, Timing]"
    floor: float

    def ratio(self, other: str) -> float:
        """Our time as a part of another way's"""
        return self.times["ours"].gpu / self.times[other].gpu

    def reached(self) -> float:
        return self.floor / self.times["ours"].gpu


def layers(one: Layer, dtype: "torch.dtype", device: "torch.device") -> "Iterator[Case]":
    """LoRALinear and DoRALinear, with and without dropout: forward, and backward to x, A, B and m."""
    from torch import nn

    from kernels.cases import SCALING, Case

    for name, make in PATHS.items():
        if name == "frozen":
            continue
        settings = "DoRA" in name, DROPOUT if "dropout" in name else 0.0
        ways = our_ways(one, *settings, dtype, device)
        if installed():
            base = nn.Linear(one.K, one.N, device=device, dtype=dtype)
            ways["PEFT"] = training_step(peft_layer(base, one.r, SCALING, *settings), one, dtype, device)
        path = make(one)
        yield Case(name, ways, (*path.forward, *path.backward))


def installed() -> bool:
    return importlib.util.find_spec("peft") is not None


def peft_layer(base: "nn.Linear", rank: int, scaling: float, dora: bool, dropout: float) -> "nn.Module":
    """PEFT's layer around a frozen `base`; A, B and m in the dtype of its weight, and on its device."""
    from torch import nn

    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=rank, lora_alpha=scaling * rank, lora_dropout=dropout, use_dora=dora, target_modules=["0"]
    )
    return peft.inject_adapter_in_model(config, nn.Sequential(base.requires_grad_(False)))[0].train()


def our_ways(
    one: Layer, dora: bool, dropout: float, dtype: "torch.dtype", device: "torch.device"
) -> "dict[str, Call]":
    from torch import nn

    from kernels.cases import SCALING, unfused
    from kernels.dropout import install_dropout
    from lora.layers import DoRALinear, LoRALinear

    adapted = (DoRALinear if dora else LoRALinear)(
        nn.Linear(one.K, one.N, device=device), one.r, SCALING, dropout
    )
    adapted.bias.data = adapted.bias.data.to(dtype)  # as a run keeps it; W stays fp32
    model = nn.Sequential(adapted)
    key = install_dropout(model, seed=0)
    differentiate = training_step(model, one, dtype, device)

    def step() -> object:
        key.step = 0  # the uses of a mask are counted anew in each step
        return differentiate()

    return {"ours": step, "unfused": unfused(step)}


def training_step(model: "nn.Module", one: Layer, dtype: "torch.dtype", device: "torch.device") -> "Call":
    """y, and the gradients of the input and of all that trains"""
    import torch

    x = torch.randn(one.M, one.K, device=device).to(dtype).requires_grad_()
    dy = torch.randn(one.M, one.N, device=device).to(dtype)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(model(x), leaves, dy)


def measure(
    given: argparse.Namespace, dtype: "torch.dtype", device: "torch.device", timer: "Timer", limits: Limits
) -> Iterator[Row]:
    """Every case of the flags, shape by shape: the tensors of one are let go before the next are made."""
    from kernels.cases import operations
    from kernels.launch import architecture

    kinds = {"operations": operations, "layers": layers}
    shapes = ((model, K, N) for model in given.models for K, N in LAYERS[model])
    for (model, K, N), M, rank, kind in product(shapes, given.tokens, given.ranks, given.kinds):
        one = layer(M, K, N, rank, architecture(device))
        for case in kinds[kind](one, dtype, device):
            times = dict(zip(case.ways, timer(list(case.ways.values())), strict=True))
            yield Row(model, one, case.name, times, seconds(case.passes, limits))


def table(rows: Sequence[Row]) -> str:
    """Microseconds; `/unfused` and `/PEFT`: our time as a part of theirs."""
    cells = [("layer", "tokens", "rank", "what", *WAYS, "/unfused", "/PEFT", "at least", "reached")]
    for row in rows:
        times = [f"{row.times[way].gpu * 1e6:.1f}" if way in row.times else "-" for way in WAYS]
        ratios = [f"{row.ratio(way):.2f}" if way in row.times else "-" for way in WAYS[1:]]
        shape = (f"{row.model} {row.sizes.K} -> {row.sizes.N}", str(row.sizes.M), str(row.sizes.r), row.name)
        cells.append((*shape, *times, *ratios, f"{row.floor * 1e6:.1f}", f"{row.reached():.0%}"))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def csv_text(rows: Sequence[Row], device: str, dtype: str) -> str:
    """A line a case, in microseconds: the GPU's time, and the CPU's until all was launched."""
    head = ["device", "dtype", "model", "K", "N", "tokens", "rank", "what"]
    head += [f"{way}_{where}_us" for way in WAYS for where in ("gpu", "cpu")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "at_least_us"])
    for row in rows:
        one = row.sizes
        line = [device, dtype, row.model, one.K, one.N, one.M, one.r, row.name]
        for way in WAYS:
            line += [f"{t * 1e6:.2f}" for t in row.times[way]] if way in row.times else ["", ""]
        writer.writerow([*line, f"{row.floor * 1e6:.2f}"])
    return text.getvalue()


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Times as parts of the unfused one's, a line a case."""
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(9, 1.5 + 0.22 * len(rows)), layout="constrained"
    )
    axes = figure.add_subplot()
    labels = [
        f"{row.model} {row.sizes.K}→{row.sizes.N}, {row.sizes.M} × r {row.sizes.r}: {row.name}"
        for row in rows
    ]
    whole = [row.times["unfused"].gpu for row in rows]
    for way, marker in (("ours", "o"), ("PEFT", "s")):
        there = [i for i, row in enumerate(rows) if way in row.times]
        axes.plot([rows[i].times[way].gpu / whole[i] for i in there], there, marker, label=way)
    floors = [row.floor / one for row, one in zip(rows, whole, strict=True)]
    axes.plot(floors, range(len(rows)), "|", color="black", label="ours at least")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="time / unfused time", title=title)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(loc="outside lower center", ncols=3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for what makes no sense, before anything is timed."""
    parser = Parser(prog="python -m kernels.bench", description="Time the kernels on a CUDA GPU.")
    choose = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--kinds", choices=KINDS, default=KINDS, help=" ".join(KINDS), **choose)
    parser.add_argument("--models", choices=LAYERS, default=tuple(LAYERS), help=" ".join(LAYERS), **choose)
    parser.add_argument("--tokens", type=int, nargs="+", default=(1280, 4096), help="(1280 4096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=(8,), help="(8)")
    parser.add_argument("--dtype", choices=OLDEST, default="fp16", help="bf16 needs sm_80 (fp16)")
    parser.add_argument("--repeats", type=int, default=50, help="of each call, for the median (50)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a line for each case there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="and a picture, by matplotlib")
    given = parser.parse_args(arguments)
    narrowest = min(width for model in given.models for sizes in LAYERS[model] for width in sizes)
    for name, most in (("tokens", 2**20), ("ranks", narrowest), ("repeats", 10_000)):
        value = getattr(given, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if not 1 <= number <= most:
                raise InputError(f"--{name}: expected 1 to {most}, got {number}")
    check_outputs(given.csv, given.plot)
    return given


def check_outputs(csv_file: Path | None, plot_file: Path | None) -> None:
    check_output(csv_file, "--csv")
    check_output(plot_file, "--plot")
    if plot_file is None:
        return
    if plot_file.suffix not in PLOTS:
        raise InputError(f"--plot: expected a file that ends in {', '.join(PLOTS)}, got {plot_file}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot: matplotlib is not installed: pip install matplotlib")


def run(given: argparse.Namespace, device: "torch.device", name: str, timer: "Timer") -> None:
    """Time, print, and write what the flags ask for."""
    from kernels import timing
    from training.precision import DTYPES

    limits = timing.sustained(timer, device, DTYPES[given.dtype])
    rows = list(measure(given, DTYPES[given.dtype], device, timer, limits))
    reach = f"copies at {limits.bandwidth / 1e9:.0f} GB/s, products at {limits.products / 1e12:.1f} TFLOP/s"
    print(f"{name}, {given.dtype}: {reach}; times in us\n")
    print(table(rows))
    if not installed():
        print("\nPEFT is not installed: its column is empty")
    if given.csv:
        write_text(csv_text(rows, name, given.dtype), given.csv)
    if given.plot:
        plot(rows, f"{name}, {given.dtype}", given.plot)


def main() -> int:
    given = parse(sys.argv[1:])
    import torch

    from kernels.timing import CudaTimer

    if not torch.cuda.is_available():
        raise InputError("no CUDA device: there is nothing to time; python -m kernels.roofline needs none")
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST[given.dtype]:
        oldest = "sm_{}{}".format(*OLDEST[given.dtype])
        raise InputError(f"--dtype {given.dtype}: expected {oldest} or newer, this is sm_{major}{minor}")
    run(given, device, torch.cuda.get_device_name(device), CudaTimer(given.repeats, device))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
