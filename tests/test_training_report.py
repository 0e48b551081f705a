"""What a run says on the terminal."""

from pathlib import Path

import pytest
from small_runs import BATCH, call, flags, settings, strict_json, write_data

import train
from tasks import QQP, SST, STS
from tasks.base import Example
from training.build import Splits
from training.data_notes import warnings
from training.report import closing_table, header
from training.run import Run


def test_the_header_says_what_decides_a_run(tiny: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", {"train": 150, "dev": 10})
    rows = (data / "sts-train.csv").read_text().splitlines()
    rows[41] = "\t".join([*rows[41].split("\t")[:3], "", "2.0"])  # line 42 loses its second sentence
    (data / "sts-train.csv").write_text("\n".join(rows) + "\n")
    run = Run(settings(tiny, data, task="sts+sst", rank=4, alpha=6.0, lr=0.005, seed=7))
    said = header(run.config, run.splits, run.facts(), run.trainer, Path("here"))
    trainable = run.facts()["trainable_parameters"]
    for words in (
        f"sts (concat), {data}: 149 train, 10 dev\n",
        f"{data / 'sts-train.csv'}:42: no sentence2",
        f"sst, {data}: 150 train, 10 dev\n",
        str(tiny),
        "cls pooling, at most 32 tokens",
        f"rslora: {trainable:,} of ",
        "rank 4, alpha 6, effective scale 3, targets all",
        "learning rate 0.005 linear, seed 7",
        f"steps (2 epochs) of {BATCH}",
        "fp32 on cpu",
        "here",
    ):
        assert words in said


def rows(*labels: float, split: str = "train", texts: tuple[str, ...] = ("",)) -> list[Example]:
    """Examples of texts of their own."""
    return [
        Example(f"{split}{i}", tuple(f"{split} {i}{text}" for text in texts), float(label))
        for i, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    ("task", "train", "dev", "expected"),
    [
        (SST, [0, 1, 2, 3, 4], [0, 1], []),
        (SST, [0, 1, 2, 1], [0, 1], ["no train label is 3, 4, of the classes 0 to 4"]),
        (SST, [1, 2, 3, 4], [0, 1], ["no train label is 0, of the classes 0 to 4"]),
        (SST, [4, 4, 4], [3, 3], ["all train labels are 4", "all dev labels are 3"]),
        (QQP, [0, 0], [0, 1], ["all train labels are 0"]),
        (STS, [0.1, 2, 4.9], [0, 1], []),
        (STS, [0, 0.5, 1], [0, 1], ["train labels go from 0 to 1, expected 0 to 5"]),
        (STS, [1, 3, 5], [0, 1], ["train labels go from 1 to 5, expected 0 to 5"]),
    ],
)
def test_labels_that_fill_only_part_of_the_range_are_said(task, train, dev, expected) -> None:
    texts = ("", " and more")[: len(task.text_columns)]
    splits = Splits(rows(*train, texts=texts), rows(*dev, split="dev", texts=texts), None, [])
    assert warnings(task, splits) == expected


def test_texts_of_train_that_stand_elsewhere_or_with_another_label_are_counted_and_named() -> None:
    train = [Example("a", ("One.", "Two."), 1.0), Example("b", ("two.", "one."), 0.0),
             Example("c", ("One.", "Two."), 1.0), Example("d", ("One.", "One."), 0.0)]  # fmt: skip
    dev = [Example(f"e{i}", ("ONE.", "TWO."), float(i % 2)) for i in range(5)]
    test = [Example("f", ("One.", "One."), None), Example("g", ("One.", ""), None)]
    assert warnings(QQP, Splits(train, dev, test, [])) == [
        "train examples with an earlier one's texts and another label: 1 ('b' as 'a')",
        "dev examples with the texts of train examples: 5 ('e0' as 'a', 'e1' as 'a', 'e2' as 'a' and 2 more)",
        "test examples with the texts of train examples: 1 ('f' as 'd')",
    ]


def test_the_closing_table_says_what_the_result_is(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "run"))
    result = strict_json((tmp_path / "run" / "result.json").read_text())
    table = closing_table(result, tmp_path / "run")
    assert ended.out.endswith(table + "\n")
    for value in (
        f"{result['dev']:.4f} (epoch {result['best_epoch']})",
        f"{result['train']:.4f}",
        f"{result['tokens_per_second']:,.0f} tokens/s",
        f"{result['peak_memory_mib']:,.0f} MiB",
        str(tmp_path / "run"),
    ):
        assert value in table
