"""How a command ends: the exit code scripts rely on, and one line for people."""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from minibert.errors import InputError
from training.signals import StopAtOnce, interrupted


def run_command(main: Callable[[], int]) -> int:
    """Call `main`, turning the failures a user can cause into a line and a code.

    0 done; 1 a failure while running; 2 bad usage or input; 129, 130 and 143 interrupted.
    """
    # oneDNN keeps a kernel of half a megabyte for each of the last 1,024 shapes it met, and the number of
    # packed tokens differs from batch to batch. It reads this when torch is first used, so before `main`.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
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
    except BrokenPipeError:  # the reader of our output went away; what Python flushes at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}", 1)
    except MemoryError:
        return _fail("out of memory; try a smaller --batch-size or --max-length", 1)
    except RuntimeError as error:
        return _runtime_error(error)


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
        return _fail("out of memory; try a smaller --batch-size or --max-length", 1)
    raise error


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code
