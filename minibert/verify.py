"""A file is what it should be, or it is deleted: SHA-256 and git's blob id.

Both are what public hosts publish: the Hugging Face hub gives sha256 for large files and git's blob id for
small ones, GitHub the blob id for all.
"""

import hashlib
from pathlib import Path
from typing import Protocol

from minibert.errors import InputError

CHUNK = 1 << 20  # bytes; reads of this size hash as fast as memory gives them


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    return _digest(path, hashlib.sha256())


def git_blob_id(path: Path) -> str:
    """sha1("blob " + size + "\\0" + content), 40 hexadecimal digits: git's name for a file's content."""
    return _digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def verify(path: Path, expected: str) -> None:
    """Check a file against its SHA-256 (64 digits) or git blob id (40 digits), and delete it if it differs.

    Raises:
        InputError: if the file has another hash; a wrong file that stayed could be used by mistake.
    """
    kind, got = ("sha256", sha256(path)) if len(expected) == 64 else ("git blob id", git_blob_id(path))
    if got == expected:
        return
    try:
        path.unlink()
        fate = "the file is deleted, run again to download it anew"
    except OSError as error:
        fate = f"the file cannot be deleted ({error.strerror}), delete it yourself"
    raise InputError(f"{path}: expected {kind} {expected}, got {got}; {fate}")


def _digest(path: Path, digest: _Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
