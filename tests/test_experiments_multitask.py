"""The table of tasks trained together and alone says what the runs say, and compares like with like."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
from small_runs import call, flags

import train
from experiments.multitask import COLUMNS, main, read_several, read_single, rows
from training.config import Config, check, to_dict

METRICS = {"sst": "accuracy", "qqp": "accuracy", "sts": "pearson"}


@pytest.fixture
def write_run(tmp_path: Path):
    """A finished run's folder, with that dev score (for several tasks, those by task)."""

    def write(dev: float | dict, own: dict | None = None, **settings) -> Path:
        config = check(Config(**{"method": "lora"} | settings))
        tasks = [task.name for task in config.tasks]
        metric = METRICS[tasks[0]] if len(tasks) == 1 else {task: METRICS[task] for task in tasks}
        result = {"dev": dev, "metric": metric}
        if own:
            result["best_per_task"] = {task: {"epoch": 1, "dev": score} for task, score in own.items()}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        return folder

    return write


def table(several: list[Path], single: list[Path]) -> list[dict[str, str]]:
    together, _ = read_several(several)
    alone, _ = read_single(single, {"sst", "qqp", "sts"})
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows(together, alone)]


def test_a_row_has_both_scores_over_their_seeds_and_the_difference_of_the_means(write_run) -> None:
    together, alone = [0.51, 0.53, 0.49], [0.5, 0.48]
    several = [
        write_run({"sst": score, "sts": 0.8}, {"sst": score + 0.01, "sts": 0.8}, task="sst+sts", seed=seed)
        for seed, score in enumerate(together)
    ]
    single = [write_run(score, task="sst", seed=seed) for seed, score in enumerate(alone)]
    single.append(write_run(0.85, task="sts"))
    sst, sts = table(several, single)
    assert sst == {
        "task": "sst", "metric": "accuracy", "settings": "", "seeds": "3", "seeds alone": "2",
        "together": f"{mean(together):.4f} ± {stdev(together):.4f}",
        "alone": f"{mean(alone):.4f} ± {stdev(alone):.4f}",
        "difference": "+0.0200",
        "at own best": "+0.0300",
    }  # fmt: skip
    assert (sts["metric"], sts["together"], sts["alone"]) == ("pearson", "0.8000 ± 0.0000", "0.8500")
    assert (sts["difference"], sts["seeds alone"]) == ("-0.0500", "1")


def test_each_setting_of_the_runs_together_has_rows_of_its_own(write_run) -> None:
    several = [
        write_run({"sst": score, "sts": score}, task="sst+sts", sampling=sampling)
        for sampling, score in (("round-robin", 0.4), ("sqrt", 0.6))
    ]
    found = table(several, [write_run(0.5, task=task) for task in ("sts", "sst")])
    assert [(row["settings"], row["task"], row["difference"]) for row in found] == [
        ("sampling round-robin", "sst", "-0.1000"),
        ("sampling round-robin", "sts", "-0.1000"),
        ("sampling sqrt", "sst", "+0.1000"),
        ("sampling sqrt", "sts", "+0.1000"),
    ]
    assert {row["at own best"] for row in found} == {""}  # which older runs do not tell


def test_a_list_that_is_empty_is_not_told(write_run) -> None:
    several = [write_run({"sst": 0.5, "sts": 0.5}, task="sst+sts", loss_weight=w) for w in ((), ("sst=2",))]
    found = table(several, [write_run(0.5, task=task) for task in ("sts", "sst")])
    assert [row["settings"] for row in found] == ["", "", "loss-weight sst=2", "loss-weight sst=2"]


def test_a_pair_matters_to_tasks_of_pairs_alone(write_run) -> None:
    several = [write_run({"sst": 0.5, "sts": 0.5}, task="sst+sts", pair="siamese")]
    single = [write_run(0.5, task="sst"), write_run(0.4, task="sts", pair="siamese")]
    assert [row["difference"] for row in table(several, single)] == ["+0.0000", "+0.1000"]


