"""Where a run computes, and in which dtype.

On a CPU, `auto` times a layer's matrix products in fp32 and in bf16, and takes the faster. A CPU's flags do
not tell: some list bf16 instructions that run at half the rate of fp32's, others multiply bf16 four times
as fast. The rates are kept in the cache, so that the same command makes the same choice again.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minibert.cache import cache_root
from minibert.errors import InputError
from minibert.files import read_json, write_json
from minibert.model import BertConfig
from training.machine import cpu, has_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BUDGET = 0.045  # seconds of timing; with its set-up less than 0.05
FEWEST_ROWS, MOST_ROWS = 16, 512  # tokens in a timed product; a batch has some hundreds
MARGIN = 1.1  # bf16 has to be faster than fp32 by more than this: it has fewer digits

Multiply = Callable[[int, str], float]
Clock = Callable[[], float]  # seconds


class Rates(NamedTuple):
    """How fast a CPU multiplies matrices, in FLOP/s."""

    fp32: float
    bf16: float

    @property
    def faster(self) -> str:
        return "bf16" if self.bf16 > MARGIN * self.fp32 else "fp32"

    def __str__(self) -> str:
        return f"{self.fp32 / 1e9:.0f} GFLOP/s in fp32, {self.bf16 / 1e9:.0f} in bf16"


class Choice(NamedTuple):
    """A precision, and why it was taken."""

    precision: str
    rates: Rates | None = None  # None: nothing was timed, or the timings could not be used
    reason: str = ""
    warning: str = ""


def choose_device(name: str) -> torch.device:
    """`auto` is a CUDA GPU where there is one.

    Raises:
        InputError: if the name is no device, or none of that name is there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        cuda = torch.version.cuda
        found = (
            f"PyTorch for CUDA {cuda} finds no GPU, or its driver is too old"
            if cuda
            else "PyTorch has no CUDA"
        )
        why = "" if there else f": this {found}"
        raise InputError(f"--device {name}: this machine has {there} CUDA devices{why}")
    return device


def choose_precision(name: str, device: torch.device, bert: BertConfig) -> Choice:
    """The precision to compute in: `name` itself, or for `auto` the fastest sound one.

    GPU: bf16 where the hardware computes in it, else fp16. CPU: the faster of fp32 and bf16, timed on
    products of `bert`'s shapes; fp32 where bf16 is not faster by more than a tenth, where the CPU has no
    instructions for it, and where the timings contradict each other.

    Raises:
        InputError: if the device cannot compute in the precision that was asked for.
    """
    if device.type == "cuda":
        return _on_gpu(name)
    if name == "fp16":
        raise InputError("--precision fp16: expected a GPU; a CPU has fp32 and bf16")
    if name == "fp32":
        return Choice("fp32")
    if not has_bf16():
        why = "this CPU has no bf16 instructions"
        warning = f"--precision bf16: {why}; fp32 is many times faster" if name == "bf16" else ""
        return Choice("fp32" if name == "auto" else name, reason=why, warning=warning)
    rates = cpu_rates(bert)
    if name == "auto":
        busy = "this machine is too busy to time bf16; the next run tries again"
        return Choice(rates.faster if rates else "fp32", rates, f"measured: {rates}" if rates else busy)
    slower = rates is not None and rates.bf16 < rates.fp32
    warning = f"--precision bf16: fp32 is faster here, {rates}" if slower else ""
    return Choice(name, rates, f"measured: {rates}" if rates else "", warning)


def _on_gpu(name: str) -> Choice:
    # A T4 answers True unless emulation is left out, and is slow at it.
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    best = "bf16" if bf16 else "fp16"
    if name == "bf16" and not bf16:
        raise InputError(f"--precision bf16: this cuda has no bf16 arithmetic; best here is {best}")
    return Choice(best if name == "auto" else name)


def cpu_rates(bert: BertConfig) -> Rates | None:
    """This CPU's rates for the shapes of `bert`: those in the cache, or measured now and kept there.

    They are kept by the CPU's name, PyTorch's version and the number of threads. None if they could not
    be measured; then nothing is kept.
    """
    about = {
        "cpu": cpu(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "hidden_size": bert.hidden_size,
        "intermediate_size": bert.intermediate_size,
    }
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = cache_root() / "rates" / f"{key}.json"
    rates = _kept(path, about)
    if rates is None:
        rates = measure(layer_products(bert))
        if rates:
            _keep(path, about | rates._asdict())
    return rates


def measure(multiply: Multiply, clock: Clock = time.perf_counter) -> Rates | None:
    """Time products of 16, 32, 64, ... rows in each precision until 45 ms are over.

    Args:
        multiply: does the products of so many rows in a precision; returns their FLOPs.

    Returns:
        The best rates of the last two rounds, in FLOP/s. None if there was time for one round alone, if
        the clock went backwards, or if one round found fp32 faster and the other bf16.
    """
    end, rows, rounds = clock() + BUDGET, FEWEST_ROWS, []
    while rows <= MOST_ROWS:
        started = clock()
        found = [_rate(multiply, rows, precision, clock, end) for precision in Rates._fields]
        if None in found:
            break
        if any(map(math.isnan, found)):
            return None
        rounds.append(Rates(*found))
        now = clock()
        if now + 2 * (now - started) > end:  # the next round takes twice as long
            break
        rows *= 2
    last = rounds[-2:]
    ratios = [one.bf16 / one.fp32 for one in last]
    if len(last) < 2 or min(ratios) * MARGIN < 1 < max(ratios) / MARGIN:
        return None
    return Rates(*map(max, zip(*last, strict=True)))


def _rate(multiply: Multiply, rows: int, precision: str, clock: Clock, end: float) -> float | None:
    """FLOP/s of the faster of two passes: the first may build a kernel for its shapes.

    None if the time is up; nan if the clock went backwards.
    """
    seconds = []
    for _ in range(2):
        before = clock()
        flops = multiply(rows, precision)
        after = clock()
        if after > end:
            return None
        seconds.append(after - before)
    return flops / min(seconds) if min(seconds) > 0 else math.nan


def layer_products(bert: BertConfig) -> Multiply:
    """The products of a layer's three shapes, y = x Wᵀ and dx = dy W, on matrices of ones."""
    hidden, wide = bert.hidden_size, bert.intermediate_size
    shapes = ((hidden, hidden), (wide, hidden), (hidden, wide))  # of W: [N, K]
    weights = {name: [torch.ones(shape, dtype=DTYPES[name]) for shape in shapes] for name in Rates._fields}
    inputs = {
        name: {width: torch.ones(MOST_ROWS, width, dtype=DTYPES[name]) for width in (hidden, wide)}
        for name in Rates._fields
    }

    @torch.inference_mode()
    def multiply(rows: int, precision: str) -> float:
        own = inputs[precision]
        for weight in weights[precision]:
            outputs, ins = weight.shape
            F.linear(own[ins][:rows], weight)  # [rows, N]
            own[outputs][:rows] @ weight  # [rows, K]
        return 4.0 * rows * sum(math.prod(shape) for shape in shapes)

    return multiply


def _kept(path: Path, about: dict) -> Rates | None:
    """Rates from the cache; None if there are none for this machine, or the file is damaged."""
    try:
        kept = read_json(path)
    except InputError:
        return None
    values = [kept.pop(name, None) for name in Rates._fields]
    sound = all(isinstance(value, float) and 0 < value < math.inf for value in values)
    return Rates(*values) if sound and kept == about else None


def _keep(path: Path, content: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(content, path)
    except OSError:  # a cache that cannot be written costs the next run a measurement, and no more
        pass
