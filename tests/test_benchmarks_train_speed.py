"""The comparison with transformers + PEFT is like for like, and its table says what was measured."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_runs import BATCH, call, settings

from benchmarks.models import product_weights, write_random_model
from benchmarks.train_results import (
    BEST,
    COLUMNS,
    FLOPS,
    OURS,
    RATES,
    VARIANTS,
    check_alike,
    rates_line,
    rows,
    share_of_limit,
    variants_of,
    verdict,
)
from benchmarks.train_speed import first_rows, main, parse_flags
from minibert.model import BertConfig
from tasks import TASKS
from tasks.reader import read_examples
from training.run import Run

peer = pytest.importorskip("benchmarks.peer", reason="needs transformers and PEFT")


def both_models(folder: Path, data: Path, task: str, method: str):
    """Our run before its first step, the peer's model with the same new weights, both without dropout, and
    the first batch as each side makes it of the same rows.
    """
    still = {"dropout": 0.0, "encoder_dropout": 0.0, "pooling": "mean", "lr": None}
    run = Run(settings(folder, data, task=task, method=method, **still))
    ours = run.trainer.model.train()
    theirs = peer.build_model(folder, method, TASKS[task].num_outputs, rank=8, lora_dropout=0.0)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if "lora_" in name or name.startswith("heads."):
                value += 0.05 * torch.randn(value.shape)  # off B's zeros, so that A has a gradient too
                named[their_name(name, task)].copy_(value)
    _, batch = run.trainer.plan.batch(0)
    by_id = {one.id: one for one in read_examples(data / TASKS[task].files["train"], TASKS[task], True)[0]}
    tokenizer = peer.AutoTokenizer.from_pretrained(folder)
    examples = [by_id[name] for name in batch.ids]
    padded = peer.DataCollatorWithPadding(tokenizer)(peer.tokenized(tokenizer, examples, TASKS[task], 32))
    return run, batch, theirs.train(), padded


def their_name(name: str, task: str) -> str:
    """What the peer's model calls a parameter of ours that trains."""
    if name.startswith("heads."):
        return name.replace(f"heads.{task}.output", "head")
    inner = name.removeprefix("bert.")
    if "lora_" not in inner:
        return f"encoder.{inner}"
    return "encoder.base_model.model." + re.sub(r"(lora_\w+)(\.weight)?$", r"\1.default.weight", inner)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", FLOPS)
def test_the_peer_has_our_loss_and_our_gradients_at_the_first_step(tiny, small_data, task, method):
    run, batch, theirs, padded = both_models(tiny, small_data, task, method)
    labels = padded.pop("labels")
    assert int(padded["attention_mask"].sum()) == sum(batch.sequences.lengths)
    loss, their_loss = run.trainer.losses({task: batch})[task], peer.loss_of(theirs(**padded), labels)
    torch.testing.assert_close(loss, their_loss)
    loss.backward()
    their_loss.backward()
    named, compared = dict(theirs.named_parameters()), 0
    for name, value in run.trainer.model.named_parameters():
        if value.requires_grad:
            theirs_grad = named[their_name(name, task)].grad
            torch.testing.assert_close(value.grad, theirs_grad, rtol=1e-4, atol=1e-5, msg=name)
            compared += 1
    assert compared == sum(parameter.requires_grad for parameter in theirs.parameters())


def test_the_peer_decays_what_we_decay(tiny, small_data):
    run, _, theirs, _ = both_models(tiny, small_data, "sts", "dora")
    optimizer = peer.build_optimizer(theirs, lr=1e-3, fused=True)
    ours, other = (
        sorted((group["weight_decay"], sum(p.numel() for p in group["params"])) for group in one.param_groups)
        for one in (run.trainer.optimizer, optimizer)
    )
    assert ours == other


def test_the_weights_of_the_products_are_the_encoders_linears(minilm, tmp_path):
    config = BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40)
    folder = write_random_model(tmp_path, config)
    model = peer.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    linears = [module for module in model.encoder.modules() if isinstance(module, torch.nn.Linear)]
    assert product_weights(folder) == sum(linear.weight.numel() for linear in linears)


def measured(seconds: Sequence[float], **changes) -> dict:
    """What a process says of so many seconds for 1,000 tokens."""
    (spent,) = seconds
    return {
        "epoch_seconds": spent,
        "tokens": 1000,
        "tokens_per_second": 1000 / spent,
        "memory_above_start_mib": 100 * spent,
        "dev": spent / 10,
        "trainable_parameters": 7,
        "precision": "fp32",
    } | changes


def a_round(ours: float, dropout: float, default: float, fp32: float, bf16: float) -> dict[str, dict]:
    seconds = dict(zip(VARIANTS, (ours, dropout, ours, default, fp32, bf16), strict=True))
    return {f"lora: {name}": measured([one]) for name, one in seconds.items()} | {
        RATES: {"bf16": 4e9, "fp32": 1e9}
    }


ROUNDS = (
    a_round(1.0, 2.0, 4.0, 2.0, 9.0),
    a_round(2.0, 3.0, 4.0, 3.0, 2.0),
    a_round(1.0, 1.0, 3.0, 1.5, 8.0),
)


def test_the_table_has_medians_of_ratios_round_by_round():
    lines = [dict(zip(COLUMNS, line, strict=True)) for line in rows(ROUNDS, ["lora"], weights=10_000)]
    told = {line["variant"]: line for line in lines}
    assert told[OURS]["ratio"] == "1.000 [1.000, 1.000]"
    assert told["peer, default"]["ratio"] == "3.000 [2.000, 4.000]"  # of 4, 2 and 3; not 4 / 1
    assert told["peer, best in fp32"]["ratio"] == "1.500 [1.500, 2.000]"
    assert told["peer, default"]["s/epoch"] == "4.00 [3.00, 4.00]"
    assert told["peer, default"]["tokens/s"] == "250"
    assert told["peer, best in fp32"]["peak MiB above start"] == "200"
    assert told["peer, best in fp32"]["dev"] == "0.2000 [0.1500, 0.3000]"


