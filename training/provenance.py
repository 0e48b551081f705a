"""What a run was made with: settings, data, weights, versions, machine; and what differs from another's."""

import importlib.util
import platform
import subprocess
from collections.abc import Mapping, Sequence
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import torch

from minibert.cache import cache_root
from minibert.errors import InputError
from minibert.files import read_json
from minibert.hub import HASHES
from minibert.sources import model_files
from minibert.verify import sha256
from training.build import data_folder
from training.config import Config, to_dict

PACKAGES = ("torch", "numpy", "scipy", "tokenizers", "safetensors")
ON_GPU = ("triton",)  # not installed everywhere
ROOT = Path(__file__).parents[1]

# A run does not go on with another of these. The rest is told: it may change bits, and no more than that.
MUST_AGREE = ("settings", "data file", "model file", "torch", "numpy", "tokenizers", "dropout masks")
# What epochs are counted in: nobody could go on with another.
EPOCH = "steps of an epoch"
# How dropout's masks are drawn where a batch is in shares or pieces, and how older versions drew them.
DROPOUT, MASKS, OLDER_MASKS = "dropout masks", "by process and piece", "by place in the batch"


def versions() -> dict[str, str]:
    """Of Python, the packages that compute, and this one, with its git commit where it is a clone."""
    known = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    known |= {name: metadata.version(name) for name in ON_GPU if importlib.util.find_spec(name)}
    known |= {"cuda": torch.version.cuda} if torch.version.cuda else {}
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    own = setup.get("metadata", "version", fallback=None) or metadata.version("minibert")
    commit = git_commit()
    return known | {"minibert": own} | ({"commit": commit} if commit else {})


def git_commit() -> str | None:
    """This clone's commit, with `-dirty` behind it where files of it are changed; None where it is none."""
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def data_sha256(config: Config) -> dict[str, str]:
    """The SHA-256 of each data file of a run."""
    folder = data_folder(config)
    names = [name for task in config.tasks for name in task.files.values()]
    return {name: sha256(folder / name) for name in names if (folder / name).exists()}


def model_sha256(base: Path, files: Sequence[str] | None = None) -> dict[str, str]:
    """The SHA-256 of each file of a model, or of some of them, in a folder that `resolve` gave."""
    # What lies in the cache, resolve has just verified by these hashes.
    known = read_json(base / HASHES)["sha256"] if base.parent == cache_root() else {}
    return {file: known.get(file) or sha256(base / file) for file in files or model_files(base)}


def run_sha256(folder: Path) -> dict[str, str]:
    """The SHA-256 of what a run leaves, but for the lines that tell its seconds."""
    places = ("config.json", "head.safetensors", "predictions-*", "adapter*/*", "model/*")
    paths = sorted(path for place in places for path in folder.glob(place) if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def check_sha256(folder: Path, expected: Mapping[str, str], where: Path) -> None:
    """Raises:
    InputError: if a file is not what it was when `where` was written.
    """
    for name, known in expected.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{where}: expected names of files in {folder}, got {name!r}")
        got = sha256(folder / name) if (folder / name).is_file() else "no such file"
        if got != known:
            raise InputError(f"{folder / name}: expected sha256 {known} as {where} says, got {got}")


def made_with(config: Config, base: Path, steps_per_epoch: int, processes: int = 1) -> dict[str, object]:
    """All that decides what a run computes, as JSON has it."""
    return {
        "settings": to_dict(config),
        "data file": data_sha256(config),
        "model file": model_sha256(base),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else None,
        "processes": processes,
        EPOCH: steps_per_epoch,
        DROPOUT: MASKS,
    }


def differences(before: Mapping, now: Mapping) -> tuple[list[str], list[str]]:
    """What differs, each as `seed 0, now it is 1`: what must agree, and what need not.

    Of what one of the two does not say, nothing is known to differ.
    """
    must, may = {}, {}
    for kind, value in before.items():
        for name, was in (value if isinstance(value, Mapping) else {kind: value}).items():
            there = now.get(kind, {})
            one = there.get(name) if isinstance(there, Mapping) else there
            if was != one:
                shown = f"{kind} {name}" if kind.endswith(" file") else name
                group = must if kind in MUST_AGREE or name in MUST_AGREE else may
                group[shown] = f"{shown} {_short(was)}, now it is {_short(one)}"
    return list(must.values()), list(may.values())


def _short(value: object) -> str:
    """Of a hash so much as tells two apart."""
    text = repr(value)
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else text
