"""train.py: what it refuses before it reads a weight, and a run as a process: signals, a full disk."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import Ended, call, checkpoints, flags, left_behind, lines_of, strict_json, write_data
from special_files import full_device
from tiny_bert import build_tiny

import predict
import train

ROOT = Path(__file__).parents[1]


@pytest.fixture
def no_weights(tiny: Path, tmp_path: Path) -> Path:
    """A model folder that nobody can load: what is refused for another reason was refused before."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(tiny / name, folder / name)
    (folder / "model.safetensors").write_bytes(b"damaged")
    return folder


def assert_refused(ended: Ended, *words: object) -> None:
    assert ended.code == 2
    assert ended.line.startswith("error: ")
    for word in words:
        assert str(word) in ended.line
    assert ended.out == ""


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


REFUSED = {
    "--task: expected": {"task": "mnli"},
    "--task: expected each task once": {"task": "sst+sst"},
    "--method: expected one of": {"method": "prefix"},
    "argument --epochs: invalid int value: '2.5'": {"epochs": "2.5"},
    "--lr: expected a number above 0, got nan": {"lr": "nan"},
    "--rank: expected at most the model's hidden size 32, got 33": {"rank": 33},
    "--rank-pattern: expected at most the model's hidden size 32, got 33": {"rank_pattern": "query=33"},
    "--targets: 'query@7' matches no linear layer of the model; it has": {"targets": "query@7"},
    "--targets: 'pooler.dense' matches no linear layer": {"targets": "pooler.dense"},
    "--alpha: expected one below 1e+10 at every rank, got 1e+10 for encoder.layer.0.attention.self.query": {
        "alpha": 5e9,
        "rank": 1,
        "rank_pattern": "query=4",
    },
    "argument --out: expected a path, got an empty text": {"out": ""},
    "argument --model: expected UTF-8, got 'a\\udcff'": {"model": "a\udcff"},
    "--rank-pattern: 'key' matches no linear layer": {"targets": "query", "rank_pattern": "key=2"},
    "--max-length: expected at most the model's 128 positions, got 129": {"max_length": 129},
    "--rank: --method full has no adapters": {"method": "full", "rank": 4},
    "--pair siamese: expected a task of sentence pairs": {"task": "sst", "pair": "siamese"},
    "--device: expected cpu, cuda or cuda:N, got 'tpu'": {"device": "tpu"},
    "--device cuda:99: this machine has": {"device": "cuda:99"},
    "--precision fp16: expected a GPU": {"device": "cpu", "precision": "fp16"},
    "--data: expected demo, cs224n or a folder, got 'nowhere'": {"data": "nowhere"},
    "--data: expected demo, cs224n or a folder, got 'x": {"data": "x" * 5000},
    "--quotes plain: the files of --data demo are quoted": {"quotes": "plain", "data": "demo"},
    "got 'bert-huge'": {"model": "bert-huge"},
    "--out: expected a folder that can be written": {"out": "model/config.json/run"},
    "--out: expected a folder that can be written, model/config.json": {"out": "model/config.json"},
    "--out: expected a new or empty folder, . holds something else": {"out": "."},
    "--out: old holds a run already; --resume continues it": {"out": "old"},
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.items(), ids=list(REFUSED))
def test_it_is_refused_before_a_weight_is_read(
    message: str, changes: dict, no_weights: Path, small_data: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").touch()
    before = content(tmp_path)
    assert_refused(call(train.main, *flags(no_weights, small_data, **{"out": "new", **changes})), message)
    assert content(tmp_path) == before


@pytest.mark.parametrize("arguments", [["sts"], ["--tasks", "sts"], ["--resume"]])
def test_arguments_that_are_none_are_refused(arguments: list[str]) -> None:
    assert_refused(call(train.main, *arguments))


def test_a_gpu_is_refused_where_there_is_none(no_weights: Path, small_data: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert_refused(call(train.main, *flags(no_weights, small_data, device="cuda")), "this machine has 0 CUDA")
    said = call(train.main, *flags(no_weights, small_data, precision="fp16"))
    assert_refused(said, "--precision fp16: expected a GPU")


def test_a_place_without_the_right_to_write_is_refused_before_a_weight_is_read(
    no_weights: Path, small_data: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    place = tmp_path / "place"
    place.mkdir(mode=0o555)
    ended = call(train.main, *flags(no_weights, small_data, out=place / "run"))
    assert_refused(ended, f"--out: expected a folder that can be written, {place} is none")


def damage_model(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"model_type": how}))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no weights", "model.safetensors"),
        ("no tokenizer", "tokenizer.json"),
        ("cut", "expected a whole safetensors file"),
        ("electra", "distilbert, got 'electra': not a BERT"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    how: str, words: str, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    damage_model(folder, how)
    ended = call(train.main, *flags(folder, small_data, out=tmp_path / "run"))
    assert_refused(ended, folder, words)
    assert not (tmp_path / "run").exists()


def test_pooling_by_a_pooler_needs_one(small_data: Path, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path, with_pooler=False)
    ended = call(train.main, *flags(folder, small_data, out=tmp_path / "run", pooling="pooler"))
    assert_refused(ended, f"--pooling pooler: {folder} has no pooler; use cls or mean")


@pytest.mark.parametrize(
    ("line", "text", "words"),
    [
        (None, None, "sts-dev.csv: cannot be read"),
        (0, "id\tsentence1\tsentence2\tscore", "sts-dev.csv:1: expected tab-separated columns"),
        (3, "2\tdev2\ta\tb\tgood", "sts-dev.csv:4: similarity 'good' is not a number from 0 to 5"),
        (3, "2\tdev2\ta\tb\t5.5", "sts-dev.csv:4: similarity '5.5' is not a number from 0 to 5"),
        (3, "2\tdev2\ta\tb\t", "sts-dev.csv:4: no similarity"),
        (3, "2\tdev1\ta\tb\t1", "sts-dev.csv:4: id 'dev1' is taken by line 3"),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_its_line(
    line: int | None, text: str, words: str, no_weights: Path, tmp_path: Path
) -> None:
    file = write_data(tmp_path / "data") / "sts-dev.csv"
    lines = file.read_text().splitlines()
    file.unlink()
    if line is not None:
        lines[line] = text
        file.write_text("\n".join(lines) + "\n")
    ended = call(train.main, *flags(no_weights, tmp_path / "data", out=tmp_path / "run"))
    assert_refused(ended, f"{tmp_path / 'data'}/{words}")
    assert not (tmp_path / "run").exists()


def test_a_test_file_that_is_a_link_to_nothing_is_not_taken_for_none(no_weights, tmp_path: Path) -> None:
    file = write_data(tmp_path / "data") / "sts-test-student.csv"
    file.unlink()
    file.symlink_to(tmp_path / "gone.csv")
    ended = call(train.main, *flags(no_weights, tmp_path / "data", out=tmp_path / "run"))
    assert_refused(ended, f"{file}: cannot be read")


def test_without_out_the_run_lands_under_runs(
    tiny: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for count in (1, 2):
        assert call(train.main, *flags(tiny, small_data, max_steps=1, task="sst")).code == 0
        folders = os.listdir("runs")
        assert len(folders) == count
        assert all(name.startswith("sst-rslora-") for name in folders)


LONG = {"epochs": 9, "batch_size": 3}  # 72 steps: enough to be stopped in


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "train.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_steps(folder: Path, process: subprocess.Popen) -> None:
    steps, deadline = folder / "steps.jsonl", time.monotonic() + 120
    while not steps.exists() or steps.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def stopped(folder: Path, arguments: list[str], how: signal.Signals) -> Ended:
    """train.py as a process, which gets the signal once it has done some steps."""
    process = start(*arguments)
    wait_for_steps(folder, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, err)


@pytest.fixture(scope="module")
def whole(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the long run leaves behind, started as users do."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(*flags(tiny, small_data, out=folder, **LONG))
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("task       sts (concat)")
    result = strict_json((folder / "result.json").read_text())
    assert 0 < result["memory_above_start_mib"] < result["peak_memory_mib"] / 2
    return left_behind(folder)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_a_process_that_was_stopped_goes_on_as_if_it_had_not_been(
    how: signal.Signals, code: int, whole: dict, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", resume=True, **LONG)
    ended = stopped(tmp_path / "run", arguments, how)
    assert ended.code == code
    assert not (tmp_path / "run" / "result.json").exists()
    if how == signal.SIGKILL:
        assert ended.err == ""
    else:
        assert ended.line.startswith(f"{how.name}: stopped after step ")
        assert ended.line.endswith(f"saved; --resume --out {tmp_path / 'run'} goes on from there")
        assert checkpoints(tmp_path / "run")
    assert call(train.main, *arguments).code == 0
    left = {name: content for name, content in left_behind(tmp_path / "run").items() if ".state" not in name}
    assert left == whole


def test_a_run_whose_terminal_is_gone_saves_and_goes_on(
    whole: dict, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    """SIGHUP comes twice, from the kernel and the shell, and whatever is written then is an error."""
    folder, (master, terminal) = tmp_path / "run", os.openpty()
    arguments = flags(tiny, small_data, out=folder, resume=True, **LONG)
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=ROOT, start_new_session=True,
        **dict.fromkeys(("stdin", "stdout", "stderr"), terminal),
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    wait_for_steps(folder, process)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 129
    saved = int(checkpoints(folder)[-1].name.split("-")[1])
    assert saved == len(lines_of(folder / "steps.jsonl"))
    again = call(train.main, *arguments)
    assert again.code == 0
    assert f"resumed    after step {saved} of 72, in epoch " in again.out
    assert left_behind(folder) == whole


def test_a_run_under_nohup_goes_on(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", **LONG)
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    command = ["nohup", sys.executable, "train.py", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_run_in_a_line(
    small_disk: Path, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    ended = call(train.main, *flags(tiny, small_data, out=small_disk / "run", resume=True))
    assert ended.code == 1
    assert ended.line.startswith(f"error: {small_disk / 'run'}")
    assert "No space left on device" in ended.line
    left = [path.name for path in (small_disk / "run").rglob("*") if path.is_file()]
    assert not any(name.startswith(".") for name in left)
    for name in left:
        if name.endswith((".json", ".jsonl")):
            for line in (small_disk / "run" / name).read_text().splitlines() if "jsonl" in name else ["{}"]:
                strict_json(line)
    shutil.copytree(small_disk / "run", tmp_path / "run")  # with room again it goes on
    assert call(train.main, *flags(tiny, small_data, out=tmp_path / "run", resume=True)).code == 0


SAYS_WHEN = """
import sys, train
from training.exit import run_command
def main():
    print("ready", flush=True)
    return train.main()
sys.exit(run_command(main))
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("pause", [0.0, 0.5])  # torch is being imported
def test_a_process_that_is_still_loading_stops_in_a_line(
    how: signal.Signals, code: int, pause: float, tiny: Path, small_data: Path, tmp_path: Path
) -> None:
    given = flags(tiny, small_data, out=tmp_path / "run", epochs=1000)
    command = [sys.executable, "-c", SAYS_WHEN, *map(str, given)]
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(pause)
        process.send_signal(how)
        _, err = process.communicate(timeout=120)
    ended = Ended(process.returncode, "", err)
    assert ended.code == code
    assert ended.line == f"error: interrupted by {how.name}" or "stopped after step " in ended.line


def test_the_largest_alpha_trains_and_reads_back(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    settings = {"alpha": 1e10, "lr": 1e-12, "max_steps": 1, "rank": 4, "rank_pattern": "query=2"}
    ended = call(
        train.main, *flags(tiny, small_data, out=tmp_path / "run", task="sst", method="lora", **settings)
    )
    assert (ended.code, ended.err) == (0, "")
    assert call(predict.main, tmp_path / "run", "--text", "a").code == 0


def test_a_full_stdout_begins_no_run(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    arguments = flags(tiny, small_data, out=tmp_path / "run", max_steps=1)
    with full_device(tmp_path / "full") as full:
        command = [sys.executable, ROOT / "train.py", *arguments]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (1, "error: standard output: No space left on device\n")
    assert call(train.main, *arguments).code == 0