@pytest.mark.parametrize(
    ("single", "message"),
    [
        ([{"task": "sst"}], "--single: expected a run of sts alone, got none"),
        ([{"task": "qqp"}], "expected a run of sst or sts alone, got qqp"),
        ([{"task": "sst+sts"}], "expected a run of sst or sts alone, got sst+sts"),
        ([{"task": "sst"}, {"task": "sst", "lr": 0.5, "seed": 1}],
         "--single: expected runs of sst of one setting, got lr 0.001 and lr 0.5"),
        ([{"task": "sst"}, {"task": "sts", "method": "dora"}],
         "sts: expected the same method, model, data, pair together and alone, got method 'lora' and 'dora'"),
        ([{"task": "sst", "data": "cs224n", "model": "bert-base-uncased"}, {"task": "sts"}],
         "sst: expected the same method, model, data together and alone, got model 'all-MiniLM-L6-v2' and "
         "'bert-base-uncased'; data 'demo' and 'cs224n'"),
        ([{"task": "sst"}, {"task": "sts", "pair": "siamese"}], "got pair 'concat' and 'siamese'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_comparison_that_is_missing_or_unfair_is_refused_by_name(write_run, single, message) -> None:
    several = write_run({"sst": 0.5, "sts": 0.5}, task="sst+sts")
    folders = [write_run({"sst": 0.5, "sts": 0.5} if "+" in s["task"] else 0.5, **s) for s in single]
    ended = call(main, several, "--single", *folders)
    assert ended.code == 2
    assert message in ended.line


@pytest.mark.parametrize(
    ("dev", "own"), [(0.5, None), ({"sst": 0.5}, None), ({"sst": 1, "sts": 2}, None), (None, None),
                     ({"sst": 0.5, "sts": 0.5}, {"sst": 0.5})], ids=str
)  # fmt: skip
def test_a_result_that_does_not_tell_each_score_is_refused(write_run, dev, own) -> None:
    folder = write_run(dev, own, task="sst+sts")
    ended = call(main, folder, "--single", write_run(0.5, task="sst"))
    assert ended.code == 2
    assert ended.line == f"error: {folder / 'result.json'}: expected metric and dev scores of sst, sts"


def test_a_run_of_one_task_is_no_run_together(write_run, tmp_path: Path) -> None:
    folder = write_run(0.5, task="sst")
    ended = call(main, folder, "--single", folder)
    assert ended.line == f"error: {folder}: expected a run of several tasks, got one of sst"
    assert "none: expected the folder of a run" in call(main, tmp_path / "none", "--single", folder).line
    assert call(main, folder).code == 2


def test_the_same_runs_can_be_given_for_both(write_run, tmp_path: Path) -> None:
    both = write_run({"sst": 0.5, "sts": 0.5}, task="sst+sts")
    runs = [both, *(write_run(0.4, task=task) for task in ("sst", "sts", "qqp", "sst"))]
    (tmp_path / "notes.txt").write_text("")
    ended = call(main, *runs, tmp_path / "notes.txt", "--single", *runs)
    assert (ended.code, ended.out.count("+0.1000")) == (0, 2)
    assert f"not used: {runs[4]}: has the setting and seed of {runs[1]}\n" in ended.err
    assert f"not used: {tmp_path / 'notes.txt'}: no run: it is no folder\n" in ended.err
    assert not any(f"{run}: " in ended.err.replace(f"of {run}", "") for run in runs[:3])


def test_other_settings_that_differ_are_told(write_run) -> None:
    several = write_run({"sst": 0.5, "sts": 0.5}, task="sst+sts", sampling="sqrt", batch_size=16)
    single = [write_run(0.5, task="sst"), write_run(0.5, task="sts", epochs=3)]
    ended = call(main, several, "--single", *single)
    assert ended.code == 0
    assert ended.out.endswith("\n\nTogether and alone differ in epochs, batch-size too.\n")


def test_the_table_is_made_of_real_runs(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    for task in ("sst+sts", "sst", "sts"):
        assert call(train.main, *flags(tiny, small_data, out=tmp_path / task, task=task)).code == 0
    ended = call(main, tmp_path / "sst+sts", "--single", tmp_path / "sst", tmp_path / "sts")
    assert (ended.code, ended.err) == (0, "")
    read = {
        task: json.loads((tmp_path / task / "result.json").read_text()) for task in ("sst+sts", "sst", "sts")
    }
    for line, task in zip(ended.out.splitlines()[2:], ("sst", "sts"), strict=True):
        together, alone = read["sst+sts"]["dev"][task], read[task]["dev"]
        for value in (task, f"{together:.4f}", f"{alone:.4f}", f"{together - alone:+.4f}"):
            assert f"| {value} |" in line
