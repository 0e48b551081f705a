import functools
import hashlib
import os
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from minibert.errors import InputError
from minibert.verify import git_blob_id
from tasks import course
from tasks.course import BLOB_IDS, course_folder

CONTENT = {"sts-dev.csv": b"\tid\tsentence1\n" * 9, "sts-train.csv": b"\tid\n0\t1\n"}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def source(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the course's repository: two small files, with their blob ids registered."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file, content in CONTENT.items():
        (folder / file).write_bytes(content)
        blob = hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()
        monkeypatch.setitem(BLOB_IDS, file, blob)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    monkeypatch.setattr(course, "SOURCE", serve(handler))
    return folder


def test_only_the_named_files_are_downloaded(source: Path):
    folder = course_folder(["sts-dev.csv"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "sts-dev.csv": CONTENT["sts-dev.csv"]
    }
    assert course_folder(CONTENT) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


def test_a_second_use_needs_no_network(source: Path, monkeypatch: pytest.MonkeyPatch):
    folder = course_folder(CONTENT)
    monkeypatch.setattr(course, "_download", None)
    assert course_folder(CONTENT) == folder


def test_a_wrong_hash_deletes_the_file_and_stops(source: Path, own_cache: Path):
    (source / "sts-dev.csv").write_bytes(b"changed")
    expected = rf"\.partial/sts-dev\.csv: expected git blob id {BLOB_IDS['sts-dev.csv']}, got .* deleted"
    with pytest.raises(InputError, match=expected):  # beside the folder, where no other process sees it
        course_folder(["sts-dev.csv"])
    assert not list(own_cache.rglob("*.csv"))


def test_a_changed_file_in_the_cache_is_deleted_and_had_anew(source: Path):
    folder = course_folder(CONTENT)
    (folder / "sts-dev.csv").write_bytes(b"changed")
    with pytest.raises(InputError, match="sts-dev.csv: expected git blob id"):
        course_folder(CONTENT)
    assert not (folder / "sts-dev.csv").exists()
    assert (course_folder(CONTENT) / "sts-dev.csv").read_bytes() == CONTENT["sts-dev.csv"]


def test_an_interrupted_download_leaves_nothing(
    source: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(file: str, to: Path) -> None:
        to.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(course, "_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        course_folder(CONTENT)
    assert not list(own_cache.rglob("*.csv"))
    assert not list(own_cache.glob("*.partial"))


def test_without_a_network_one_line_says_what_was_tried_and_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(course, "SOURCE", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(InputError) as raised:
        course_folder(["sts-dev.csv"])
    message = str(raised.value)
    assert message.startswith("cannot download the course data: http://127.0.0.1:9/sts-dev.csv: ")
    assert message.endswith("; a folder that holds the files can be given with --data DIR")
    assert "\n" not in message


def test_a_file_that_is_gone_is_named(source: Path):
    (source / "sts-dev.csv").unlink()
    with pytest.raises(InputError, match=r"sts-dev.csv: File not found"):
        course_folder(["sts-dev.csv"])


def test_a_file_of_another_course_is_refused():
    with pytest.raises(InputError, match="expected files of the course data .*, got '../secret.csv'"):
        course_folder(["../secret.csv"])


@pytest.mark.skipif(
    "CS224N_DATA" not in os.environ, reason="needs the course files: set CS224N_DATA to their folder"
)
@pytest.mark.parametrize("file", [file for file in BLOB_IDS if not file.startswith("quora")])
def test_the_registered_blob_ids_are_those_of_the_course_files(file: str):
    path = Path(os.environ["CS224N_DATA"]) / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    assert git_blob_id(path) == BLOB_IDS[file]
