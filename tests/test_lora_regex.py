"""Regular expressions match what Python's own match, and cannot take for ever."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora.regex import Regex

PIECES = st.sampled_from(
    ["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", r"\b", "^", "$", r"\d", "(?!)", "(?<=a)", "(?<!b.)"]
)
PATTERNS = st.recursive(
    PIECES,
    lambda inner: (
        st.tuples(inner, inner).map("".join)
        | st.tuples(inner, inner).map(lambda two: "({}|{})".format(*two))
        | st.tuples(inner, st.sampled_from(["*", "+", "??", "{2}", "{1,3}?", "{,2}", "{2,}"])).map(
            lambda two: "(?:{}){}".format(*two)
        )
        | inner.map("(?={})".format)
        | inner.map("(?!{})".format)
    ),
    max_leaves=8,
)


@given(pattern=PATTERNS, text=st.text("ab.1", max_size=6))
def test_it_matches_what_python_matches(pattern: str, text: str) -> None:
    ours, pythons = Regex(pattern), re.compile(pattern)
    assert ours.match(text) == bool(pythons.match(text))
    assert ours.fullmatch(text) == bool(pythons.fullmatch(text))


@pytest.mark.parametrize(
    "pattern", ["(.|.)*!", "((((.?){9}){9}){9}){9}!", "(.*)*" * 50 + "!", "(.?){4000000000}!"]
)
def test_what_would_take_python_for_ever_is_answered(pattern: str) -> None:
    text = "bert.encoder.layer.11.attention.self.query"
    assert not Regex(pattern).match(text)
    assert Regex(pattern).fullmatch(f"{text}!")


@pytest.mark.parametrize(
    "pattern", ["(", "a" * 1001, "(" * 51 + ")" * 51, r"(a)\1", "(?i:a)", "(?<=a*)b", "a{9999999999}"]
)
def test_what_is_not_offered_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="."):
        Regex(pattern)
