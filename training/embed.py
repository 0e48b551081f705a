"""A vector for each line of a file: `python -m training.embed RUN --input FILE --output vectors.npy`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minibert.errors import InputError
from minibert.files import read_text
from training.cli import Parser, add_computing, check_beside
from training.exit import run_command

SUFFIXES = (".npy", ".safetensors")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises InputError for an output of another kind."""
    parser = Parser(
        prog="python -m training.embed", description="A vector for each line of a file.", allow_abbrev=False
    )
    parser.add_argument(
        "run", metavar="RUN", help="the folder that train.py wrote, its adapter/, or a model's name or folder"
    )
    parser.add_argument("--input", type=Path, required=True, help="a text file, a text in each line")
    parser.add_argument(
        "--output", type=Path, required=True, help="the vectors [lines, H] in fp32: .npy, or .safetensors"
    )
    parser.add_argument("--normalize", action="store_true", help="each to length 1")
    add_computing(parser)
    given = parser.parse_args(arguments)
    if given.output.suffix not in SUFFIXES:
        raise InputError(f"--output: expected {' or '.join(SUFFIXES)}, got {given.output.name!r}")
    check_beside(given.output, "--output", Path(given.run), given.input)
    return given


def read_lines(path: Path) -> list[str]:
    text = read_text(path, stream=True).replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n") if text else []


def main() -> int:
    given = parse(sys.argv[1:])
    texts = read_lines(given.input)
    # Imported here, not above: usage errors and --help answer without waiting for torch.
    from training.embedding import Encoder, write_vectors

    encoder = Encoder.load(given.run, given.precision, given.device)
    vectors = encoder.encode(texts, given.normalize)
    write_vectors(vectors, given.output)
    about = f": {encoder.about}" if encoder.about else ""
    print(f"{given.output}: {len(vectors)} vectors of {vectors.shape[1]} numbers{about}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
