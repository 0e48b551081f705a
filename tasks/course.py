"""The CS 224N course data (`--data cs224n`): downloaded from the course's public handout, checked, kept."""

import http.client
import os
import shutil
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from minibert.cache import cache_root, staging
from minibert.errors import InputError
from minibert.verify import verify

REPOSITORY = "amahankali10/CS224N-Spring2024-DFP-Student-Handout"
REVISION = "3f64c60c8a0e40a9fe581235b08f4607ff187077"
SOURCE = f"https://raw.githubusercontent.com/{REPOSITORY}/{REVISION}/data"
TIMEOUT = 20  # seconds without an answer or a byte

BLOB_IDS = {
    "ids-sst-train.csv": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "ids-sst-dev.csv": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student.csv": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "quora-train.csv": "1f2e73b884113e629e2786001fb9cc8ae4a696c1",
    "quora-dev.csv": "97f9430a53b7f5544f857ff27a236c40bb42b5c7",
    "quora-test-student.csv": "a1b1e5ba3ef282ba1e9b169c509eb80dbbc68666",
    "sts-train.csv": "12b17760e7795fee35aeeabc290d5651de02622a",
    "sts-dev.csv": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student.csv": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
}


def cached_folder() -> Path:
    """Where the cache has what was downloaded of the course's data."""
    return cache_root() / f"cs224n@{REVISION}"


def course_folder(files: Iterable[str]) -> Path:
    """The cache's folder of course data, with at least `files` in it, each checked against its git blob id.

    Raises:
        InputError: if a file is not one of the course's, cannot be downloaded, or has a wrong hash (it is
            deleted), or if the cache cannot be written.
    """
    files = list(files)
    unknown = [file for file in files if file not in BLOB_IDS]
    if unknown:
        raise InputError(f"expected files of the course data ({', '.join(BLOB_IDS)}), got {unknown[0]!r}")
    folder = cached_folder()
    if any(not (folder / file).is_file() for file in files):
        with staging(folder) as partial:
            folder.mkdir(exist_ok=True)
            for file in files:
                if not (folder / file).is_file():
                    _download(file, partial / file)
                    verify(partial / file, BLOB_IDS[file])
                    os.replace(partial / file, folder / file)
    for file in files:
        verify(folder / file, BLOB_IDS[file])
    return folder


def _download(file: str, to: Path) -> None:
    # Not torch.hub.download_url_to_file: it sets no timeout and would hang behind a silent firewall.
    from tqdm import tqdm

    url = f"{SOURCE}/{file}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response, to.open("wb") as target:
            # A connection that closes early looks like the end of the file here: the hash tells them apart.
            progress = {"total": response.length, "desc": file, "disable": None}  # None: on a terminal only
            with tqdm.wrapattr(response, "read", **progress) as source:
                shutil.copyfileobj(source, target)
    except (OSError, http.client.HTTPException) as error:
        raise InputError(
            f"cannot download the course data: {url}: {getattr(error, 'reason', None) or error}; "
            "a folder that holds the files can be given with --data DIR"
        ) from error
