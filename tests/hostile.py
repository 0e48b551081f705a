"""Files that nobody should have written: strategies that damage sound ones, and what may come of reading."""

import copy
import json
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from minibert.errors import InputError

# Of each kind of file: 500 in every run of the tests, the same each time; HOSTILE_INPUTS=10000 for a night.
INPUTS = int(os.environ.get("HOSTILE_INPUTS", "500"))
MOST_SECONDS = 60  # for one file: what takes longer hangs
ROOM = 8 * 2**30  # bytes of address space beyond what there is: what wants more believes a file's claims

hostile = settings(
    max_examples=INPUTS,
    derandomize=INPUTS <= 500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much,
                           HealthCheck.function_scoped_fixture],
)  # fmt: skip

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "a/../b", "\0", "\ud800", "nan", "1e999", "%s%n",
                     "${HOME}", "__import__('os')", "'\"", "\u202e", "-1", "0x10", "1_0", "٣", "true", "~"]),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**18, 10**400, 1e308, -0.0]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
DEEP = [
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 5000 + "]" * 5000,
    "1" * 10_000,
    "1e" + "9" * 500,
    '"\\ud800"',
]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """Of every key and item in a value the path to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*path, key)
        yield from places(one, (*path, key))


@st.composite
def changed(draw: st.DrawFn, value: object) -> object:
    """A value of JSON with one to three of its parts replaced, left out, doubled or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            return draw(VALUES)
        *path, last = draw(st.sampled_from(paths))
        parent = value
        for key in path:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "delete", "add"]))
        if how == "delete":
            del parent[last]
        elif how == "replace":
            parent[last] = draw(VALUES)
        elif isinstance(parent, dict):
            parent[draw(TEXTS)] = draw(VALUES)
        else:
            parent.insert(last, draw(VALUES))
    return value


def as_json(value: object) -> bytes:
    return json.dumps(value).encode("utf-8")


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut, flipped, doubled, or with others in their place."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        how = draw(st.sampled_from(["cut", "replace", "double", "flip", "insert"]))
        if how == "cut":
            content = content[:start]
        elif how == "flip" and start < len(content):
            flipped = content[start] ^ (1 << draw(st.integers(0, 7)))
            content = content[:start] + bytes([flipped]) + content[start + 1 :]
        elif how == "double":
            content = content[:end] + content[start:]
        else:
            middle = draw(st.binary(max_size=12))
            content = content[:start] + middle + content[start if how == "insert" else end :]
    return content


def json_files(sound: dict) -> st.SearchStrategy[bytes]:
    """Of a file that holds `sound`: other values, broken bytes, and what is no such file at all."""
    return st.one_of(
        changed(sound).map(as_json),
        damaged(as_json(sound)),
        VALUES.map(as_json),
        st.sampled_from(DEEP).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=60),
    )


@st.composite
def _with_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    other = draw(changed(header))
    if isinstance(other, dict) and names and draw(st.booleans()):
        one = {"dtype": draw(st.sampled_from(["F32", "F64", "I64", "BOOL", "F8_E4M3", "BF16", "X9"])),
               "shape": draw(st.lists(st.sampled_from([0, 1, 7, 32, 2**31, 2**40, 2**63 - 1]), max_size=4)),
               "data_offsets": draw(st.lists(st.sampled_from([0, 4, 2**20, 2**40, 2**64 - 1]), min_size=2,
                                             max_size=2))}  # fmt: skip
        other[draw(st.sampled_from(names))] = one
    told = as_json(other)
    claimed = draw(st.sampled_from([len(told)] * 6 + [0, 1, len(told) - 1, 2**32, 2**40, 2**63, 2**64 - 1]))
    return struct.pack("<Q", claimed) + told + data


def safetensors_files(content: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(_with_header(content), damaged(content), st.binary(max_size=60))


@contextmanager
def limits() -> Iterator[None]:
    """Inside, what hangs or takes memory without bound ends in an exception of its own."""

    def hangs(*_: object) -> None:
        raise TimeoutError(f"reading took more than {MOST_SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, hard))
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def read_or_refused(read: Callable[[], object]) -> object:
    """What a reader gives, or None if it refuses in one line for people; any other end is a defect."""
    with limits():
        try:
            return read()
        except InputError as error:
            line = " ".join(str(error).split())  # as `run_command` shows it
            assert 0 < len(line) < 2000, line
            return None
        except SystemExit as end:
            if end.code:
                raise
            return None  # --help
