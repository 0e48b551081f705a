import json
import os
import re
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from special_files import FULL, NULL, ZERO, device

from minibert import files
from minibert.errors import InputError
from minibert.files import (
    check_fits,
    check_output,
    leftovers,
    read_json,
    read_safetensors,
    read_text,
    replacing,
    write_json,
    write_safetensors,
    write_text,
)

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}
WHOLE = save(STATE)
HEADER_END = 8 + struct.unpack("<Q", WHOLE[:8])[0]


def safetensors(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def one_tensor(dtype: str, shape: list[int], size: int) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that is full after `size` bytes, as far as this process is concerned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder with a file `old`, into which this process may not write; root gives up its rights for it."""
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "locked"
        folder.mkdir()
        (folder / "old").write_text("old")
        os.chmod(parent, 0o755)
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        os.chmod(folder, 0o755)


class TestReadJson:
    def test_an_object_is_read_as_utf8(self, tmp_path: Path):
        path = tmp_path / "x.json"
        path.write_bytes('{"a": [1, 2.5, "é😀"], "b": null}'.encode())
        assert read_json(path) == {"a": [1, 2.5, "é😀"], "b": None}

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"{}\n{}", b"\xff", b"\xef\xbb\xbf{}", b'{"a": ' * 99_999, b'{"a": ' + b"1" * 9999],
        ids=["empty", "cut", "two", "latin", "bom", "deep", "digits"],
    )  # fmt: skip
    def test_what_is_no_json_is_refused(self, refusal, tmp_path: Path, content: bytes):
        path = tmp_path / "x.json"
        path.write_bytes(content)
        assert refusal(read_json, path).startswith(f"{path}: expected JSON, got something else")

    @pytest.mark.parametrize(
        ("content", "kind"), [("[]", "list"), ("1", "int"), ('"a"', "str"), ("null", "NoneType")]
    )
    def test_json_that_is_no_object_is_refused(self, refusal, tmp_path: Path, content: str, kind: str):
        path = tmp_path / "x.json"
        path.write_text(content)
        assert refusal(read_json, path) == f"{path}: expected a JSON object, got {kind}"

    def test_a_missing_file_and_a_folder_are_named(self, refusal, tmp_path: Path):
        missing = tmp_path / "none.json"
        assert refusal(read_json, missing) == f"{missing}: cannot be read (No such file or directory)"
        assert refusal(read_json, tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"


class TestReadSafetensors:
    def test_every_truncation_is_refused(self, refusal, tmp_path: Path):
        path = tmp_path / "x.safetensors"
        for length in range(len(WHOLE)):
            path.write_bytes(WHOLE[:length])
            assert refusal(read_safetensors, path).startswith(f"{path}: expected a whole safetensors file")

    @given(at=st.integers(0, HEADER_END - 1), byte=st.integers(0, 255))
    def test_a_damaged_header_is_refused_or_harmless(self, tmp_path_factory, at: int, byte: int):
        path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
        path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
        try:
            state = read_safetensors(path)
        except InputError as error:
            message = str(error)
        else:  # another name or dtype is well-formed; what it means is for check_fits to say
            assert sum(t.numel() * t.element_size() for t in state.values()) == len(WHOLE) - HEADER_END
            return
        assert message.startswith(f"{path}: expected a whole safetensors file")
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize(
        "content",
        [
            struct.pack("<Q", 2**40) + b"{}",
            struct.pack("<Q", 2**64 - 1) + b"{}",
            safetensors(one_tensor("F32", [2**40], 2**42)),
            safetensors(one_tensor("F32", [2**63, 2**63], 4), b"1234"),
            safetensors(one_tensor("F32", [0, 2**63], 0)),
            safetensors(one_tensor("F32", [-1], 4), b"1234"),
            safetensors(one_tensor("F99", [1], 4), b"1234"),
            safetensors(one_tensor("F32", [1], 4), b"12345678"),
            safetensors([]),
            safetensors(b"[" * 99_999),
            safetensors(b"\xff" * 16),
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        ],
        ids=["header-of-a-terabyte", "header-of-2**64", "tensor-of-4-terabytes", "overflowing-shape",
             "no-element-and-2**63", "negative-shape", "unknown-dtype", "bytes-of-no-tensor", "list", "deep",
             "no-utf8", "git-lfs-pointer"],
    )  # fmt: skip
    def test_a_header_that_lies_is_refused(self, refusal, tmp_path: Path, content: bytes):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        assert refusal(read_safetensors, path).startswith(f"{path}: expected a whole safetensors file")

    def test_a_missing_file_and_a_folder_are_named(self, refusal, tmp_path: Path):
        missing = tmp_path / "none.safetensors"
        assert refusal(read_safetensors, missing).startswith(f"{missing}: cannot be read (No such file")
        assert refusal(read_safetensors, tmp_path).startswith(f"{tmp_path}: cannot be read")


class TestCheckFits:
    EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"a": None}, "missing 'a'"),
            ({"a": None, "b": None}, "missing 'a' and 1 more"),
            ({"c": torch.zeros(1)}, "unexpected 'c'"),
            ({"c": torch.zeros(1), "d": torch.zeros(1), "e": torch.zeros(1)}, "unexpected 'c' and 2 more"),
            ({"a": torch.zeros(3, 2)}, "a: expected [2, 3], got [3, 2]"),
            ({"b": torch.zeros(())}, "b: expected [2], got []"),
            ({"b": torch.zeros(1)}, "b: expected [2], got [1]"),
            ({"b": torch.zeros(2, 1)}, "b: expected [2], got [2, 1]"),
            *(
                (
                    {"b": torch.zeros(2).to(dtype)},
                    f"b: expected floating-point numbers of 16 bits or more, got {dtype}",
                )
                for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, refusal, change: dict, problem: str):
        state = {name: tensor for name, tensor in (self.EXPECTED | change).items() if tensor is not None}
        assert refusal(check_fits, state, self.EXPECTED, "here") == f"here: {problem}"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_a_number_that_is_not_finite_is_named(self, refusal, dtype: torch.dtype, value: float):
        state = self.EXPECTED | {"b": torch.tensor([1.0, value]).to(dtype)}
        message = f"here: b: expected finite numbers in fp32, got {value}"
        assert refusal(check_fits, state, self.EXPECTED, "here") == message

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_finite_numbers_fit_however_large_their_sum(self, dtype: torch.dtype):
        check_fits(
            {"a": torch.full((999,), torch.finfo(dtype).max, dtype=dtype)}, {"a": torch.empty(999)}, "here"
        )

    def test_what_fp32_does_not_hold_is_not_finite(self, refusal):
        large = {"b": torch.tensor([0.0, 1e300], dtype=torch.float64)}
        assert "expected finite numbers in fp32, got 1e+300" in refusal(
            check_fits, self.EXPECTED | large, self.EXPECTED, "here"
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_any_precision_fits(self, dtype: torch.dtype):
        check_fits({name: tensor.to(dtype) for name, tensor in self.EXPECTED.items()}, self.EXPECTED, "here")


def write_tensors(path: Path) -> None:
    write_safetensors({"a": torch.zeros(1000)}, path)


def write_object(path: Path) -> None:
    write_json({"a": "x" * 4000}, path)


class TestWriting:
    WRITERS = pytest.mark.parametrize("write", [write_tensors, write_object])

    def test_tensors_come_back_bit_by_bit(self, tmp_path: Path):
        state = {
            "transposed": torch.randn(3, 5).T,
            "strided": torch.randn(10)[::2],
            "trained": torch.randn(4, requires_grad=True),
            "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(2.0),
        }
        write_safetensors(state, tmp_path / "x", {"step": "3"})
        read = read_safetensors(tmp_path / "x")
        assert read.keys() == state.keys()
        for name, tensor in state.items():
            assert read[name].dtype == tensor.dtype
            torch.testing.assert_close(read[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)
        with safe_open(tmp_path / "x", "pt") as file:
            assert file.metadata() == {"format": "pt", "step": "3"}

    def test_json_comes_back_and_text_is_written_byte_for_byte(self, tmp_path: Path):
        value = {"é": [1, 2.5, None, "a\r\nb"], "nested": {"x": True}}
        write_json(value, tmp_path / "x.json")
        assert read_json(tmp_path / "x.json") == value
        write_text("a\r\nb\né", tmp_path / "x.txt")
        assert (tmp_path / "x.txt").read_bytes() == "a\r\nb\né".encode()

    @WRITERS
    def test_who_reads_the_old_file_meanwhile_reads_it_whole(self, tmp_path: Path, write: Callable):
        path = tmp_path / "x"
        path.write_text("old")
        with path.open() as reader:
            write(path)
            assert reader.read() == "old"
        assert path.stat().st_size > 4000

    @WRITERS
    def test_a_full_disk_leaves_the_old_file_whole_and_no_other(self, tmp_path: Path, write: Callable):
        path = tmp_path / "x"
        path.write_text("old")
        with largest_file(1000), pytest.raises(OSError, match=r"File too large|os error 27") as caught:
            write(path)
        assert caught.value.filename == str(path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["x"]
        write(path)
        assert path.stat().st_size > 4000

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
    def test_whatever_stops_the_writer_nothing_is_left(self, tmp_path: Path, error: type[BaseException]):
        path = tmp_path / "x"
        path.write_text("old")

        def stop_in_the_middle() -> None:
            with replacing(path) as temporary:
                temporary.write_text("half")
                assert path.read_text() == "old"
                raise error

        with pytest.raises(error):
            stop_in_the_middle()
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["x"]

    def test_the_file_is_on_disk_before_its_name_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        flushed = []
        monkeypatch.setattr(files, "flush", lambda path: flushed.append((path, (tmp_path / "x").exists())))
        write_text("new", tmp_path / "x")
        (temporary, before), (folder, after) = flushed
        assert (temporary.parent, folder) == (tmp_path, tmp_path)
        assert (before, after) == (False, True)

    def test_what_a_killed_writer_left_is_known_by_its_name(self, tmp_path: Path):
        (tmp_path / "a").mkdir()
        half = [tmp_path / ".x.12", tmp_path / "a" / ".y.json.3", tmp_path / "a" / ".tmpoTRmjj"]
        for path in [*half, tmp_path / ".gitignore", tmp_path / "x.12", tmp_path / "a" / "b"]:
            path.touch()
        assert sorted(leftovers(tmp_path)) == sorted(half)

    @WRITERS
    def test_a_missing_folder_is_an_oserror(self, tmp_path: Path, write: Callable):
        with pytest.raises(FileNotFoundError):
            write(tmp_path / "none" / "x")
        assert os.listdir(tmp_path) == []

    @WRITERS
    def test_a_folder_in_the_way_is_an_oserror(self, tmp_path: Path, write: Callable):
        (tmp_path / "x").mkdir()
        with pytest.raises(IsADirectoryError):
            write(tmp_path / "x")
        assert os.listdir(tmp_path) == ["x"]

    @WRITERS
    @pytest.mark.parametrize("name", ["old", "new"])
    def test_a_folder_without_permission_is_an_oserror(self, locked_folder: Path, write: Callable, name: str):
        with pytest.raises(PermissionError):
            write(locked_folder / name)
        assert os.listdir(locked_folder) == ["old"]
        assert (locked_folder / "old").read_text() == "old"

    @WRITERS
    def test_a_file_has_the_permissions_the_user_gives_new_files(self, tmp_path: Path, write: Callable):
        before = os.umask(0o027)
        try:
            write(tmp_path / "x")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("read", [read_json, read_safetensors, read_text])
def test_what_may_never_end_or_begin_is_no_part_of_a_folder(read: Callable, fifo: Path, refusal):
    assert refusal(read, fifo) == f"{fifo}: expected a file, got a FIFO"
    zeros = device(fifo.with_name("zero"), ZERO)
    assert refusal(read, zeros) == f"{zeros}: expected a file, got a device"


def test_a_stream_is_read_to_its_end_or_to_a_bound(fifo: Path, refusal, monkeypatch: pytest.MonkeyPatch):
    def read(content: bytes) -> str:
        writer = threading.Thread(target=fifo.write_bytes, args=(content,))
        writer.start()
        try:
            return read_text(fifo, stream=True)
        finally:
            writer.join()

    assert read("a\r\né".encode()) == "a\r\né"
    monkeypatch.setattr(files, "LARGEST_STREAM", 2**20)
    assert refusal(read, b"a" * (2**20 + 1)) == f"{fifo}: expected at most 1 MiB, got more"
    zeros = device(fifo.with_name("zero"), ZERO)
    assert refusal(lambda: read_text(zeros, stream=True)) == f"{zeros}:1: expected text, got a NUL byte"


def test_json_has_a_bound(tmp_path: Path, refusal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "LARGEST_JSON", 2**20)
    (tmp_path / "x").write_bytes(b" " * (2**20 + 1))
    assert refusal(read_json, tmp_path / "x") == f"{tmp_path / 'x'}: expected at most 1 MiB, got more"


class TestWhatIsNoFile:
    @TestWriting.WRITERS
    def test_a_device_is_written_into(self, tmp_path: Path, write: Callable):
        path, full = device(tmp_path / "null", NULL), device(tmp_path / "full", FULL)
        write(path)
        assert path.is_char_device()
        with pytest.raises(OSError, match="No space left") as caught:
            write(full)
        assert caught.value.filename == str(full)
        assert full.is_char_device()
        assert sorted(os.listdir(tmp_path)) == ["full", "null"]

    def test_a_fifo_is_written_into(self, fifo: Path):
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(fifo.read_bytes)
            write_text("a\né", fifo)
            assert read.result() == "a\né".encode()
        assert fifo.is_fifo()

    @TestWriting.WRITERS
    @pytest.mark.parametrize("there", [True, False])
    def test_a_link_stays_and_leads_to_the_new_file(self, tmp_path: Path, write: Callable, there: bool):
        (tmp_path / "a").mkdir()
        target, link = tmp_path / "a" / "x", tmp_path / "link"
        link.symlink_to("a/x")
        if there:
            target.write_text("old")
        write(link)
        assert link.is_symlink()
        assert target.stat().st_size > 4000
        assert os.listdir(tmp_path / "a") == ["x"]

    def test_an_old_file_keeps_its_permissions(self, tmp_path: Path):
        write_text("old", tmp_path / "x")
        (tmp_path / "x").chmod(0o600)
        write_text("new", tmp_path / "x")
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize(
        ("place", "reason"),
        [("/", "Is a directory"), (".", "Is a directory"), ("loop", "Too many levels of symbolic links"),
         ("none/x", "No such file or directory"), ("file/x", "Not a directory"),
         ("socket", "expected a file, got a socket")],
    )  # fmt: skip
    def test_where_no_file_can_be_is_refused_before_any_work(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal, place: str, reason: str
    ):
        monkeypatch.chdir(tmp_path)
        Path("loop").symlink_to("loop")
        Path("file").touch()
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")
            before = os.listdir()
            said = refusal(check_output, Path(place), "--output")
            assert said == f"--output: {place} cannot be written ({reason})"
            with pytest.raises(OSError, match=re.escape(reason)):
                write_text("new", Path(place))
        assert os.listdir() == before

    def test_what_is_read_is_no_place_for_the_output(self, tmp_path: Path, fifo: Path, refusal):
        (tmp_path / "x").touch()
        (tmp_path / "link").symlink_to("x")
        for one in ("x", "link"):
            said = refusal(check_output, tmp_path / one, "--output", [tmp_path / "none", tmp_path / "x"])
            assert said == f"--output: expected a new file, {tmp_path / one} is read by this command"
        check_output(tmp_path / "y", "--output", [tmp_path / "x"])
        check_output(fifo, "--output", [fifo])
        check_output(None, "--output")


def test_text_that_utf8_cannot_hold_is_refused(tmp_path: Path, refusal):
    said = refusal(write_json, {"data": "/a/b\udcff"}, tmp_path / "x")
    assert said.startswith(f"{tmp_path / 'x'}: expected text that UTF-8 can hold, got '")
    assert os.listdir(tmp_path) == []