@pytest.mark.parametrize("faster", BEST)
def test_ours_is_compared_with_the_faster_of_the_peer_s_best(faster):
    slower = next(name for name in BEST if name != faster)
    swapped = [
        one | {f"lora: {faster}": one[f"lora: {BEST[0]}"], f"lora: {slower}": one[f"lora: {BEST[1]}"]}
        for one in ROUNDS
    ]
    said = f"lora: ours is 1.500 [1.500, 2.000] times as fast as {faster}, the peer's fastest"
    assert verdict(swapped, "lora") == said
    one_alone = [{name: told for name, told in one.items() if slower not in name} for one in swapped]
    assert verdict(one_alone, "lora") == said
    assert verdict([{f"lora: {OURS}": measured([1.0])}], "lora") is None


def test_bf16_is_left_out_where_the_cpu_has_no_instructions_for_it(monkeypatch):
    for flags, expected in (("avx2", list(VARIANTS)[:-1]), ("avx512_bf16", list(VARIANTS))):
        monkeypatch.setattr("training.machine.cpu_fact", lambda name, flags=flags: flags)
        assert parse_flags([]).variants == expected
        assert parse_flags(["--variants", BEST[1]]).variants == [BEST[1]]  # who asks for it gets it


@pytest.mark.parametrize(("method", "flops"), [("lora", 4), ("full", 6)])
def test_the_limit_is_the_products_at_the_machines_rate(method, flops):
    one = {f"{method}: {OURS}": measured([2.0]), RATES: {"bf16": 4e9, "fp32": 1e9}}
    least = flops * 10_000 * 1000 / 1e9  # seconds
    assert share_of_limit(one, method, OURS, 10_000, "fp32") == pytest.approx(least / 2.0)
    assert share_of_limit(one, method, OURS, 10_000, "bf16") == pytest.approx(least / 4 / 2.0)


def test_full_has_no_adapters_to_drop():
    assert len(variants_of("full")) == len(VARIANTS) - 1
    assert variants_of("dora") == list(VARIANTS)
    assert variants_of("dora", ["peer, best in fp32"]) == ["ours", "peer, best in fp32"]


def test_the_rate_of_the_products_is_told():
    assert rates_line(ROUNDS) == "matrix products: 4 GFLOP/s in bf16, 1 in fp32"


@pytest.mark.parametrize("changes", [{"tokens": 900}, {"trainable_parameters": 8}], ids=str)
def test_sides_that_did_not_do_the_same_are_not_compared(refusal, changes):
    unlike = ROUNDS[0] | {"lora: peer, best in fp32": measured([1.0], **changes)}
    assert "lora: peer, best in fp32" in refusal(check_alike, [ROUNDS[1], unlike], "lora")


def test_the_first_rows_are_what_both_sides_read(small_data, tmp_path, refusal):
    task = TASKS["sts"]
    folder = first_rows(small_data, task.files, 5, tmp_path)
    for split, count in (("train", 5), ("dev", None)):
        whole, some = (
            read_examples(one / task.files[split], task, labelled=True)[0] for one in (small_data, folder)
        )
        assert some == whole[:count]
    assert first_rows(small_data, task.files, None, tmp_path) == small_data
    assert "cannot be read" in refusal(first_rows, tmp_path / "nowhere", task.files, 5, tmp_path)


def test_it_measures_both_sides_once_and_writes_what_it_shows(tiny, small_data, tmp_path):
    out, picture = tmp_path / "speed.csv", tmp_path / "speed.png"
    asked = ["--data", small_data, "--model", tiny, "--methods", "lora", "--rounds", 1, "--max-length", 32]
    asked += ["--batch-size", BATCH, "--examples", 16, "--threads", 1, "--out", out, "--plot", picture]
    asked += ["--variants", *VARIANTS]
    ended = call(main, *asked)
    assert ended.code == 0, ended.err
    with open(out, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == list(VARIANTS)
    assert all(line[name] in ended.out for line in lines for name in COLUMNS)
    assert ended.out.splitlines()[-1].startswith("matrix products: ")
    assert {line["threads"] for line in lines} == {"1"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    about, *processes = map(json.loads, out.with_suffix(".jsonl").read_text().splitlines())
    assert about["machine"]["cpu"] == lines[0]["cpu"]
    assert [one["name"] for one in processes] == [RATES, *(f"lora: {name}" for name in VARIANTS)]
    again = call(main, *asked)
    assert (again.code, again.out, again.err) == (0, ended.out, "")
    assert "--out" in call(main, *asked, "--epochs", 2).line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--examples", "1"], "--examples: expected at least 2, got 1"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--max-length", "3"], "--max-length: expected at least 4"),
        (["--methods", "frozen"], "--methods"),
        (["--data", "no/where"], "--data: expected a folder, got 'no/where'"),
        (["--out", "no/where/file.csv"], "--out: no/where/file.csv cannot be written"),
        (["--out", "speed.jsonl"], "--out: expected a name as FILE.csv, the log is speed.jsonl"),
        (["--plot", "."], "--plot: . cannot be written (Is a directory)"),
        (["--nope"], "--nope"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(main, *arguments)
    assert ended.code == 2
    assert said in ended.line


def test_a_side_that_fails_says_why(tiny, tmp_path):
    ended = call(main, "--data", tmp_path, "--model", tiny, "--rounds", 1, "--threads", 1)
    assert ended.code == 2
    assert "cannot be read" in ended.err.splitlines()[-1]
