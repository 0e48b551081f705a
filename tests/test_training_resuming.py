"""A resumed run is bitwise the same, from its newest whole checkpoint, or a refusal that says why."""

import hashlib
import json
import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from small_runs import Ended, call, checkpoints, flags, left_behind, lines_of, strict_json, write_data
from stopped_runs import Killed, stopping
from tiny_bert import build_tiny

import train
from lora.methods import METHODS
from training import provenance
from training.keeping import Pace


@pytest.fixture
def run(tiny: Path, small_data: Path, tmp_path: Path):
    """Calls train.py with --resume and a folder's name."""

    def start(name: str, *more: str, **changes) -> Ended:
        arguments = {"out": tmp_path / name, "resume": True} | changes
        return call(train.main, *flags(tiny, small_data, **arguments), *more)

    return start


@pytest.fixture
def whole(run, tmp_path: Path):
    """What a run that nothing happened to leaves behind."""

    def left(**changes) -> dict:
        assert run("whole", **changes).code == 0
        return left_behind(tmp_path / "whole")

    return left


def killed(run, step: int, **changes) -> None:
    with stopping(step), pytest.raises(Killed):
        run("killed", checkpoint_steps=1, **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", ["sst", "sst+sts"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_killed_run_goes_on_bitwise(
    method: str, task: str, precision: str, run, whole, tmp_path: Path
) -> None:
    changes = {"method": method, "task": task, "precision": precision, "max_steps": 5, "lora_dropout": 0.1}
    if METHODS[method].layer is None:
        del changes["lora_dropout"]
    killed(run, 4, **changes)
    assert checkpoints(tmp_path / "killed")[-1].name.startswith("step-3-")
    again = run("killed", **changes)
    assert again.code == 0
    assert [line for line in again.err.splitlines() if not line.startswith("--precision bf16: ")] == []
    assert left_behind(tmp_path / "killed") == whole(**changes)


@pytest.mark.parametrize(
    "kept", [{"checkpoint_steps": 1}, {"checkpoint_minutes": 1e-9, "checkpoints": 1}], ids=str
)
def test_how_a_run_is_kept_changes_nothing_of_it(kept: dict, run, whole, tmp_path: Path) -> None:
    assert run("kept", **kept).code == 0
    assert left_behind(tmp_path / "kept") == whole()


