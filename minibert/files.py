"""Files read and written whole: a reader that says what is wrong, a writer that never leaves half a file.

Imports no torch.
"""

import errno
import gzip
import json
import os
import re
import reprlib
import shutil
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from minibert.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 2**28  # bytes
LARGEST_STREAM = 2**30  # bytes of a pipe or a device, which may have no end, or of what a .gz holds
GZIP = b"\x1f\x8b"  # how its files begin, whatever they are called
CHUNK = 2**20  # bytes of a read
SPECIAL = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def special(path: Path) -> str | None:
    """What a path leads to that is neither a file nor a folder: "a FIFO", "a device" or "a socket"."""
    try:
        return SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:  # whoever opens it says why
        return None


def check_regular(path: Path) -> None:
    """Raises InputError for what may never end, or never begin: a FIFO, a device, a socket."""
    if kind := special(path):
        raise InputError(f"{path}: expected a file, got {kind}")


def _content(path: Path, most: int, stream: bool) -> bytes:
    """All of a file, unpacked if it is gzip's, but for what follows on a NUL byte, which no text has."""
    if not stream:
        check_regular(path)
    content = bytearray()
    try:
        with open(path, "rb") as file:
            source = file
            if file.peek(len(GZIP)).startswith(GZIP):
                source, most = gzip.GzipFile(fileobj=file), min(most, LARGEST_STREAM)
            while len(content) <= most and (chunk := source.read(CHUNK)):
                content += chunk
                if b"\0" in chunk:
                    break
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: expected a whole .gz file, got a damaged one ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        content.clear()
        raise InputError(f"{path}: expected a file that fits into memory, got a larger one") from None
    if len(content) > most:
        raise InputError(f"{path}: expected at most {most >> 20} MiB, got more")
    end = content.find(b"\0")
    return bytes(content if end < 0 else content[: end + 1])


def read_text(path: Path, stream: bool = False) -> str:
    """All of a UTF-8 file, without its byte order mark; line ends stay as they are.

    With `stream` a pipe or a device is read too, but no more of it than `LARGEST_STREAM`.

    Raises:
        InputError: if it cannot be read; with file:line, if it holds a byte that is no text.
    """
    content = _content(path, LARGEST_STREAM if special(path) else sys.maxsize, stream)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise InputError(f"{path}:{line}: expected UTF-8 text, got byte {byte:#04x}") from None
    if text.endswith("\0"):
        line = text.count("\n") + 1
        raise InputError(f"{path}:{line}: expected text, got a NUL byte")
    return text


def read_json(path: Path, stream: bool = False, kind: type = dict) -> Any:
    """The object in a JSON file, or the array where `kind` is list; with `stream` in a pipe too.

    Raises:
        InputError: if the file cannot be read, does not end or holds anything else.
    """
    content = _content(path, LARGEST_JSON, stream)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got something else ({error})") from None
    if not isinstance(value, kind):
        wanted = "object" if kind is dict else "array"
        raise InputError(f"{path}: expected a JSON {wanted}, got {type(value).__name__}")
    return value


def object_in(raw: Mapping, key: str, where: Path) -> dict:
    """An object within a JSON object; empty where there is none. Raises InputError if it is anything else."""
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected {key} to be an object, got {reprlib.repr(value)}")
    return value


def read_safetensors(path: Path) -> "dict[str, Tensor]":
    """All tensors of one safetensors file.

    Raises:
        InputError: if it cannot be read, is truncated or is no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_regular(path)
    try:
        return load_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, TypeError) as error:  # TypeError: a shape too large for any tensor
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: expected a whole safetensors file, got a damaged one ({reason})") from None


def read_pickled(path: Path) -> "dict[str, Tensor]":
    """All tensors of a file that `torch.save` wrote; nothing in it is run.

    Raises:
        InputError: if it cannot be read, is damaged or holds anything but tensors.
    """
    from pickle import UnpicklingError
    from struct import error as struct_error

    import torch

    check_regular(path)
    # torch.load has no error of its own: a damaged file makes its unpickler fail in any of these ways.
    faults = (UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
    faults += (EOFError, AssertionError, MemoryError, OverflowError, struct_error)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except faults as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        wanted = "expected a whole file of tensors alone, as torch.save writes it"
        raise InputError(f"{path}: {wanted}, got another ({reason or type(error).__name__})") from None
    if not isinstance(state, dict) or not all(map(_is_named_tensor, state.items())):
        raise InputError(f"{path}: expected whole tensors by name, got something else")
    # In a pickle two names may share one memory. Each gets its own, or training one would change both.
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    from torch import Tensor, nn, strided

    name, value = item
    if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter):
        return False
    if value.layout != strided or value.device.type != "cpu" or value.is_quantized:
        return False
    # With strides of 0 a file of some bytes can claim a tensor larger than the memory.
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def check_fits(state: "Mapping[str, Tensor]", expected: "Mapping[str, Tensor]", where: str) -> None:
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


def written_into(path: Path) -> bool:
    """Whether a path leads to a FIFO or a character device, which is written into, never replaced.

    Raises:
        OSError: naming the path, if it is a folder, or another thing that holds no text.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:  # it is new, or what a link names is
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, f"expected a file, got {special(path)}", str(path))
    return not stat.S_ISREG(mode)


def followed(path: Path) -> Path:
    """The file that a link names: the link stays, and leads to the new file."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_output(path: Path | None, flag: str, read: Iterable[Path] = ()) -> None:
    """Before any work is done for it; `read` are files that are read, so that none may be written there.

    Raises:
        InputError: naming the flag, if a file cannot be written there.
    """
    if path is None:
        return
    try:
        if written_into(path):
            return
        target = followed(path)
        os.stat(target.parent / ".")
        for place in (target.parent, *[target][: target.exists()]):
            if not os.access(place, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be written ({error.strerror})") from None
    for one in read:
        if target.exists() and one.exists() and target.samefile(one):
            raise InputError(f"{flag}: expected a new file, {path} is read by this command")


def check_folder(path: Path, flag: str) -> Path:
    """The folder that is there already, itself or above it. Raises InputError unless it can be written."""
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag}: expected a folder that can be written, {there} is none")
    return there


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; then the file is flushed to disk and renamed, and the folder flushed.

    So `path` is the old file or the whole new one, whatever happens in between, a loss of power included. A
    link is followed. A FIFO and a character device stay what they are, and are written into.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    if written_into(path):
        with _writing_into(path) as temporary:
            yield temporary
        return
    target = followed(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.touch()
        # The user's own default, or as the old file was; safetensors would leave it to the owner alone.
        mode = (target if target.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(mode)
        flush(temporary)
        temporary.replace(target)
        flush(target.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        # A write to a full disk names no file.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing_into(path: Path) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        yield (temporary := Path(folder) / "whole")
        try:
            with open(temporary, "rb") as whole, open(os.open(path, os.O_WRONLY), "wb") as into:
                shutil.copyfileobj(whole, into)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None


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
    state: "Mapping[str, Tensor]", path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Raises OSError if the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, {"format": "pt"} | (metadata or {}))
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(None, str(error), str(path)) from None


def write_text(text: str, path: Path) -> None:
    """Raises OSError if the file cannot be written, InputError if the text holds what UTF-8 cannot."""
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # from a folder's name, as Python keeps odd bytes
        part = error.object[max(0, error.start - 30) : error.end]
        raise InputError(f"{path}: expected text that UTF-8 can hold, got {part!r}") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(value: dict, path: Path) -> None:
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)
