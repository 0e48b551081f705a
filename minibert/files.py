"""Files read and written whole: a reader that says what is wrong, a writer that never leaves half a file."""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minibert.errors import InputError

LARGEST_JSON = 2**28  # bytes; /dev/zero has no end


def read_json(path: Path, kind: type = dict) -> Any:
    """The object in a JSON file, or the array where `kind` is list.

    Raises:
        InputError: if the file cannot be read, does not end or holds anything else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > LARGEST_JSON:
        raise InputError(f"{path}: expected JSON of at most {LARGEST_JSON >> 20} MiB, got more")
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got something else ({error})") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "array"
        raise InputError(f"{path}: expected a JSON {wanted}, got {type(value).__name__}")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file.

    Raises:
        InputError: if it cannot be read, is truncated or is no safetensors file.
    """
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, TypeError) as error:  # TypeError: a shape too large for any tensor
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: expected a whole safetensors file, got a damaged one ({reason})") from None


def check_fits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError unless the two have the same names and shapes, all of finite numbers in fp32."""
    for problem, names in (("missing", expected.keys() - state), ("unexpected", state.keys() - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{where}: {problem} {min(names)!r}{more}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            shapes = f"expected {list(expected[name].shape)}, got {list(tensor.shape)}"
            raise InputError(f"{where}: {name}: {shapes}")
        if not tensor.is_floating_point() or tensor.element_size() < 2:  # fp8 and fp4 need scales
            wanted = "floating-point numbers of 16 bits or more"
            raise InputError(f"{where}: {name}: expected {wanted}, got {tensor.dtype}")
        numbers = tensor.float()
        # A sum is cheap, and finite only if all are. It may overflow though they are.
        if not numbers.sum().isfinite() and not (finite := numbers.isfinite()).all():
            raise InputError(
                f"{where}: {name}: expected finite numbers in fp32, got {tensor[~finite][0].item()}"
            )


TEMPORARY = re.compile(r"\..+\.\d+|\.tmp\w{6}")  # `replacing`'s, and within it safetensors' own


def leftovers(folder: Path) -> list[Path]:
    """What killed processes left half written in a folder and its subfolders; of no use to anybody."""
    hidden = [*folder.glob(".*"), *folder.glob("*/.*")]
    return [path for path in hidden if TEMPORARY.fullmatch(path.name) and path.is_file()]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; then the file is flushed to disk and renamed, and the folder flushed.

    So `path` is the old file or the whole new one, whatever happens in between, a loss of power included.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # the user's own default; safetensors would leave it to the owner alone
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        # A write to a full disk names no file.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have on disk what a file holds, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(handle)


def write_safetensors(
    state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Raises OSError if the file cannot be written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt"} | (metadata or {}))
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(None, str(error), str(path)) from None


def write_text(text: str, path: Path) -> None:
    """Raises OSError if the file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(value: dict, path: Path) -> None:
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)
