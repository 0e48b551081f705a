"""Make one ordinary checkpoint of a finished run: `python -m lora.merge RUN OUT`.

transformers opens OUT, and sentence-transformers too if the run is Siamese. Prints what merging and rounding
did to the weights, and to the logits of a few sentences.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.cli import Parser
from training.config import PRECISIONS
from training.exit import run_command

if TYPE_CHECKING:
    import torch

    from lora.layers import LoRALinear
    from training.export import Exported

DTYPE_NAMES = tuple(name for name in PRECISIONS if name != "auto")


class Drift(NamedTuple):
    """What rounding to a dtype leaves of W' = g ⊙ (W + s·B A), with ΔW = W' - W."""

    error: float  # max |round(W') - W'| / max |W'|, of the worst layer
    noise: float  # ‖round(W') - W'‖ / ‖ΔW‖, over all layers
    kept: float  # Σ (round(W') - W) ΔW / ‖ΔW‖², over all layers; NaN if there is no update


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lora.merge", description="Make one checkpoint of a finished run.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder that train.py wrote")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="of the weights in OUT (fp32)")
    return parser.parse_args(arguments)


def measure(layers: "Iterable[LoRALinear]", dtype: "torch.dtype") -> Drift:
    """The layers as they are merged in a dtype, against W' from the same parameters in fp64."""
    import torch

    from lora.layers import merged_weight

    errors, noise, kept, update = [], 0.0, 0.0, 0.0
    for layer in layers:
        parts = (None if one is None else one.detach().double() for one in layer.parameters_of_y)
        weight, _, *factors = parts
        exact = merged_weight(weight, *factors, layer.scaling)  # [N, K]
        rounded, delta = layer.merged(dtype).weight.double(), exact - weight
        errors.append(((rounded - exact).abs().max() / exact.abs().max()).item())
        noise += (rounded - exact).square().sum().item()
        kept += ((rounded - weight) * delta).sum().item()
        update += delta.square().sum().item()
    update = update or float("nan")
    # torch's maximum, unlike Python's, is NaN where one of them is.
    return Drift(torch.tensor(errors).max().item(), (noise / update) ** 0.5, kept / update)


def report(exported: "Exported", given: argparse.Namespace) -> str:
    from lora.layers import LoRALinear
    from training.precision import DTYPES

    config, model = exported.config, exported.model
    layers = [one for one in model.bert.modules() if isinstance(one, LoRALinear)]
    if not layers:
        return "\n".join([f"merged: nothing, {config.method} has no adapters", *written(exported, given)])
    cells = [("dtype", "max error / max weight", "noise / update", "update kept")]
    for name in DTYPE_NAMES:
        drift = measure(layers, DTYPES[name])
        cells.append((name, f"{drift.error:.1e}", f"{drift.noise:.1e}", f"{drift.kept:.4%}"))
    table = [f"        {dtype:<8}{error:<25}{noise:<17}{kept}" for dtype, error, noise, kept in cells]
    title = f"merged: {len(layers)} layers of {config.method}; W' rounded to a dtype, against W' in fp64:"
    return "\n".join([title, *table, *written(exported, given)])


def written(exported: "Exported", given: argparse.Namespace) -> list[str]:
    """What lies in OUT, and how equal it is to the run."""
    bare = exported.model.bert.config.family.architecture
    opened = "BertForSequenceClassification" if exported.has_classifier else bare
    lines = [f"wrote:  {given.out}: {opened} in {given.dtype}, and its tokenizer"]
    if exported.has_pooling:
        lines.append(f"        sentence-transformers opens it as well, for {exported.config.pooling} pooling")
    if not exported.has_classifier:
        lines.append("head:   none that transformers knows; it is copied to head.safetensors, and")
        lines.append(f"        predict.py {given.run} computes with it")
    error, largest = exported.logit_error, exported.max_logit
    lines.append(f"logits: read back, at most {error:.1e} from the run's on examples (largest {largest:.2f})")
    return lines


def main() -> int:
    given = parse(sys.argv[1:])
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from training.export import export
    from training.precision import DTYPES

    print(report(export(given.run, given.out, DTYPES[given.dtype]), given))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
