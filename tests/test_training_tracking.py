"""A tracked run computes what an untracked one does, and logs what its own files say."""

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from small_runs import call, flags, left_behind, lines_of

import train
from minibert.errors import InputError
from training import run as run_module
from training.errors import TrainingError
from training.loop import Trainer
from training.report import Bar
from training.tracking import check_ready

STEP = {"loss", "lr", "grad_norm"}


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does."""


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoppingBar(Bar):
        def step(self, line: dict, tokens_per_second: float) -> None:
            if line["step"] == step:
                raise Killed

    monkeypatch.setattr(run_module, "Bar", StoppingBar)


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What steps.jsonl and metrics.jsonl say, as (step, value) by name."""
    values: dict[str, list[tuple[int, float]]] = {}
    for line in lines_of(folder / "steps.jsonl"):
        for name in STEP:
            values.setdefault(f"step/{name}", []).append((line["step"], line[name]))
    for line in lines_of(folder / "metrics.jsonl"):
        values.setdefault("epoch/loss", []).append((line["step"], line["loss"]))
        for split in ("dev", "train"):
            for name, score in line["metrics"][split]["sts"].items():
                values.setdefault(f"{split}/sts/{name}", []).append((line["step"], score))
    return values


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader sees."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = reader.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}


def assert_logged(seen: dict, folder: Path) -> None:
    for name, values in expected(folder).items():
        steps, logged = zip(*seen[name], strict=True)
        assert steps == tuple(step for step, _ in values)
        assert logged == pytest.approx([value for _, value in values], rel=1e-6)  # TensorBoard keeps fp32
    assert [step for step, _ in seen["step/tokens_per_second"]] == [step for step, _ in seen["step/loss"]]
    assert min(value for _, value in seen["step/tokens_per_second"]) > 0
    assert seen.keys() == expected(folder).keys() | {"step/tokens_per_second"}


def test_tensorboard_has_what_the_runs_files_have_and_the_run_is_the_same(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    for name, track in (("plain", {}), ("tracked", {"track": "tensorboard"})):
        assert call(train.main, *flags(tiny, small_data, out=tmp_path / name, **track)).code == 0
    assert_logged(events(tmp_path / "tracked"), tmp_path / "tracked")
    plain, tracked = left_behind(tmp_path / "plain"), left_behind(tmp_path / "tracked")
    assert plain == {name: value for name, value in tracked.items() if not name.startswith("tensorboard")}


def test_tensorboard_shows_each_step_of_a_resumed_run_once(
    tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    arguments = flags(tiny, small_data, out=tmp_path / "run", track="tensorboard", resume=True)
    with monkeypatch.context() as patch:
        stop_after(5, patch)  # two steps after the last checkpoint
        with pytest.raises(Killed):
            call(train.main, *arguments)
    assert call(train.main, *arguments).code == 0
    assert_logged(events(tmp_path / "run"), tmp_path / "run")


class FakeWandb(types.ModuleType):
    """wandb's module as far as a run uses it, and what was told to it."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="a test")
        self.runs: list[dict] = []
        self.has_account = True

    def Settings(self, **settings: object) -> dict:
        return settings

    def login(self, verify: bool) -> None:
        if not self.has_account:
            raise self.Error("No API key configured.")

    def init(self, **told: object) -> "FakeWandb":
        self.runs.append({"told": told, "logged": {}, "exit": None})
        return self

    def log(self, values: dict, step: int) -> None:
        for name, value in values.items():
            self.runs[-1]["logged"].setdefault(name, []).append((step, value))

    def finish(self, exit_code: int) -> None:
        self.runs[-1]["exit"] = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_is_told_the_config_and_what_the_runs_files_have(
    wandb: FakeWandb, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "run", track="wandb")).code == 0
    (run,) = wandb.runs
    assert_logged(run["logged"], tmp_path / "run")
    assert run["told"]["config"] == json.loads((tmp_path / "run" / "config.json").read_text())
    assert (run["told"]["name"], run["told"]["dir"]) == ("run", str(tmp_path / "run"))
    assert run["exit"] == 0


def test_a_resumed_run_may_be_tracked_otherwise_and_keeps_its_id(
    wandb: FakeWandb, tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", resume=True)
    for step, track in [(4, []), (5, ["--track", "wandb"]), (0, ["--track", "wandb"])]:
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            if step:
                with pytest.raises(Killed):
                    call(train.main, *arguments, *track)
            else:
                assert call(train.main, *arguments, *track).code == 0
    first, second = wandb.runs
    assert first["told"]["id"] == second["told"]["id"]
    assert (first["exit"], second["exit"]) == (1, 0)
    assert "track" not in json.loads((tmp_path / "run" / "config.json").read_text())


def test_a_run_that_fails_is_marked_as_failed(
    wandb: FakeWandb, tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: Trainer) -> dict:
        raise TrainingError("step 1: the loss is not finite")

    monkeypatch.setattr(Trainer, "step", fail)
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "run", track="wandb")).code == 1
    assert wandb.runs[0]["exit"] == 1


def test_without_an_account_wandb_is_refused_before_anything_is_loaded_unless_offline(
    wandb: FakeWandb, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.has_account = False
    arguments = flags(tmp_path / "no-model", small_data, out=tmp_path / "run", track="wandb")
    says = "error: --track wandb: No API key configured. Or set WANDB_MODE=offline."
    assert call(train.main, *arguments) == (2, "", says + "\n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_ready(["wandb"])


def test_real_wandb_works_offline(
    tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert call(train.main, *flags(tiny, small_data, out="run", track="wandb", max_steps=2)).code == 0
    identity = (tmp_path / "run" / "wandb" / "id.txt").read_text()
    (log,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    written = log.read_bytes()
    for name in (b"step/loss", b"step/tokens_per_second", b"dev/sts/pearson", b"rslora"):
        assert name in written
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_said_before_anything_is_loaded(
    name: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = flags(tmp_path / "no-model", small_data, out=tmp_path / "run", track=name)
    says = f"error: --track {name}: {name} is not installed: pip install {name}"
    assert call(train.main, *arguments) == (2, "", says + "\n")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_the_packages_name_is_not_taken_for_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "not_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="not_a_tracker is not installed"):
        check_ready(["not_a_tracker"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--track", "mlflow"], "--track: invalid choice: 'mlflow'"),
        (["--track"], "--track: expected at least one argument"),
        (["--track", "wandb", "--overfit-batch"], "--overfit-batch: shows its loss itself"),
    ],
)
def test_a_tracker_that_makes_no_sense_is_refused(arguments: list[str], says: str) -> None:
    ended = call(train.main, *arguments)
    assert ended.code == 2
    assert says in ended.line
