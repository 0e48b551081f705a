"""Check the adapters' mathematics, and a run's own: `python -m lora.verify [RUN]`.

Prints claim | dtype | error | tolerance | ok. Exit codes: 0 all hold, 1 one does not, 2 bad usage or input.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora.methods import METHODS
from minibert.errors import InputError
from training.cli import Parser
from training.exit import run_command

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora.layers import LoRALinear
    from training.config import Config

ROWS = 64  # of the random input that a run's layers are compared on


class Row(NamedTuple):
    """What was measured."""

    claim: str
    dtype: str
    error: float
    tolerance: float
    where: str = ""  # the worst layer

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # NaN is not


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m lora.verify", description="Check the adapters' mathematics.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="and those of a finished run")
    return parser.parse_args(arguments)


def check_claims() -> list[Row]:
    """Every claim in every dtype, on random layers."""
    from lora.claims import CLAIMS, TOLERANCE

    return [
        Row(claim.text, short(dtype), claim.error(dtype), claim.tolerance(dtype))
        for claim in CLAIMS
        for dtype in TOLERANCE
    ]


def check_run(path: Path) -> list[Row]:
    """Whether a run's own weights keep what the claims promise, as load_run gives them.

    Raises:
        InputError: if the folder is no finished run of a method with adapters, or its base is not found.
    """
    from lora.layers import LoRALinear
    from training.run_folder import RunFolder, load_run, read_run_config

    config = read_run_config(RunFolder(path))
    if not METHODS[config.method].layer:
        raise InputError(f"{path}: expected a run with adapters, --method {config.method} has none")
    config, model, _ = load_run(path)
    adapted = {name: one for name, one in model.bert.named_modules() if isinstance(one, LoRALinear)}
    # Exports are made and used before the base is compared, which would show what they did to it.
    return [*check_forms(config, model.bert, adapted), *check_values(adapted), check_base(config, model.bert)]


def check_forms(config: "Config", bert: "nn.Module", adapted: "dict[str, LoRALinear]") -> list[Row]:
    """Each adapted layer in each of its forms, in fp32 and in the run's precision."""
    import torch

    from lora.claims import TOLERANCE, forms_error
    from lora.methods import merge
    from training.precision import DTYPES

    rows = []
    for dtype in dict.fromkeys((torch.float32, DTYPES[config.precision])):
        generator, merged, errors = torch.Generator().manual_seed(0), merge(bert, dtype), {}
        for name, layer in adapted.items():
            x = torch.randn(ROWS, layer.in_features, generator=generator).to(dtype)
            dy = torch.randn(ROWS, layer.out_features, generator=generator).to(dtype)
            errors[name] = forms_error(layer, merged.get_submodule(name), x, dy)
        rows.append(worst_row("merged == split == exported", errors, TOLERANCE[dtype], dtype))
    return rows


def check_values(adapted: "dict[str, LoRALinear]") -> list[Row]:
    """What trained is finite, no B is all zeros, and DoRA's magnitudes are above 0."""
    import torch

    strays = {
        name: sum(int((~one.isfinite()).sum()) for one in layer.parameters() if one.requires_grad)
        for name, layer in adapted.items()
    }
    zeros = {name: int(not layer.lora_B.weight.any()) for name, layer in adapted.items()}
    rows = [
        worst_row("what trained is finite", strays, 0, torch.float32),
        worst_row("no lora_B is all zeros", zeros, 0, torch.float32),
    ]
    magnitudes = {name: one.magnitude for name, one in adapted.items() if one.magnitude is not None}
    if magnitudes:
        below = {name: int((~(m > 0)).sum()) for name, m in magnitudes.items()}
        rows.append(worst_row("every magnitude is above 0", below, 0, torch.float32))
    return rows


def check_base(config: "Config", bert: "nn.Module") -> Row:
    """The encoder, but for the adapters, has the bits of the checkpoint it started from."""
    import torch

    from lora.claims import different_bits
    from minibert.hub import resolve
    from minibert.weights import read_checkpoint

    state = bert.state_dict()
    base = read_checkpoint(resolve(config.model))
    errors = {name: different_bits(state[name], tensor.float()) for name, tensor in base.items()}
    return worst_row("base weights are the checkpoint's bits", errors, 0, torch.float32)


def worst_row(text: str, errors: dict[str, float], tolerance: float, dtype: "torch.dtype") -> Row:
    """The worst of the layers, by name."""
    name = max(errors, key=lambda one: (errors[one] != errors[one], errors[one]))  # NaN is the worst
    return Row(f"this run: {text}", short(dtype), errors[name], tolerance, name if errors[name] else "")


def short(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def table(rows: Sequence[Row]) -> str:
    cells = [("claim", "dtype", "error", "tolerance", "ok", "worst layer")]
    for row in rows:
        ok = "yes" if row.holds else "NO"
        cells.append((row.claim, row.dtype, f"{row.error:.1e}", f"{row.tolerance:.0e}", ok, row.where))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def main() -> int:
    given = parse(sys.argv[1:])
    rows = check_run(given.run) if given.run else []  # first, so that a folder that is none says so at once
    rows = check_claims() + rows
    claims = dict.fromkeys(row.claim for row in rows)
    failed = dict.fromkeys(row.claim for row in rows if not row.holds)
    print(table(rows))
    print(f"\n{len(failed)} of {len(claims)} claims fail:" if failed else f"\nall {len(claims)} claims hold")
    for claim in failed:
        print(f"  {claim}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
