"""SIGINT, SIGTERM, SIGHUP: at once where there is nothing to finish, between two steps where there is."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


def handlers() -> dict[int, object]:
    """What is done about each signal; without those that are ignored, as SIGHUP is under nohup."""
    now = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in now.items() if handler != signal.SIG_IGN}


def outlive_terminal(signum: int) -> None:
    """After any signal SIGHUP is ignored; after SIGHUP nothing is written to a terminal that is gone.

    A lost connection sends SIGHUP more than once: the shell does, and the kernel; and systemd sends it right
    after SIGTERM. None of these is a second wish. What is written to such a terminal is an error, which must
    not keep the run from saving and from its exit code.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for stream in (1, 2) if signum == signal.SIGHUP else ():
        try:
            os.write(stream, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class StopAtOnce:
    """Inside, a signal raises KeyboardInterrupt, unless it is ignored, and what comes of it is swallowed.

    While a module is being imported it ends the process instead: nothing is half-written then, and a
    library's own code, which expects no exception, would abort, or make another of it. `signum` is the one
    that came, or 0. After it the process is to end, and further ones are ignored: they would only change
    its exit code.
    """

    def __enter__(self) -> "StopAtOnce":
        self.signum = 0
        self.before = handlers()
        for number in self.before:
            signal.signal(number, self._stop)
        return self

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        outlive_terminal(signum)
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

    def note(self) -> None:
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
    """What has come of the signals. A second one acts as usual; SIGHUP is not counted."""
    received, before = Received(), handlers()

    def restore() -> None:
        for number, handler in before.items():
            # A command has yet to do what a signal asks for, and goes on to ignore SIGHUP.
            ending = received.signum and number == signal.SIGHUP and handler != signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if ending else handler)

    def note(signum: int, frame: object) -> None:
        received.signum = signum
        outlive_terminal(signum)
        if signum != signal.SIGHUP:
            restore()
        received.note()

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
