"""How a command ends: the exit code, and one line."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import call
from special_files import FULL, device

from minibert.errors import InputError
from training.errors import TrainingError
from training.exit import OUT_OF_MEMORY, run_command
from training.signals import SIGNALS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("becomes", [None, ImportError, RuntimeError, OSError], ids=str)
def test_a_signal_ends_a_command_in_a_line_whatever_a_library_makes_of_it(
    how: signal.Signals, code: int, becomes: type | None
) -> None:
    def main() -> int:
        try:
            signal.raise_signal(how)
        except KeyboardInterrupt:
            if becomes is None:
                raise
            raise becomes("made of it") from None
        return 0

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ended = call(main)
    assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)  # the process ends now
    for number, handler in before.items():
        signal.signal(number, handler)
    assert (ended.code, ended.line) == (code, f"error: interrupted by {how.name}")


def test_a_command_that_no_signal_ends_leaves_them_as_they_were() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    assert call(lambda: 0).code == 0
    assert [signal.getsignal(number) for number in SIGNALS] == before


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_commands_own_code_is_passed_on(code: int) -> None:
    assert call(lambda: code) == (code, "", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("--rank: expected 1"), 2, "--rank: expected 1"),
        (InputError("two\n  lines"), 2, "two lines"),
        (OSError(28, "No space left on device", "runs/x/result.json"), 1,
         "runs/x/result.json: No space left on device"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError("odd"), 1, "odd"),
        (PermissionError(13, "Permission denied", "x"), 1, "x: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), 1, OUT_OF_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), 1, OUT_OF_MEMORY),
        (TrainingError("step 3: the loss is not finite"), 1, "step 3: the loss is not finite"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_failure_that_a_user_can_cause_is_a_line(error: BaseException, code: int, line: str) -> None:
    ended = call(raising(error))
    assert (ended.code, ended.out) == (code, "")
    assert ended.line == f"error: {line}"


def test_a_kernel_that_does_not_compile_is_a_line() -> None:
    errors = pytest.importorskip("triton.runtime.errors", reason="Triton is not installed")
    ended = call(raising(errors.OutOfResources(70_000, 65_536, "shared memory")))
    assert ended.code == 1
    assert "(OutOfResources: out of resource: shared memory, Required: 70000" in ended.line
    assert ended.line.endswith("MINIBERT_KERNELS=0 does without")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x"), KeyError("x"),
     RecursionError("x"), AssertionError("x")],
    ids=repr,
)  # fmt: skip
def test_a_defect_of_ours_is_shown_whole(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_command(raising(error))
    assert caught.value is error


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_goes_away_is_no_traceback(lines: int) -> None:
    code = (
        "import sys; from training.exit import run_command\n"
        "def main():\n"
        "    sys.stdin.read()\n"  # until the reader has gone
        f"    for _ in range({lines}): print('a line of output')\n"
        "    return 0\n"
        "sys.exit(run_command(main))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.parametrize(("processes", "code"), [("1", -signal.SIGABRT), ("2", 143)])
def test_one_of_several_processes_leaves_before_anything_can_abort_it(processes: str, code: int) -> None:
    script = (
        "import atexit, os; from training.exit import leave; atexit.register(os.abort); print(1); leave(143)"
    )
    environment = os.environ | {"WORLD_SIZE": processes}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code
    assert ended.stdout == "1\n" or code < 0


ESCAPED = {
    "\x1b[2J\x07": "\\x1b[2J\\x07", "a\rb": "a\\rb", "\x9b31m\x7f": "\\x9b31m\\x7f", "\u202eb": "\\u202eb",
    "caf\udce9": "caf\\udce9", "naïve ± 猫 \t": "naïve ± 猫 \t",
}  # fmt: skip


@pytest.mark.parametrize("text", ESCAPED)
def test_a_terminal_is_shown_control_characters_and_obeys_none(text: str) -> None:
    def main() -> int:
        print(text)
        print(text, file=sys.stderr)
        raise InputError(text)

    ended = call(main)
    assert ended.out == ESCAPED[text] + "\n"
    printed, line, _ = ended.err.split("\n")
    assert printed == ESCAPED[text].replace("\\r", "\r")  # which progress bars need
    assert line.startswith("error: ")
    assert line.isprintable()


PRINTS = (
    "import sys; from training.exit import run_command\n"
    "def main():\n"
    "    print('± 猫')\n"
    "    return 0\n"
    "sys.exit(run_command(main))"
)


@pytest.mark.parametrize(
    ("redirected", "code", "out", "err"),
    [
        ("", 0, "\\xb1 \\u732b\n", ""),
        (">&-", 2, "", "error: standard output is closed; > /dev/null discards what is said\n"),
        ("2>&-", 0, "\\xb1 \\u732b\n", ""),
        (">&- 2>&-", 2, "", ""),
        ("> {full}", 1, "", "error: standard output: No space left on device\n"),
    ],
)
def test_a_stdout_in_ascii_closed_or_full_is_a_line(
    redirected: str, code: int, out: str, err: str, tmp_path: Path
) -> None:
    if "full" in redirected:
        device(tmp_path / "full", FULL)
    command = f'{sys.executable} -c "$CODE" {redirected.format(full=tmp_path / "full")}'
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "CODE": PRINTS}
    ended = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, out, err)
