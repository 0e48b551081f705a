"""What a run says on the terminal."""

from pathlib import Path

from small_runs import BATCH, call, flags, settings, strict_json, write_data

import train
from training.report import closing_table, header
from training.run import Run


def test_the_header_says_what_decides_a_run(tiny: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", {"train": 150, "dev": 10})
    rows = (data / "sts-train.csv").read_text().splitlines()
    rows[41] = "\t".join([*rows[41].split("\t")[:3], "", "2.0"])  # line 42 loses its second sentence
    (data / "sts-train.csv").write_text("\n".join(rows) + "\n")
    run = Run(settings(tiny, data, task="sts+sst", rank=4, alpha=6.0, lr=0.005, seed=7))
    said = header(run.config, run.splits, run.facts(), run.trainer, run.needed, Path("here"))
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
