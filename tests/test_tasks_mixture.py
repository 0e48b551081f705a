"""Which task has its turn: how many turns, when, and that it is a function of the step alone."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.mixture import Turns, TurnsTogether, turns_per_epoch

PER_EPOCH = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(
    lambda counts: dict(zip(("sst", "qqp", "sts"), counts, strict=False))
)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (1, {"sst": 100, "qqp": 1600, "sts": 25}),  # each task's data once
        (2, {"sst": 400, "qqp": 1600, "sts": 200}),  # 1600 times 1/4 and 1/8
        (4, {"sst": 800, "qqp": 1600, "sts": 566}),  # 1600 times 1/2 and 1/8^(1/2)
        (math.inf, {"sst": 1600, "qqp": 1600, "sts": 1600}),
    ],
)
def test_the_turns_of_an_epoch_are_those_by_hand(temperature: float, expected: dict) -> None:
    assert turns_per_epoch({"sst": 100, "qqp": 1600, "sts": 25}, temperature) == expected


@given(st.lists(st.integers(1, 10**5), min_size=1, max_size=5), st.floats(1, 100))
def test_shares_are_the_papers_but_for_half_a_turn(counts: list[int], temperature: float) -> None:
    turns = turns_per_epoch(dict(zip("abcde", counts, strict=False)), temperature)
    assert max(turns.values()) == max(counts)  # the largest task's data once
    rates = [count ** (1 / temperature) for count in counts]  # Raffel et al. 2020, section 3.5.2
    exact = [max(counts) * rate / max(rates) for rate in rates]
    for turn, wanted in zip(turns.values(), exact, strict=True):
        assert abs(turn - wanted) <= 0.5 + 1e-6 or (turn == 1 and wanted < 1)


@given(PER_EPOCH)
def test_every_epoch_has_exactly_its_turns(per_epoch: dict[str, int]) -> None:
    turns = Turns(per_epoch)
    length = turns.steps_per_epoch
    assert length == sum(per_epoch.values())
    for epoch in range(3):
        assert Counter(turns.task(epoch * length + i) for i in range(length)) == per_epoch


@given(PER_EPOCH, st.lists(st.integers(0, 10**6), max_size=9))
def test_the_turns_a_task_has_had_are_those_counted(per_epoch: dict[str, int], far: list[int]) -> None:
    turns, counted = Turns(per_epoch), Counter()
    for step in range(2 * turns.steps_per_epoch + 3):
        assert {name: turns.had(name, step) for name in per_epoch} == {n: counted[n] for n in per_epoch}
        counted[turns.task(step)] += 1
    for step in far:  # asked in any order, and far ahead
        assert sum(turns.had(name, step) for name in per_epoch) == step
        task = turns.task(step)
        assert turns.had(task, step + 1) == turns.had(task, step) + 1


@given(PER_EPOCH)
def test_at_no_step_is_a_task_a_whole_turn_from_its_share(per_epoch: dict[str, int]) -> None:
    turns = Turns(per_epoch)
    for step in range(turns.steps_per_epoch + 1):
        for name, count in per_epoch.items():
            assert abs(turns.had(name, step) - step * count / turns.steps_per_epoch) < 1


def test_tasks_with_as_many_turns_go_round() -> None:
    turns = Turns({"sts": 4, "sst": 4, "qqp": 4})
    assert [turns.task(step) for step in range(24)] == ["sts", "sst", "qqp"] * 8


def test_a_small_task_stands_amid_the_steps_of_a_large_one() -> None:
    turns = Turns({"qqp": 6, "sst": 2})
    assert [turns.task(step) for step in range(8)] == ["qqp", "qqp", "sst", "qqp", "qqp", "qqp", "sst", "qqp"]


@given(PER_EPOCH)
def test_turns_taken_together_are_those_of_the_epoch_and_lie_where_their_places_are(per_epoch: dict) -> None:
    turns, counted = TurnsTogether(per_epoch), Counter()
    length = turns.steps_per_epoch
    assert length == max(per_epoch.values())
    for step in range(2 * length):
        assert {name: turns.had(name, step) for name in per_epoch} == {n: counted[n] for n in per_epoch}
        for name in turns.tasks(step):
            turn, k = counted[name] % per_epoch[name], per_epoch[name]
            assert step % length * 2 * k <= (2 * turn + 1) * length < (step % length + 1) * 2 * k
            counted[name] += 1
    assert counted == {name: 2 * count for name, count in per_epoch.items()}
