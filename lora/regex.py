"""Regular expressions from files that someone else wrote, matched without backtracking.

Python's `re` tries one way after another, and `(.|.)*!` has 2^n of them in n characters. Here Python's parser
reads the expression, and each of its parts becomes a function (text, start) -> the positions at which a match
can end, each computed once: the time is bounded by a polynomial in the length of the text.
"""

import re
from collections.abc import Callable
from functools import cache

try:
    from re import _compiler, _parser
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_parse as _parser

Ends = Callable[[str, int], set[int]]

LONGEST, MOST_GROUPS = 1000, 50  # characters; each group nests calls
ONE_STEP = (_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN, _parser.AT, _parser.FAILURE)


class Regex:
    """Raises ValueError, which says why, if it is no regular expression or has a part not offered, as \\1."""

    def __init__(self, pattern: str):
        try:
            if len(pattern) > LONGEST or pattern.count("(") > MOST_GROUPS:
                raise re.error(f"more than {LONGEST} characters or {MOST_GROUPS} groups")
            self._ends = _sequence(_parser.parse(pattern))
        except (re.error, OverflowError) as error:
            raise ValueError(str(error)) from None

    def match(self, text: str) -> bool:
        """Whether `re.match` would find something."""
        return bool(self._ends(text, 0))

    def fullmatch(self, text: str) -> bool:
        return len(text) in self._ends(text, 0)


def _sequence(nodes: _parser.SubPattern) -> Ends:
    parts = [_part(nodes, op, value) for op, value in nodes]

    @cache
    def ends(text: str, start: int) -> set[int]:
        places = {start}
        for part in parts:
            places = _after(part, text, places)
        return places

    return ends


def _after(part: Ends, text: str, places: set[int]) -> set[int]:
    return {end for place in places for end in part(text, place)}


def _part(nodes: _parser.SubPattern, op: object, value: tuple) -> Ends:
    if op in ONE_STEP:
        compiled = _compiler.compile(_parser.SubPattern(nodes.state, [(op, value)]))
        return lambda text, start: {found.end()} if (found := compiled.match(text, start)) else set()
    if op is _parser.SUBPATTERN and not value[1] | value[2]:  # the two are flags of the group's own
        return _sequence(value[3])
    if op is _parser.BRANCH:
        branches = list(map(_sequence, value[1]))
        return lambda text, start: set().union(*(branch(text, start) for branch in branches))
    if op in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):  # greedy or not, the same text matches
        return _repeat(*value[:2], _sequence(value[2]))
    if op in (_parser.ASSERT, _parser.ASSERT_NOT):
        return _look(*value, op is _parser.ASSERT)
    raise re.error(f"{str(op).lower()} is not offered")


def _repeat(low: int, high: int, body: Ends) -> Ends:
    @cache
    def ends(text: str, start: int) -> set[int]:
        # After as many rounds as there are positions nothing changes: one more can only stand still.
        most = len(text) + 1
        places, found = {start}, set()
        for count in range(min(high, most) + 1):
            if count >= min(low, most):
                if places <= found:
                    break
                found |= places
            places = _after(body, text, places)
        return found

    return ends


def _look(direction: int, body: _parser.SubPattern, wanted: bool) -> Ends:
    inside, (width, widest) = _sequence(body), body.getwidth()
    if direction > 0:
        return lambda text, start: {start} if bool(inside(text, start)) == wanted else set()
    if width != widest:
        raise re.error("look-behind requires fixed-width pattern")
    return lambda text, start: (
        {start} if (start >= width and start in inside(text, start - width)) == wanted else set()
    )
