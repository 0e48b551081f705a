"""SIGINT and SIGTERM: at once where there is nothing to finish, between two steps where there is."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """One asked the run to stop; it has stopped between two steps, or before the first."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def interrupted(signum: int) -> str:
    return f"interrupted by {signal.Signals(signum).name}"


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


class StopAtOnce:
    """Inside, a signal raises KeyboardInterrupt, unless it is ignored, and what comes of it is swallowed.

    While a module is being imported it ends the process instead: nothing is half-written then, and a
    library's own code, which expects no exception, would abort, or make another of it. `signum` is the one
    that came, or 0. After it the process is to end, and further ones are ignored: they would only change
    its exit code.
    """

    def __enter__(self) -> "StopAtOnce":
        self.signum = 0
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self.before = {number: one for number, one in handlers.items() if one != signal.SIG_IGN}
        for number in self.before:
            signal.signal(number, self._stop)
        return self

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if importing(frame):
            sys.stdout.flush()
            os.write(2, f"error: {interrupted(signum)}\n".encode())
            os._exit(128 + signum)
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.signum else handler)
        return kind is not None and self.signum != 0


class Received:
    """The signal that has come, or 0; within `at_once` it raises `Interrupted`."""

    def __init__(self):
        self.signum, self.raises = 0, False

    def __call__(self) -> int:
        return self.signum

    def check(self) -> None:
        if self.signum:
            raise Interrupted(self.signum)

    def note(self, signum: int) -> None:
        self.signum = signum
        if self.raises:
            self.check()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that takes long and changes nothing until it is done."""
        self.raises = True
        try:
            self.check()
            yield
        finally:
            self.raises = False


@contextmanager
def stop_signals() -> Iterator[Received]:
    """What has come of SIGINT and SIGTERM. A second one acts as usual."""
    received = Received()
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(signum: int, frame: object) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        received.note(signum)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
