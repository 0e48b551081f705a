"""Packed batches, and the order they come in."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bert import TINY

from minibert.tokenizer import Tokenizer
from tasks import QQP, SST, STS
from tasks.base import Example, Task
from tasks.data import POOL, Dataset, Features, epoch_order, like_length, pack, unpack
from tasks.mixture import Mixture
from tasks.share import dealt

WORDS = ["the", "a", "is", "not", "good", "bad", "film", "what", "how", "cat", "dog", "zebra"]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(1, 12)))


def some_examples(task: Task, count: int, labelled: bool = True) -> list[Example]:
    rng = np.random.default_rng(count)
    return [
        Example(
            id=f"{task.name}-{i}",
            texts=tuple(sentence(rng) for _ in task.text_columns),
            label=float(rng.integers(task.num_outputs + 1 - task.is_classification)) if labelled else None,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(tiny, 64, TINY.vocab_size)


def unpacked(batch) -> list[tuple[list[int], list[int]]]:
    """The (input_ids, token_type_ids) of each sequence of a batch."""
    ends = np.cumsum(batch.sequences.lengths)
    return [
        (batch.input_ids[end - length : end].tolist(), batch.token_type_ids[end - length : end].tolist())
        for end, length in zip(ends, batch.sequences.lengths, strict=True)
    ]


def encoded(tokenizer: Tokenizer, texts: list) -> list[tuple[list[int], list[int]]]:
    return [tuple(tokenizer([text])[0]) for text in texts]


# A batch


CHOICES = [[0], [8], [3, 1, 4], [8, 7, 6, 5, 4, 3, 2, 1, 0], [2, 2]]


@pytest.mark.parametrize("indices", CHOICES)
def test_a_batch_of_sentences_packs_what_the_tokenizer_gave(tokenizer: Tokenizer, indices: list[int]):
    examples = some_examples(SST, 9)
    batch = Dataset(SST, examples, tokenizer).collate(np.array(indices))
    assert unpacked(batch) == encoded(tokenizer, [examples[i].texts[0] for i in indices])


def test_equal_texts_of_siamese_pairs_have_one_number(tokenizer: Tokenizer):
    """As the encoder reads them: these words differ in case alone."""
    pairs = [("A cat", "a dog"), ("what", "a cat"), ("what", "a dog .")]
    examples = [Example(str(i), pair, 1.0) for i, pair in enumerate(pairs)]
    data = Dataset(STS, examples, tokenizer, siamese=True)
    assert data.collate(np.array([0, 1, 2])).texts.tolist() == [0, 1, 1, 3, 0, 5]
    assert Dataset(STS, examples, tokenizer).collate(np.array([0, 1, 2])).texts is None


@pytest.mark.parametrize("indices", CHOICES)
def test_a_batch_of_concatenated_pairs_holds_one_sequence_a_pair(tokenizer: Tokenizer, indices: list[int]):
    examples = some_examples(QQP, 9)
    batch = Dataset(QQP, examples, tokenizer).collate(np.array(indices))
    assert unpacked(batch) == encoded(tokenizer, [examples[i].texts for i in indices])
    assert {0, 1} == set(batch.token_type_ids.tolist())


@pytest.mark.parametrize("indices", CHOICES)
def test_a_siamese_batch_holds_all_left_sides_and_then_all_right_sides(
    tokenizer: Tokenizer, indices: list[int]
):
    examples = some_examples(STS, 9)
    batch = Dataset(STS, examples, tokenizer, siamese=True).collate(np.array(indices))
    texts = [examples[i].texts[side] for side in (0, 1) for i in indices]
    assert unpacked(batch) == encoded(tokenizer, texts)
    assert not batch.token_type_ids.any()
    assert len(batch.ids) == len(batch.labels) == len(indices)


@pytest.mark.parametrize("siamese", [False, True])
@pytest.mark.parametrize("task", [SST, QQP, STS], ids=lambda task: task.name)
def test_ids_and_labels_are_in_step(tokenizer: Tokenizer, task: Task, siamese: bool):
    examples = some_examples(task, 9)
    data = Dataset(task, examples, tokenizer, siamese and task.is_pair)
    batch = data.collate(np.array([7, 0, 3]))
    assert batch.ids == tuple(examples[i].id for i in (7, 0, 3))
    assert batch.labels.tolist() == [examples[i].label for i in (7, 0, 3)]
    assert batch.labels.dtype == (torch.int64 if task.is_classification else torch.float32)


def test_filler_of_zeros_makes_the_number_of_rows_a_multiple_of_64(tokenizer: Tokenizer):
    examples = some_examples(STS, 80)
    seen = set()
    for siamese in (False, True):
        data = Dataset(STS, examples, tokenizer, siamese)
        for size in range(1, 81):
            batch = data.collate(np.arange(size))
            real = sum(batch.sequences.lengths)
            assert len(batch.input_ids) == len(batch.token_type_ids) == real + batch.sequences.filler
            assert len(batch.input_ids) % 64 == 0
            assert 0 <= batch.sequences.filler < 64
            assert not batch.input_ids[real:].any()
            assert not batch.token_type_ids[real:].any()
            seen.add(batch.sequences.filler)
    assert len(seen) > 30


def test_a_batch_without_room_for_filler_has_none(tokenizer: Tokenizer):
    examples = [Example(str(i), ("a " * 14,), 0.0) for i in range(4)]  # with [CLS] and [SEP] 16 tokens each
    batch = Dataset(SST, examples, tokenizer).collate(np.arange(4))
    assert (len(batch.input_ids), batch.sequences.filler) == (64, 0)


def test_without_a_label_for_every_example_a_batch_has_none(tokenizer: Tokenizer):
    examples = some_examples(STS, 3, labelled=False)
    assert Dataset(STS, examples, tokenizer).collate(np.arange(3)).labels is None
    examples[1:] = some_examples(STS, 3)[1:]
    assert Dataset(STS, examples, tokenizer).collate(np.arange(1, 3)).labels is None


def test_a_batch_moves_to_a_device_with_all_that_a_step_reads(tokenizer: Tokenizer):
    meta = torch.device("meta")
    data = Dataset(SST, some_examples(SST, 5), tokenizer)
    batch = data.collate(np.arange(5))
    moved = batch.to(meta)
    sequences = moved.sequences
    read = [moved.input_ids, moved.token_type_ids, moved.labels, *sequences.tensors().values()]
    assert {tensor.device for tensor in read} == {meta}
    assert set(sequences.tensors()) == set(batch.sequences.tensors())
    assert (moved.pooled, sequences) == (None, batch.sequences)
    assert batch.to(torch.device("cpu")) is batch
    data.features = Features(5, np.arange(5), sides=1, hidden_size=7)
    moved = data.collate(np.arange(5)).to(meta)
    assert {moved.pooled.device, moved.labels.device} == {meta}
    data = Dataset(SST, some_examples(SST, 5, labelled=False), tokenizer)
    assert data.collate(np.arange(5)).to(meta).labels is None


def test_what_is_packed_is_unpacked_bit_for_bit_from_one_memory():
    tensors = {
        "labels": torch.randint(9, (5,)),
        "bytes": torch.randint(99, (3,), dtype=torch.int8),
        "pooled": torch.randn(3, 1, 7),
        "nothing": torch.empty(0, 4),
        "ids": torch.randint(99, (11,), dtype=torch.int32),
    }
    row = pack(tensors, pinned=False)
    found = unpack(row, like=tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
        assert found[name].untyped_storage().data_ptr() == row.untyped_storage().data_ptr()


@pytest.mark.parametrize("siamese", [False, True])
def test_a_batch_carries_the_features_of_its_sequences_in_their_order(tokenizer: Tokenizer, siamese: bool):
    data = Dataset(STS, some_examples(STS, 9), tokenizer, siamese)
    sides = 2 if siamese else 1
    data.features = Features(9, np.array([1, 3, 4, 8]), sides, hidden_size=2)
    for indices in (np.array([8, 1, 4]), np.array([3])):  # side s of example i is (s, i)
        rows = [[side, i] for side in range(sides) for i in indices]
        data.features.put(indices, torch.tensor(rows, dtype=torch.float32))
    batch = data.collate(np.array([4, 3, 8]))
    assert batch.pooled.dtype == torch.float32
    assert batch.pooled.tolist() == [[side, i] for side in range(sides) for i in (4, 3, 8)]
    assert len(batch.sequences.lengths) == len(batch.pooled)
    with pytest.raises(IndexError):
        data.collate(np.array([4, 5]))  # 5 has none


# Orders


@pytest.mark.parametrize("batch_size", [1, 4, 10, 16])
@pytest.mark.parametrize("siamese", [False, True])
def test_evaluation_sees_every_example_once_longest_first(
    tokenizer: Tokenizer, batch_size: int, siamese: bool
):
    data = Dataset(STS, some_examples(STS, 10), tokenizer, siamese)
    seen, lengths = [], []
    for indices, batch in data.in_order_of_length(batch_size, most_tokens=10**6):
        assert batch.ids == tuple(data.examples[i].id for i in indices)
        assert len(batch.ids) == min(batch_size, 10 - len(seen))
        seen += indices.tolist()
        sides = np.array(batch.sequences.lengths).reshape(2 if siamese else 1, -1)
        lengths += sides.sum(axis=0).tolist()
    assert sorted(seen) == list(range(10))
    assert lengths == sorted(lengths, reverse=True)


@given(among=st.sets(st.integers(0, 9)))
def test_it_may_be_some_of_the_examples(tokenizer: Tokenizer, among: set[int]):
    data = Dataset(STS, some_examples(STS, 10), tokenizer)
    batches = list(data.in_order_of_length(3, 10**6, np.array(sorted(among), int)))
    seen = [i for indices, _ in batches for i in indices.tolist()]
    assert sorted(seen) == sorted(among)
    lengths = [length for _, batch in batches for length in batch.sequences.lengths]
    assert lengths == sorted(lengths, reverse=True)


@given(most_tokens=st.integers(1, 400))
def test_evaluation_takes_as_many_examples_at_a_time_as_the_tokens_allow(
    tokenizer: Tokenizer, most_tokens: int
):
    data = Dataset(STS, some_examples(STS, 30), tokenizer)
    batches = [batch.sequences.lengths for _, batch in data.in_order_of_length(30, most_tokens)]
    assert sum(map(len, batches)) == 30
    for lengths in batches:
        assert sum(lengths) <= most_tokens or len(lengths) == 1
    for lengths, following in zip(batches, batches[1:], strict=False):
        assert sum(lengths) + following[0] > most_tokens


@given(
    length=st.integers(1, 300), seed=st.integers(0, 2**32), task=st.text(max_size=9), epoch=st.integers(0, 99)
)
def test_the_order_of_an_epoch_is_a_permutation(length: int, seed: int, task: str, epoch: int):
    assert sorted(epoch_order(length, seed, task, epoch)) == list(range(length))


def test_the_order_differs_by_seed_by_task_and_by_epoch():
    arguments = [(s, t, e) for s in (0, 1, 2, 7) for t in ("sst", "qqp", "sts") for e in (0, 1, 2, 7)]
    assert len({tuple(epoch_order(50, *one)) for one in arguments}) == len(arguments)


def test_the_order_depends_on_nothing_else():
    orders = []
    for state in (0, 1):
        np.random.seed(state)
        torch.manual_seed(state)
        orders.append(epoch_order(50, 3, "sst", 2).tolist())
    code = "from tasks.data import epoch_order; print(epoch_order(50, 3, 'sst', 2).tolist())"
    other_process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "1"},  # hashes of strings differ from one process to another
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    orders.append([int(i) for i in other_process.stdout.strip("[]\n").split(",")])
    assert orders == [orders[0]] * 3


@given(
    length=st.integers(1, 600),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    longest=st.integers(1, 40),
)
def test_batches_of_like_length_are_the_orders_examples_once_each(length, batch_size, seed, longest):
    lengths = np.random.default_rng(seed).integers(1, longest + 1, length)
    order = epoch_order(length, seed, "sst", 0)
    alike = like_length(order, lengths, batch_size)
    assert sorted(alike) == list(range(length))
    pool = POOL * batch_size
    for start in range(0, length, batch_size):  # a batch is a run of some pool that is sorted by length
        batch = alike[start : start + batch_size]
        among = next(one for one in np.split(order, range(pool, length, pool)) if set(batch) & set(one))
        ranked = sorted(lengths[among])
        mine = sorted(lengths[batch])
        assert any(mine == ranked[i : i + len(mine)] for i in range(0, len(ranked), batch_size))


def test_batches_of_like_length_come_in_no_order_of_length():
    lengths = np.random.default_rng(0).integers(4, 60, 3200)
    alike = like_length(epoch_order(3200, 0, "sst", 0), lengths, 32)
    means = lengths[alike].reshape(100, 32).mean(1)
    spread = lengths[alike].reshape(100, 32).std(1).mean()
    assert spread < 0.1 * lengths.std()
    places = np.argsort(np.argsort(means))
    assert abs(np.corrcoef(places, np.arange(100))[0, 1]) < 0.2  # one standard deviation of chance is .1
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.2


# Several tasks


@pytest.fixture(scope="module")
def datasets(tokenizer: Tokenizer):
    """Datasets of the given sizes by task, tokenized once each."""
    made: dict[tuple[str, int], Dataset] = {}

    def make(sizes: dict[str, int]) -> dict[str, Dataset]:
        tasks = {"sst": SST, "qqp": QQP, "sts": STS}
        for name, size in sizes.items():
            if (name, size) not in made:
                made[name, size] = Dataset(tasks[name], some_examples(tasks[name], size), tokenizer)
        return {name: made[name, size] for name, size in sizes.items()}

    return make


SIZES = st.dictionaries(st.sampled_from(["sst", "qqp", "sts"]), st.integers(1, 17), min_size=1, max_size=3)
TEMPERATURES = st.sampled_from([1.0, 2.0, 5.0, math.inf])


@settings(max_examples=60)
@given(sizes=SIZES, batch_size=st.integers(1, 20), seed=st.integers(0, 3), alike=st.booleans())
def test_tasks_alternate_and_each_goes_through_all_its_examples_before_any_comes_again(
    datasets, sizes: dict[str, int], batch_size: int, seed: int, alike: bool
):
    plan = Mixture(datasets(sizes), batch_size, seed, alike=alike)
    passes = {name: -(-size // batch_size) for name, size in sizes.items()}  # batches in a pass
    assert plan.steps_per_epoch == len(sizes) * max(passes.values())

    steps = [plan.batch(step) for step in range(2 * plan.steps_per_epoch)]
    names = list(sizes)
    assert [name for name, _ in steps] == names * (len(steps) // len(names))
    for name, size in sizes.items():
        ids = [batch.ids for task, batch in steps if task == name]
        whole = {f"{name}-{i}" for i in range(size)}
        for start in range(0, len(ids) - passes[name] + 1, passes[name]):
            one_pass = ids[start : start + passes[name]]
            assert Counter(i for batch in one_pass for i in batch) == Counter(whole)
            assert {len(batch) for batch in one_pass[:-1]} <= {batch_size}
            assert len(one_pass[-1]) == (size % batch_size or batch_size)


@settings(max_examples=40)
@given(sizes=SIZES, batch_size=st.integers(1, 9), temperature=TEMPERATURES, data=st.data())
def test_the_batch_of_a_step_is_a_function_of_the_step_alone(datasets, sizes, batch_size, temperature, data):
    in_turn = Mixture(datasets(sizes), batch_size, 5, temperature)
    expected = [in_turn.batch(step) for step in range(3 * in_turn.steps_per_epoch)]
    steps = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20))
    at_random = Mixture(datasets(sizes), batch_size, 5, temperature)
    for step in steps:
        (task, batch), (wanted_task, wanted) = at_random.batch(step), expected[step]
        assert (task, batch.ids, batch.sequences) == (wanted_task, wanted.ids, wanted.sequences)
        assert torch.equal(batch.input_ids, wanted.input_ids)
        assert torch.equal(batch.labels, wanted.labels)


@settings(max_examples=40)
@given(
    sizes=SIZES,
    batch_size=st.integers(1, 9),
    temperature=TEMPERATURES,
    steps=st.integers(0, 60),
    alike=st.booleans(),
)
def test_what_the_first_steps_use_is_what_their_batches_hold(
    datasets, sizes, batch_size, temperature, steps, alike
):
    plan = Mixture(datasets(sizes), batch_size, 5, temperature, alike=alike)
    held = {i for step in range(steps) for i in plan.batch(step)[1].ids}
    used = {name: plan.used(name, steps).tolist() for name in sizes}
    assert {f"{name}-{i}" for name, indices in used.items() for i in indices} == held
    assert all(indices == sorted(set(indices)) for indices in used.values())


def test_an_epoch_ends_with_the_largest_task_and_the_smaller_ones_start_over(datasets):
    plan = Mixture(datasets({"sst": 3, "qqp": 10, "sts": 4}), batch_size=4, seed=0)
    assert plan.steps_per_epoch == 9
    seen = Counter(i for step in range(9) for i in plan.batch(step)[1].ids)
    assert {seen[f"sst-{i}"] for i in range(3)} == {3}
    assert {seen[f"qqp-{i}"] for i in range(10)} == {1}
    assert {seen[f"sts-{i}"] for i in range(4)} == {3}
    assert [len(plan.batch(step)[1].ids) for step in range(1, 9, 3)] == [4, 4, 2]


def test_at_temperature_1_an_epoch_trains_on_each_example_once(datasets):
    sizes = {"sst": 3, "qqp": 17, "sts": 8}
    plan = Mixture(datasets(sizes), batch_size=4, seed=0, temperature=1)
    assert plan.steps_per_epoch == 1 + 5 + 2
    for epoch in range(2):
        seen = [i for step in range(8 * epoch, 8 * epoch + 8) for i in plan.batch(step)[1].ids]
        assert sorted(seen) == sorted(f"{name}-{i}" for name, size in sizes.items() for i in range(size))


def test_a_tasks_nth_turn_has_the_same_batch_however_the_tasks_are_mixed(datasets):
    def turns(temperature: float, beside: dict[str, int]) -> list[tuple[str, ...]]:
        plan = Mixture(datasets({"sst": 11, **beside}), 3, 7, temperature)
        batches = (plan.batch(step) for step in range(60))
        return [batch.ids for name, batch in batches if name == "sst"][:9]

    alone = turns(math.inf, {})
    assert turns(1, {"qqp": 17}) == turns(2, {"sts": 5}) == turns(math.inf, {"qqp": 17}) == alone


def test_each_pass_over_a_task_has_the_order_of_its_own_epoch(datasets):
    plan = Mixture(datasets({"sst": 17, "qqp": 6}), batch_size=3, seed=11)
    for task, size, first in (("sst", 17, 0), ("qqp", 6, 1)):
        for epoch in range(3):
            order = epoch_order(size, 11, task, epoch)
            batches = -(-size // 3)
            for index in range(batches):
                _, batch = plan.batch(first + 2 * (epoch * batches + index))
                assert set(batch.ids) == {f"{task}-{i}" for i in order[3 * index : 3 * index + 3]}


def test_a_training_batch_is_sorted_by_length_and_dealt(datasets):
    plan = Mixture(datasets({"sts": 17}), batch_size=5, seed=0)
    for step in range(8):
        lengths = plan.batch(step)[1].sequences.lengths
        assert list(lengths) == np.sort(lengths)[::-1][dealt(len(lengths))].tolist()
