"""A run that was stopped goes on as if it had not been: bitwise."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import Ended, call, checkpoints, flags, left_behind, lines_of, settings

import train
from training import run as run_module
from training.checkpoint import FILE, load_checkpoint, save_checkpoint, trainable_state
from training.report import Bar
from training.run import Run
from training.run_folder import RunFolder

KINDS = {
    "rslora": {"method": "rslora"},
    "dora, dropout everywhere": {"method": "dora", "lora_dropout": 0.2, "encoder_dropout": 0.2},
    "full, pooler": {"method": "full", "pooling": "pooler", "lr": 0.001},
    "frozen": {"method": "frozen"},
    "frozen, cut short": {"method": "frozen", "task": "sst+sts", "pair": "siamese", "max_steps": 5},
    "two tasks": {"task": "sst+sts", "method": "lora"},
    "siamese, cut short": {"pair": "siamese", "max_steps": 4},
    "the precision chosen here": {"precision": "auto"},
}


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing of it is caught, and nothing is saved."""


@pytest.fixture
def stopped_run(tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a run in tmp_path / "stopped", and stops it once it has said that a step or an epoch is done.

    Of a frozen encoder it also says how many examples are encoded.
    """

    def start(step: int, how: signal.Signals | None = signal.SIGTERM, said: str = "step", **changes) -> Ended:
        class StoppingBar(Bar):
            def encoded(self, done: int, total: int) -> None:
                super().encoded(done, total)
                stop("encoded", done)

            def step(self, line: dict, tokens_per_second: float) -> None:
                super().step(line, tokens_per_second)
                stop("step", line["step"])

            def epoch(self, line: dict) -> None:
                super().epoch(line)
                stop("epoch", line["step"])

        def stop(what: str, done: int) -> None:
            if (what, done) == (said, step):
                if how is None:
                    raise Killed
                signal.raise_signal(how)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "Bar", StoppingBar)
            return call(
                train.main, *flags(tiny, small_data, out=tmp_path / "stopped", resume=True, **changes)
            )

    return start


@pytest.fixture(scope="module")
def whole_run(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """What a run that was never stopped leaves behind."""
    known: dict[str, dict] = {}

    def run(**changes) -> dict:
        if str(changes) not in known:
            folder = tmp_path_factory.mktemp("whole") / "run"
            ended = call(train.main, *flags(tiny, small_data, out=folder, **changes))
            assert ended.code == 0, ended.err
            known[str(changes)] = left_behind(folder)
        return known[str(changes)]

    return run


@pytest.fixture
def goes_on(tiny: Path, small_data: Path, tmp_path: Path, whole_run):
    """Resumes the stopped run, and compares what it leaves behind."""

    def compare(**changes) -> None:
        again = call(train.main, *flags(tiny, small_data, out=tmp_path / "stopped", resume=True, **changes))
        assert again.code == 0, again.err
        assert left_behind(tmp_path / "stopped") == whole_run(**changes)

    return compare


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_as_one_that_was_not(kind: str, stopped_run, goes_on) -> None:
    ended = stopped_run(2, **KINDS[kind])  # in the middle of an epoch
    assert ended.code == 143
    assert ended.line.startswith("SIGTERM: stopped after step 2, saved; --resume --out ")
    goes_on(**KINDS[kind])


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_may_be_stopped_anywhere(step: int, stopped_run, goes_on) -> None:
    assert stopped_run(step).code == 143
    goes_on()


def test_a_run_may_be_stopped_more_than_once(stopped_run, goes_on) -> None:
    assert stopped_run(2).code == 143
    assert stopped_run(4, signal.SIGINT).code == 130
    goes_on()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_may_be_stopped_while_its_frozen_encoder_reads(
    how: signal.Signals, code: int, stopped_run, goes_on
) -> None:
    changes = {"method": "frozen", "task": "sst+sts"}  # one batch of each, then the first step
    for done in (24, 48):
        ended = stopped_run(done, how, "encoded", **changes)
        assert ended.code == code
        assert f"{how.name}: stopped after step 0, saved; --resume --out " in ended.line
    assert stopped_run(7, how, **changes).code == code
    ended = stopped_run(24, how, "encoded", **changes)  # which a resumed run does once more
    assert ended.code == code
    assert "stopped after step 7, saved" in ended.line
    goes_on(**changes)


@pytest.mark.parametrize(("said", "step"), [("step", 1), ("step", 5), ("epoch", 3), ("epoch", 6)])
def test_a_killed_run_goes_on_from_its_last_epoch(
    said: str, step: int, stopped_run, goes_on, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        stopped_run(step, None, said)
    assert len(lines_of(tmp_path / "stopped" / "steps.jsonl")) == step
    assert bool(checkpoints(tmp_path / "stopped")) == (step >= 3)
    assert not (tmp_path / "stopped" / "result.json").exists()
    goes_on()


def test_the_best_epoch_may_lie_before_the_stop(stopped_run, goes_on, whole_run) -> None:
    long = {"epochs": 3, "lr": 0.05, "schedule": "constant"}
    seeds = (seed for seed in range(20) if whole_run(seed=seed, **long)["result.json"]["best_epoch"] == 1)
    changes = {"seed": next(seeds), **long}
    stopped_run(8, **changes)
    goes_on(**changes)


@pytest.mark.parametrize("torn", [b'{"step": 5, "ta', b"\0\0\0\0", b"\xff\xfe{", b"{}", b"5\n"])
def test_a_torn_last_line_is_done_again(torn: bytes, stopped_run, goes_on, tmp_path: Path) -> None:
    stopped_run(4)
    with open(tmp_path / "stopped" / "steps.jsonl", "ab") as steps:
        steps.write(torn)
    goes_on()


def test_a_run_may_be_stopped_when_only_its_last_score_is_left(stopped_run, goes_on, tmp_path: Path) -> None:
    assert stopped_run(6).code == 143
    assert len(lines_of(tmp_path / "stopped" / "metrics.jsonl")) == 1
    goes_on()


def test_a_run_may_be_stopped_when_only_its_results_are_left_to_write(
    stopped_run, goes_on, tmp_path: Path
) -> None:
    assert stopped_run(6, said="epoch").code == 143
    assert len(lines_of(tmp_path / "stopped" / "metrics.jsonl")) == 2
    goes_on()


def test_a_run_whose_checkpoint_is_lost_starts_anew(stopped_run, goes_on, tmp_path: Path) -> None:
    stopped_run(4)
    shutil.rmtree(tmp_path / "stopped" / "checkpoint")
    goes_on()


def test_a_finished_run_is_left_untouched(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run")
    assert call(train.main, *arguments).code == 0

    def files() -> dict[Path, tuple[int, ...]]:
        """All that writing changes; the time of access, which looking changes, is no part of it."""
        found = {path: path.stat() for path in (tmp_path / "run").rglob("*")}
        return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found.items()}

    before = files()
    again = call(train.main, *arguments, "--resume")
    assert (again.code, again.err) == (0, "")
    assert "is finished" in again.out
    assert files() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"lr": 0.02}, "lr 0.01, now it is 0.02"),
        ({"task": "sst"}, "task 'sts', now it is 'sst'"),
        ({"rank": 4}, "rank 8, now it is 4"),
        ({"precision": "auto", "max_steps": 2}, "max_steps None, now it is 2"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    changes: dict, message: str, stopped_run, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    stopped_run(2)
    before = left_behind(tmp_path / "stopped")
    ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "stopped", resume=True, **changes))
    assert ended.code == 2
    assert ended.line.startswith(f"error: --resume: {tmp_path / 'stopped'} was made with ")
    assert message in ended.line
    assert left_behind(tmp_path / "stopped") == before


def after_some_steps(tiny: Path, small_data: Path, steps: int = 4, **changes) -> Run:
    run = Run(settings(tiny, small_data, **changes))
    run.trainer.model.train()
    for _ in range(steps):
        run.trainer.step()
        if run.trainer.epoch_ended:
            run.trainer.end_epoch({"dev": run.data["dev"], "train": run.data["sample"]})
    return run


def save(run: Run, folder: Path) -> None:
    trainer = run.trainer
    save_checkpoint(folder, trainer.model, trainer.optimizer, trainer.best_weights, trainer.progress)


def load(folder: Path, run: Run, file: str = FILE) -> tuple:
    return load_checkpoint(folder, run.trainer.model, run.trainer.optimizer, run.trainer.scaler, file)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("method", ["full", "dora"])
def test_a_checkpoint_comes_back_bitwise(method: str, tiny: Path, small_data: Path, tmp_path: Path) -> None:
    run, fresh = (
        after_some_steps(tiny, small_data, n, method=method, task="sst+sts", epochs=9) for n in (7, 0)
    )
    save(run, tmp_path)
    held = dict(fresh.trainer.model.named_parameters())
    progress, best = load(tmp_path, fresh)
    assert vars(progress) == vars(run.trainer.progress)
    assert progress.best_epoch == 1
    assert_same(best, run.trainer.best_weights)
    assert_same(trainable_state(fresh.trainer.model), trainable_state(run.trainer.model))
    assert all(p is held[name] for name, p in fresh.trainer.model.named_parameters())
    for (name, old), (_, new) in zip(
        run.trainer.model.named_parameters(), fresh.trainer.model.named_parameters(), strict=True
    ):
        before, after = run.trainer.optimizer.state.get(old, {}), fresh.trainer.optimizer.state.get(new, {})
        assert (len(before) == 3) == old.requires_grad, name
        assert_same(before, after)


def test_a_checkpoint_before_a_task_had_its_turn_has_no_moments_of_its_head(
    tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    run, fresh = (after_some_steps(tiny, small_data, n, task="sst+sts") for n in (1, 0))
    save(run, tmp_path)
    load(tmp_path, fresh)
    ours = fresh.trainer.model.heads
    assert len(fresh.trainer.optimizer.state[ours["sst"].output.weight]) == 3
    assert ours["sts"].output.weight not in fresh.trainer.optimizer.state


def test_the_state_of_the_loss_scale_is_kept(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    run, fresh = (after_some_steps(tiny, small_data, 0) for _ in range(2))
    for each, scale in ((run, 128.0), (fresh, 2.0)):
        each.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.trainer.scaler.scale(torch.ones(()))  # a scaler makes its state when first used
    run._checkpoint(RunFolder(tmp_path))
    load(RunFolder(tmp_path).checkpoint, fresh, checkpoints(RunFolder(tmp_path).path)[0].name)
    assert fresh.trainer.scaler.get_scale() == 128.0


def damaged(good: bytes) -> dict[str, bytes]:
    flipped = bytearray(good)
    flipped[20] ^= 0x55  # in the header, which names the tensors
    return {
        "empty": b"",
        "cut in the header": good[:100],
        "cut in the tensors": good[:-1],
        "longer": good + b"x",
        "text": b"not a checkpoint at all",
        "huge header": b"\xff" * 64,
        "zeros": bytes(len(good)),
        "flipped": bytes(flipped),
    }


def test_a_damaged_checkpoint_is_said_in_a_line(
    stopped_run, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    stopped_run(4)
    *older, path = checkpoints(tmp_path / "stopped")
    for one in older:
        one.unlink()
    for name, content in damaged(path.read_bytes()).items():
        path.write_bytes(content)
        ended = call(train.main, *flags(tiny, small_data, out=tmp_path / "stopped", resume=True))
        assert ended.code == 2, name
        assert ended.line.startswith(f"error: {path}: "), name


def test_a_checkpoint_of_something_else_is_refused(
    tiny: Path, small_data: Path, tmp_path: Path, refusal
) -> None:
    run = after_some_steps(tiny, small_data)
    save(run, tmp_path)
    path = tmp_path / FILE
    good, progress = load_file(path), {"progress": json.dumps(vars(run.trainer.progress))}
    weight = next(name for name in good if name.startswith("model."))
    others = {
        "does not say how far": (good, {}),
        "does not say how": (good, {"progress": "{}x"}),
        "does not": (good, {"progress": '{"steps": 1}'}),
        "missing": ({name: t for name, t in good.items() if name != weight}, progress),
        "unexpected": (good | {"model.more": torch.zeros(1)}, progress),
        "expected [": (good | {weight: torch.zeros(3, 3)}, progress),
        "the best weights": ({n: t for n, t in good.items() if not n.startswith("best.")}, progress),
    }
    for message, (state, metadata) in others.items():
        save_file(state, path, metadata)
        said = refusal(load, tmp_path, after_some_steps(tiny, small_data, 0))
        assert said.startswith(str(path))
        assert message in said


def test_no_byte_of_the_header_brings_a_traceback(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    run, chance = after_some_steps(tiny, small_data), random.Random(0)
    save(run, tmp_path)
    good = (tmp_path / FILE).read_bytes()
    header = int.from_bytes(good[:8], "little")
    said = []
    for _ in range(100):
        flipped = bytearray(good)
        flipped[chance.randrange(8 + header)] ^= 1 << chance.randrange(8)
        (tmp_path / FILE).write_bytes(flipped)
        try:
            load(tmp_path, run)
        except ValueError as error:  # an InputError is one
            said.append(str(error))
    assert all(line.startswith(f"{tmp_path / FILE}: ") for line in said)
    assert len(said) > 50  # in the others the bit is in a digit of a loss, and the like
