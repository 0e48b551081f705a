"""An encoder that never changes reads each example once, and nothing else is different."""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import BATCH, ROWS, call, flags, lines_of, settings, strict_json
from tolerances import tolerance

import train
from lora.methods import METHODS
from minibert.model import Bert
from tasks.model import TaskModel
from training import loop
from training.evaluate import MOST_TOKENS, encode_once, predict
from training.report import Bar
from training.run import Run

SHAPES = {
    "cls": {"pooling": "cls"},
    "pooler": {"pooling": "pooler"},
    "mean": {"pooling": "mean"},
    "sentences": {"task": "sst", "hidden_layers": 1},
    "siamese": {"pair": "siamese", "pooling": "mean"},
    "siamese pooler": {"pair": "siamese", "pooling": "pooler", "features": "uv"},
    "all three": {"task": "sst+qqp+sts", "pair": "siamese"},
}


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the few tokens of these tests' data."""
    monkeypatch.setitem(MOST_TOKENS, "cpu", 64)


def frozen(tiny: Path, small_data: Path, **changes) -> Run:
    run = Run(settings(tiny, small_data, method="frozen", **changes))
    run.trainer.model.train()
    return run


def through(run: Run) -> list[tuple[int, int]]:
    return list(run.trainer.encode_training_data())


def outputs(run: Run) -> Iterator[np.ndarray]:
    """What the model says of everything that is scored."""
    for split in ("sample", "dev", "test"):
        for data in run.data[split].values():
            said = predict(run.trainer.model, data, run.device)
            yield said.predictions if said.probabilities is None else said.probabilities


@pytest.fixture
def sequences_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each of the encoder's passes, as they come."""
    passes: list[int] = []
    forward = Bert.forward

    def counted(self, input_ids, token_type_ids, sequences):
        passes.append(len(sequences.lengths))
        return forward(self, input_ids, token_type_ids, sequences)

    monkeypatch.setattr(Bert, "forward", counted)
    return passes


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_predictions_are_those_of_an_encoder_that_reads_in_every_step(
    shape: str, tiny: Path, small_data: Path, sequences_read: list[int]
) -> None:
    once, anew = (frozen(tiny, small_data, **SHAPES[shape]) for _ in range(2))
    through(once)
    read, steps = len(sequences_read), 4 * len(once.config.tasks)  # into the second epoch
    lines = [once.trainer.step() for _ in range(steps)]
    assert len(sequences_read) == read
    expected = [anew.trainer.step() for _ in range(steps)]
    assert len(sequences_read) == read + steps
    for line, wanted in zip(lines, expected, strict=True):
        assert line.pop("task") == wanted.pop("task")
        assert line == pytest.approx(wanted, rel=1e-4)  # whatever the head drops: .3 of its inputs
    scored = [run.trainer.end_epoch({"dev": run.data["dev"]})["metrics"]["dev"] for run in (once, anew)]
    for task, scores in scored[0].items():
        assert scores == pytest.approx(scored[1][task], abs=1e-4)
    for one, wanted in zip(outputs(once), outputs(anew), strict=True):
        np.testing.assert_allclose(one, wanted, **scaled(tolerance(torch.float32)))


def scaled(wanted: dict[str, float]) -> dict[str, float]:
    """Errors of single steps add up in the weights."""
    return {name: 10 * value for name, value in wanted.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_weights_predict_the_same_bit_for_bit(
    shape: str, precision: str, tiny: Path, small_data: Path
) -> None:
    run = frozen(tiny, small_data, precision=precision, **SHAPES[shape])
    run.trainer.step()
    before = list(outputs(run))
    for data in (data for split in ("sample", "dev", "test") for data in run.data[split].values()):
        assert sum(encode_once(run.trainer.model, data, run.device)) == len(data)
    for one, wanted in zip(outputs(run), before, strict=True):
        np.testing.assert_array_equal(one, wanted)


@pytest.mark.parametrize("pair", ["concat", "siamese"])
def test_a_whole_run_reads_each_example_once(
    pair: str, tiny: Path, small_data: Path, tmp_path: Path, sequences_read: list[int]
) -> None:
    changes = {"method": "frozen", "task": "sst+sts", "pair": pair, "epochs": 3}
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "run", **changes)).code == 0
    of_a_task = sum(ROWS.values()) + ROWS["dev"]  # as many of train as of dev are scored
    assert sum(sequences_read) == of_a_task + of_a_task * (2 if pair == "siamese" else 1)


def test_a_run_that_is_cut_short_reads_what_it_trains_on(
    tiny: Path, small_data: Path, sequences_read: list[int]
) -> None:
    run = frozen(tiny, small_data, task="sst+sts", max_steps=3)
    assert through(run)[-1] == (3 * BATCH, 3 * BATCH)
    for _ in range(3):
        run.trainer.step()
    assert sum(sequences_read) == 3 * BATCH
    with pytest.raises(IndexError):  # not the vectors of other examples
        run.trainer.step()


def test_one_batch_is_learnt_by_heart_from_one_reading(
    tiny: Path, small_data: Path, sequences_read: list[int]
) -> None:
    arguments = flags(tiny, small_data, method="frozen", hidden_layers=1, max_steps=200)
    ended = call(train.main, *arguments, "--overfit-batch")
    assert (ended.code, ended.err) == (0, "")
    assert sum(sequences_read) == BATCH


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"frozen"}))
def test_an_encoder_that_trains_reads_in_every_step(method: str, tiny: Path, small_data: Path) -> None:
    run = Run(settings(tiny, small_data, method=method))
    assert through(run) == []
    run.trainer.step()
    run.trainer.end_epoch({"dev": run.data["dev"]})
    assert all(data.features is None for split in run.data.values() for data in split.values())


@pytest.fixture
def seconds_by_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that moves by a second with each pass of the encoder, and otherwise stands still."""
    now = [0.0]
    encode = TaskModel.encode

    def slow(self, batch):
        now[0] += 1
        return encode(self, batch)

    monkeypatch.setattr(TaskModel, "encode", slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return lambda: now[0]


def test_reading_for_training_counts_as_training_and_reading_for_scores_does_not(
    tiny: Path, small_data: Path, tmp_path: Path, seconds_by_reading: Callable[[], float]
) -> None:
    batches = len(through(frozen(tiny, small_data)))
    assert seconds_by_reading() == batches > 1
    out = tmp_path / "run"
    assert call(train.main, *flags(tiny, small_data, out=out, method="frozen")).code == 0
    result = strict_json((out / "result.json").read_text())
    assert [line["seconds"] for line in lines_of(out / "metrics.jsonl")] == [batches, 0]
    assert result["train_seconds"] == batches
    tokens = sum(line["tokens"] for line in lines_of(out / "steps.jsonl"))  # of both epochs
    assert result["tokens_per_second"] == pytest.approx(tokens / batches, abs=0.1)


def test_what_is_read_is_shown_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    bar = Bar(total=10, done=0)
    bar.encoded(1_024, 6_040)
    bar.close()
    assert "encoding once: 1,024 of 6,040 examples" in terminal.getvalue()


def test_vectors_that_are_not_finite_end_the_run_at_its_first_step(tiny: Path, small_data: Path) -> None:
    run = frozen(tiny, small_data)
    run.trainer.model.bert.embeddings.word_embeddings.weight.fill_(math.nan)
    through(run)
    with pytest.raises(loop.TrainingError, match="step 1: the loss of sts is not finite"):
        run.trainer.step()