@pytest.mark.parametrize(("number", "steps"), [(1, [4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_last_checkpoints_are_kept(number: int, steps: list[int], run, tmp_path: Path) -> None:
    killed(run, 5, checkpoints=number)
    saved = checkpoints(tmp_path / "killed")
    assert [int(path.name.split("-")[1]) for path in saved] == steps
    for path in saved:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in path.name
    assert sorted(os.listdir(tmp_path / "killed" / "checkpoint")) == sorted(path.name for path in saved)


def test_ten_minutes_after_the_last_one_a_checkpoint_is_written(
    run, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes four minutes here, an epoch six steps."""
    steps = tmp_path / "killed" / "steps.jsonl"
    clock = lambda: 240 * len(lines_of(steps)) if steps.exists() else 0  # noqa: E731
    monkeypatch.setattr("training.run.Pace", partial(Pace, clock=clock))
    with stopping(5), pytest.raises(Killed):
        run("killed", batch_size=4)
    assert [path.name.split("-")[1] for path in checkpoints(tmp_path / "killed")] == ["3"]
    assert run("killed", batch_size=4).code == 0
    assert left_behind(tmp_path / "killed") == whole(batch_size=4)


@pytest.mark.parametrize(
    ("killed_in", "said"),
    [
        (1, "no step was saved: from the first"),
        (3, "after step 2 of 6, in epoch 1 of 2"),
        (4, "after step 3 of 6, in epoch 2 of 2"),
    ],
)
def test_a_resumed_run_says_from_where(killed_in: int, said: str, run) -> None:
    killed(run, killed_in)
    assert f"\nresumed    {said}\n" in run("killed").out


def test_a_run_that_lacks_its_results_alone_says_so(run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("training.run.write_predictions", Mock(side_effect=Killed))
        with pytest.raises(Killed):
            run("killed")
    assert "\nresumed    after step 6, the last; the results are still to be written\n" in run("killed").out


def test_without_an_interval_a_checkpoint_is_written_at_each_epochs_end(run, tmp_path: Path) -> None:
    with stopping(5), pytest.raises(Killed):
        run("killed")
    assert [path.name.split("-")[1] for path in checkpoints(tmp_path / "killed")] == ["3"]


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_is_used(
    harm, run, whole, tmp_path: Path
) -> None:
    chance = random.Random(0)
    killed(run, 5)
    *_, before, last = checkpoints(tmp_path / "killed")
    good = Path(shutil.copytree(tmp_path / "killed", tmp_path / "good"))
    expected = whole()
    for _ in range(3):
        shutil.rmtree(tmp_path / "killed")
        shutil.copytree(good, tmp_path / "killed")
        harm(last, chance)
        ended = run("killed")
        assert ended.code == 0
        assert (
            ended.line
            == f"{last}: damaged, its content has another hash; going on from the checkpoint of step 3"
        )
        assert left_behind(tmp_path / "killed") == expected
    assert before.name.startswith("step-3-")


def test_a_run_with_no_whole_checkpoint_is_refused_and_left_alone(run, tmp_path: Path) -> None:
    killed(run, 5)
    for path in checkpoints(tmp_path / "killed"):
        cut(path, random.Random(0))
    before = left_behind(tmp_path / "killed")
    ended = run("killed")
    assert ended.code == 2
    assert ended.line.startswith(f"error: {checkpoints(tmp_path / 'killed')[-1]}: expected the content")
    assert left_behind(tmp_path / "killed") == before


def test_what_killed_processes_left_half_written_is_no_hindrance(run, whole, tmp_path: Path) -> None:
    killed(run, 2)
    half = [
        tmp_path / "killed" / name
        for name in (".config.json.123", "checkpoint/.state.safetensors.9", "checkpoint/.tmpoTRmjj")
    ]
    for path in half:
        path.write_bytes(b"half")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / ".config.json.123").write_bytes(b"half")  # killed before there was a config
    expected = whole()
    for name in ("killed", "fresh"):
        assert run(name).code == 0
    assert left_behind(tmp_path / "killed") == expected
    assert not any(path.exists() for path in half)


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    """A model and data of this test alone, to change."""
    return {"model": build_tiny(tmp_path / "model"), "data": write_data(tmp_path / "data")}


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


CHANGES = {
    "data file sts-dev.csv": lambda own, _: replace_in(own["data"] / "sts-dev.csv", "dev9", "dev99"),
    "model file tokenizer.json": lambda own, _: replace_in(own["model"] / "tokenizer.json", "{", "{ "),
    "torch": lambda _, patch: patch.setattr(
        provenance, "versions", lambda real=provenance.versions: real() | {"torch": "9.9"}
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_does_not_go_on_with_another(
    what: str, own: dict, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(run, 5, **own)
    CHANGES[what](own, monkeypatch)
    ended = run("killed", **own, seed=3)
    assert ended.code == 2
    said = ended.line.removeprefix(f"error: --resume: {tmp_path / 'killed'} was made with ")
    assert [one.split(", now it is ")[0].rpartition(" ")[0] for one in said.split("; ")] == ["seed", what]
    again = run("killed", "--resume-anyway", **own)
    assert again.code == 0
    assert again.line.startswith(f"going on with a run that was made with {what} ")
    result = strict_json((tmp_path / "killed" / "result.json").read_text())
    (change,) = result["resumed_anyway"]
    assert change["step"] == 4
    assert [one.split(" ")[0] for one in change["made_with"]] == [what.split(" ")[0]]


@pytest.mark.parametrize(("size", "code"), [(None, 0), (3, 2)])
def test_a_run_that_drew_its_masks_in_another_way_does_not_go_on(
    size, code, run, tmp_path: Path, monkeypatch
):
    """Older versions drew the same ones for a batch in one piece."""
    changes = {"micro_batch_size": size} if size else {}
    with monkeypatch.context() as older:
        older.setattr("training.run.made_with", lambda *a: {k: v for k, v in provenance.made_with(*a).items()
                                                            if k != provenance.DROPOUT})  # fmt: skip
        killed(run, 5, **changes)
    ended = run("killed", **changes)
    assert ended.code == code
    masks = "dropout masks 'by place in the batch', now it is 'by process and piece'"
    assert size is None or ended.line == f"error: --resume: {tmp_path / 'killed'} was made with {masks}"


def test_settings_that_were_changed_anyway_are_the_runs_from_there(run, tmp_path: Path) -> None:
    killed(run, 5)
    ended = run("killed", "--resume-anyway", lr=0.002)
    assert ended.code == 0
    assert ended.line == "going on with a run that was made with lr 0.01, now it is 0.002"
    assert strict_json((tmp_path / "killed" / "config.json").read_text())["lr"] == 0.002
    result = strict_json((tmp_path / "killed" / "result.json").read_text())
    assert (result["lr"], result["config"]["lr"]) == (0.002, 0.002)
    assert result["resumed_anyway"] == [{"step": 4, "made_with": ["lr 0.01, now it is 0.002"]}]


def test_epochs_of_another_length_cannot_go_on_at_all(run) -> None:
    killed(run, 5)
    ended = run("killed", "--resume-anyway", batch_size=4)
    assert ended.code == 2
    assert "batch_size 8, now it is 4" in ended.line
    assert "steps of an epoch 3, now it is 6" in ended.line


def test_another_number_of_threads_is_said_and_kept(run, tmp_path: Path, monkeypatch) -> None:
    killed(run, 5)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    ended = run("killed")
    assert ended.code == 0
    assert "threads" in ended.line
    assert "now it is 77" in ended.line
    assert strict_json((tmp_path / "killed" / "result.json").read_text())["threads"] == 77


def test_a_result_says_what_made_it(run, tiny: Path, small_data: Path, tmp_path: Path) -> None:
    assert run("run", max_steps=1).code == 0
    result = strict_json((tmp_path / "run" / "result.json").read_text())
    assert result["config"] == strict_json((tmp_path / "run" / "config.json").read_text())
    assert result["versions"].keys() >= {"python", "torch", "numpy", "minibert"}
    for kind, folder, names in (
        ("data", small_data, {"sts-train.csv", "sts-dev.csv", "sts-test-student.csv"}),
        ("model", tiny, {"config.json", "tokenizer.json", "model.safetensors"}),
        ("files", tmp_path / "run", {"head.safetensors", "predictions-dev.csv", "adapter/minibert.json"}),
    ):
        hashes = result["files"] if kind == "files" else result["sha256"][kind]
        assert hashes.keys() >= names
        for name, known in hashes.items():
            assert known == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("changes", [{"method": "dora", "rank": 4}, {"task": "sst+sts"}], ids=str)
def test_a_run_is_repeated_by_its_config(changes: dict, run, whole, tmp_path: Path) -> None:
    expected = whole(**changes)
    written = tmp_path / "whole" / "config.json"
    ended = call(train.main, "--config", written, "--out", tmp_path / "again")
    assert (ended.code, ended.err) == (0, "")
    assert not ended.out.startswith("other than")
    assert left_behind(tmp_path / "again") == expected


def test_flags_beside_a_config_override_it_and_that_is_said(whole, tmp_path: Path) -> None:
    whole()
    written = tmp_path / "whole" / "config.json"
    ended = call(train.main, "--config", written, "--out", tmp_path / "b", "--rank", 2, "--max-steps", 1)
    assert ended.code == 0
    said = ended.out.splitlines()[0].removeprefix(f"other than in {written}: ")
    assert said == "rank 2 (8), alpha 2.8284271247461903 (5.656854249492381), max_steps 1 (None)"
    assert strict_json((tmp_path / "b" / "config.json").read_text())["rank"] == 2


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"task": "sts"}'])
def test_a_config_that_is_none_is_refused(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    ended = call(train.main, "--config", path)
    assert ended.code == 2
    assert ended.line.startswith(f"error: {path}: ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--checkpoint-steps", "0"], "--checkpoint-steps: expected a whole number of at least 1, got 0"),
        (["--checkpoints", "0"], "--checkpoints: expected a whole number of at least 1, got 0"),
        (["--checkpoint-minutes", "nan"], "--checkpoint-minutes: expected a number above 0, got nan"),
        (["--checkpoint-minutes", "0"], "--checkpoint-minutes: expected a number above 0, got 0.0"),
        (["--resume-anyway"], "--resume-anyway: expected --out, the folder of the run to continue"),
    ],
)
def test_flags_that_make_no_sense_are_refused(given: list[str], said: str) -> None:
    ended = call(train.main, *given)
    assert (ended.code, ended.line) == (2, f"error: {said}")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_scoring_stops_at_once_and_is_done_when_the_run_goes_on(
    how: signal.Signals, code: int, run, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import loop

    real, scored = loop.predict, []

    def predict(*given, **more):
        scored.append(given)
        if len(scored) == 2:
            signal.raise_signal(how)
            raise AssertionError("it went on")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "predict", predict)
        ended = run("killed")
    assert ended.code == code
    assert ended.line.startswith(f"{how.name}: stopped after step 3, saved; ")
    assert lines_of(tmp_path / "killed" / "steps.jsonl")[-1]["step"] == 3
    assert not (tmp_path / "killed" / "metrics.jsonl").exists()
    assert run("killed").code == 0
    assert left_behind(tmp_path / "killed") == whole()


def test_a_folder_in_which_another_process_trains_is_refused(run, tmp_path: Path) -> None:
    from training.keeping import alone_in

    with alone_in(tmp_path / "taken"):
        ended = run("taken")
    assert ended.code == 2
    assert ended.line == f"error: --out: another process is training in {tmp_path / 'taken'}"
    assert run("taken").code == 0


def test_a_checkpoint_of_an_older_version_goes_on(run, whole, tmp_path: Path) -> None:
    """Called state.safetensors, and without a word of what made it."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    killed(run, 5)
    *older, last = checkpoints(tmp_path / "killed")
    with safe_open(last, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    for name in ("skipped", "changes"):
        del progress[name]
    save_file(load_file(last), last.with_name("state.safetensors"), {"progress": json.dumps(progress)})
    for path in (*older, last):
        path.unlink()
    assert run("killed").code == 0
    assert left_behind(tmp_path / "killed") == whole()
