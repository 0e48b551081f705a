"""A profiled run computes what another does, and says where the time of its steps went."""

import json
import re
from pathlib import Path

import pytest
import torch
from small_runs import call, flags, left_behind
from torch import nn
from torch.profiler import profile

import train
from training.profiling import WARM_UP, StepProfile, named_modules, tables

PROFILE = {"profile.txt", "trace.json"}


def test_a_profiled_run_is_the_same_and_tells_its_operators_and_modules(tiny, small_data, tmp_path):
    for name, asked in (("plain", {}), ("profiled", {"profile": 2})):
        asked |= {"method": "lora", "batch_size": 3, "out": tmp_path / name}  # an epoch of eight steps
        ended = call(train.main, *flags(tiny, small_data, **asked))
        assert ended.code == 0, ended.err
    plain, profiled = left_behind(tmp_path / "plain"), left_behind(tmp_path / "profiled")
    assert plain == {name: value for name, value in profiled.items() if name not in PROFILE}
    assert profiled.keys() - plain.keys() == PROFILE
    text = (tmp_path / "profiled" / "profile.txt").read_text()
    assert text.startswith("2 steps of ")
    assert re.search(r" 1\.0  bert$", text, re.MULTILINE)  # once a step
    assert re.search(r" 2\.0  bert\.encoder\.layer\.\*$", text, re.MULTILINE)  # two layers
    assert "MergedBackward" in text
    trace = json.loads((tmp_path / "profiled" / "trace.json").read_text())
    assert "aten::mm" in {event.get("name") for event in trace["traceEvents"]}


def test_the_profile_is_no_setting_that_resume_compares(tiny, small_data, tmp_path):
    asked = flags(tiny, small_data, epochs=3, out=tmp_path / "run")
    assert call(train.main, *asked).code == 0
    (tmp_path / "run" / "result.json").unlink()  # as if it had been stopped
    assert call(train.main, *asked, "--resume", "--profile", 1).code == 0


def test_operators_shares_are_of_all_and_modules_contain_what_they_call():
    model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    with named_modules(model), profile() as looked:
        for _ in range(4):
            model(torch.ones(8, 64)).sum().backward()
    operators, modules = tables(looked.key_averages(), 4).split("module, forward")
    rows = re.findall(r"^ *([\d.]+)% +([\d.]+) +([\d.]+)?  +(\S.*)$", operators, re.MULTILINE)
    assert sum(float(share) for share, *_ in rows) == pytest.approx(100, abs=0.1 * len(rows))
    assert ("2.0", "aten::addmm") in {(calls, name) for _, _, calls, name in rows}
    spent = {
        name: float(ms) for ms, name in re.findall(r"% +([\d.]+) +[\d.]+  (\S+)$", modules, re.MULTILINE)
    }
    assert spent.keys() == {"model", "0", "1", "1.*"}
    assert spent["model"] >= spent["1"] >= spent["1.*"]


def test_a_model_is_left_without_hooks():
    model = nn.Sequential(nn.Linear(2, 2))
    with named_modules(model):
        assert model[0]._forward_hooks
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("asked", "ends", "looked"),
    [(2, (), 2), (4, (WARM_UP + 3,), 3), (2, (WARM_UP,), 2), (9, (), 5), (0, (), None)],
    ids=("all", "the epoch ends", "it begins in the next epoch", "the run ends", "none"),
)
def test_the_steps_looked_at_are_of_one_epoch(asked: int, ends: tuple, looked: int | None, tmp_path: Path):
    model = nn.Linear(3, 3)
    with StepProfile(asked, model, tmp_path, total=WARM_UP + 5) as profiling:
        for i in range(1, WARM_UP + 6):
            model(torch.ones(3, 3))
            profiling.step(ends_epoch=i in ends)
    if looked is None:
        assert list(tmp_path.iterdir()) == []
    else:
        assert (tmp_path / "profile.txt").read_text().startswith(f"{looked} steps of ")
        assert {path.name for path in tmp_path.iterdir()} == PROFILE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "-1"], "--profile: expected a number of steps, got -1"),
        (["--profile", "few"], "--profile"),
        (["--profile", "2", "--overfit-batch"], "--overfit-batch"),
    ],
    ids=str,
)
def test_bad_usage_is_one_line(arguments, said):
    ended = call(train.main, *arguments)
    assert ended.code == 2
    assert said in ended.line


def test_a_run_too_short_to_look_at_is_refused_before_it_starts(tiny, small_data, tmp_path):
    ended = call(train.main, *flags(tiny, small_data, max_steps=WARM_UP, profile=1, out=tmp_path / "run"))
    assert ended.code == 2
    assert f"--profile: expected a run of more than {WARM_UP} steps" in ended.line
    assert not (tmp_path / "run").exists()
