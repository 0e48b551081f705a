"""How a command ends: the exit code scripts rely on, and one line for people."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import NoReturn, TextIO

from minibert.errors import InputError, printable
from training.signals import StopAtOnce, interrupted

STDOUT, STDERR = "standard output", "standard error"
OUT_OF_MEMORY = (
    "out of memory; try --recompute, or a smaller --micro-batch-size, --batch-size or --max-length"
)


def run_command(main: Callable[[], int]) -> int:
    """Call `main`, turning the failures a user can cause into a line and a code.

    0 done; 1 a failure while running; 2 bad usage or input; 129, 130 and 143 interrupted.
    """
    # oneDNN keeps a kernel of half a megabyte for each of the last 1,024 shapes it met, and the number of
    # packed tokens differs from batch to batch. It reads this when torch is first used, so before `main`.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("standard output is closed; > /dev/null discards what is said", 2)
    out, err = Shown(sys.stdout, STDOUT), Shown(sys.stderr, STDERR, moves=r"\r|\x1b\[A")
    with redirect_stdout(out), redirect_stderr(err):
        return _code_of(main)


def _code_of(main: Callable[[], int]) -> int:
    code = None
    try:
        with StopAtOnce() as stop:
            code = main()
            sys.stdout.flush()
        if code is None:
            return _fail(interrupted(stop.signum), 128 + stop.signum)
        return code
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        if error.filename == STDOUT:  # what Python flushes at exit goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) and error.filename in (STDOUT, STDERR, None):
            return 1  # who read it went away
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", 1)
    except MemoryError:
        return _fail(OUT_OF_MEMORY, 1)
    except RuntimeError as error:
        return _runtime_error(error)
    except _triton_errors() as error:  # looked up only when nothing above was raised
        said = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {said[-1]}"
        return _fail(f"a Triton kernel does not run on this GPU ({why}); MINIBERT_KERNELS=0 does without", 1)


def leave(code: int) -> NoReturn:
    """End the process with what `run_command` has returned: at once if it is one of several.

    The threads by which those talk may abort a process while Python puts its modules away, and what was said
    and the exit code are to be the command's own.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _runtime_error(error: RuntimeError) -> int:
    """No memory, or a run that cannot go on: a line. Any other is a defect of ours, shown whole."""
    from training.errors import TrainingError

    if isinstance(error, TrainingError):
        return _fail(str(error), 1)
    if "out of memory" in str(error) or "can't allocate memory" in str(error):
        return _fail(OUT_OF_MEMORY, 1)
    raise error


def _triton_errors() -> tuple[type[Exception], ...]:
    """What Triton raises when it cannot compile or launch; nothing where it was never imported."""
    return (sys.modules["triton.errors"].TritonError,) if "triton.errors" in sys.modules else ()


class Shown:
    """A stream that people read: what `printable` escapes is shown there, and not obeyed.

    `moves` is what progress bars move the cursor by; it passes.
    """

    def __init__(self, stream: TextIO, called: str, moves: str = "(?!)"):
        self.stream, self.called, self.moves = stream, called, re.compile(f"({moves})")

    def write(self, text: str) -> int:
        parts = self.moves.split(text)  # every second one is a move
        parts[::2] = [printable(part, self.stream.encoding or "utf-8") for part in parts[::2]]
        with self._named():
            return self.stream.write("".join(parts))

    def flush(self) -> None:
        with self._named():
            self.stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk, a reader that went away
            raise OSError(error.errno, error.strerror, self.called) from None

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
