"""Devices of a test's own: a mistake would replace the machine's."""

import os
import stat
from pathlib import Path
from typing import IO

import pytest

NULL, ZERO, FULL = 3, 5, 7  # take everything, give zeros, are full


def device(path: Path, minor: int) -> Path:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, minor))
        path.open("rb").close()
    except OSError:
        pytest.skip("needs the right to make devices")
    return path


def full_device(path: Path) -> IO:
    return device(path, FULL).open("wb", buffering=0)
