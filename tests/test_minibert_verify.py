from pathlib import Path

import pytest

from minibert.errors import InputError
from minibert.verify import git_blob_id, sha256, verify


def test_hashes_are_those_of_the_command_line_tools(tmp_path: Path):
    (tmp_path / "hello").write_bytes(b"hello\n")  # printf 'hello\n' | sha256sum; git hash-object --stdin
    assert sha256(tmp_path / "hello") == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert git_blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_a_wrong_hash_deletes_the_file_and_stops(tmp_path: Path):
    (tmp_path / "hello").write_bytes(b"hello\n")
    with pytest.raises(
        InputError, match="hello: expected git blob id 0{40}, got ce0136.*; the file is deleted"
    ):
        verify(tmp_path / "hello", "0" * 40)
    assert not (tmp_path / "hello").exists()


def test_a_right_hash_keeps_the_file(tmp_path: Path):
    (tmp_path / "hello").write_bytes(b"hello\n")
    verify(tmp_path / "hello", "ce013625030ba8dba906f756967f9e9ca394464a")
    verify(tmp_path / "hello", "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")
    assert (tmp_path / "hello").exists()
