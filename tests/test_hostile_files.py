"""Whatever a file holds, reading it is a right answer or one clear line: no traceback, hang or blow-up."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
from hostile import (
    TEXTS,
    VALUES,
    changed,
    damaged,
    hostile,
    json_files,
    read_or_refused,
    safetensors_files,
)
from hypothesis import given
from hypothesis import strategies as st
from small_runs import FILES, call, flags, settings
from stopped_runs import Killed, stopping
from tiny_bert import TINY

import train
from benchmarks.turns import Log
from experiments.cells import make_cells, read_table
from experiments.grid import build_parser, overridden
from experiments.listing import read_runs
from experiments.scored import read_rows, read_scored
from lora.adapter_config import read_adapter_config
from lora.adapter_io import load_adapter
from minibert.files import read_json
from minibert.tokenizer import Tokenizer
from minibert.weights import load_bert, read_checkpoint, read_config
from tasks import TASKS
from tasks.reader import read_examples
from training.adapter_folder import read_card
from training.checkpoint import load_checkpoint, made_with
from training.cli import parse
from training.config import Config, fields
from training.embed import read_lines
from training.loop import Trainer
from training.run import Run
from training.run_folder import RunFolder, check_unchanged, load_run, read_run_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


@pytest.fixture(scope="module")
def finished(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert call(train.main, *flags(tiny, small_data, out=out, task="sst", method="lora")).code == 0
    return out


@pytest.fixture(scope="module")
def killed(tiny: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at its fifth step: it has a checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    arguments = flags(tiny, small_data, out=out, task="sst", method="lora", checkpoint_steps=2)
    with stopping(5), pytest.raises(Killed):
        call(train.main, *arguments)
    return out


@pytest.fixture(scope="module")
def trainer(tiny: Path, small_data: Path) -> Trainer:
    return Run(settings(tiny, small_data, task="sst", method="lora")).trainer


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one hostile file follows the other."""
    return tmp_path_factory.mktemp("room")


def rewritten(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class TestData:
    @hostile
    @given(data=st.data(), task=st.sampled_from(sorted(TASKS)), labelled=st.booleans(), strict=st.booleans())
    def test_rows(self, small_data: Path, room: Path, data, task: str, labelled: bool, strict: bool) -> None:
        name = TASKS[task].files["dev"]
        sound = (small_data / name).read_bytes()
        cells = st.lists(TEXTS, min_size=1, max_size=6).map("\t".join)
        tables = st.lists(cells, max_size=5).map("\n".join).map(lambda t: t.encode("utf-8", "surrogatepass"))
        header = sound.split(b"\n", 1)[0] + b"\n"
        content = data.draw(
            st.one_of(damaged(sound), tables, tables.map(header.__add__), st.binary(max_size=99))
        )
        path = rewritten(room / name, content)
        found = read_or_refused(lambda: read_examples(path, TASKS[task], labelled, strict))
        if found is not None:
            examples, _ = found
            low, high = TASKS[task].label_range
            assert len({example.id for example in examples}) == len(examples)
            assert all(low <= e.label <= high for e in examples if e.label is not None)
            assert all(all(e.texts) and len(e.texts) == len(TASKS[task].text_columns) for e in examples)
            assert not labelled or all(e.label is not None for e in examples)

    @hostile
    @given(content=st.one_of(st.binary(max_size=99), TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass"))))
    def test_lines(self, room: Path, content: bytes) -> None:
        read_or_refused(lambda: read_lines(rewritten(room / "texts.txt", content)))


class TestModels:
    @hostile
    @given(data=st.data())
    def test_config(self, tiny: Path, room: Path, data) -> None:
        rewritten(room / "config.json", data.draw(json_files(read_json(tiny / "config.json"))))
        found = read_or_refused(lambda: read_config(room))
        assert found is None or found.hidden_size % found.num_attention_heads == 0

    @hostile
    @given(data=st.data())
    def test_weights(self, tiny: Path, room: Path, data) -> None:
        folder = room / "weights"
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        sound = (tiny / "model.safetensors").read_bytes()
        rewritten(folder / "model.safetensors", data.draw(safetensors_files(sound)))
        found = read_or_refused(lambda: load_bert(folder))
        if found is not None:
            assert found.embeddings.word_embeddings.weight.shape == (TINY.vocab_size, TINY.hidden_size)

    @hostile
    @given(data=st.data())
    def test_a_list_of_shards(self, tiny: Path, room: Path, data) -> None:
        folder = room / "shards"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(tiny / "model.safetensors", folder / "part-1.safetensors")
        shutil.copyfile(tiny / "model.safetensors", room / "outside.safetensors")
        sound = {"metadata": {}, "weight_map": {"a": "part-1.safetensors", "b": "../outside.safetensors"}}
        rewritten(folder / "model.safetensors.index.json", data.draw(json_files(sound)))
        read_or_refused(lambda: read_checkpoint(folder))

    @hostile
    @given(data=st.data(), text=TEXTS)
    def test_tokenizer(self, tiny: Path, room: Path, data, text: str) -> None:
        rewritten(room / "tokenizer.json", data.draw(json_files(read_json(tiny / "tokenizer.json"))))
        found = read_or_refused(lambda: Tokenizer(room, 16, TINY.vocab_size))
        if found is not None:
            text = text.encode("utf-8", "replace").decode()
            (encoded,) = read_or_refused(lambda: found([(text, text)])) or [None]
            if encoded is not None:
                assert len(encoded.input_ids) == len(encoded.token_type_ids) <= 16
                assert all(0 <= one < TINY.vocab_size for one in encoded.input_ids)


class TestAdapters:
    @hostile
    @given(data=st.data())
    def test_config(self, finished: Path, room: Path, data) -> None:
        sound = read_json(finished / "adapter" / "adapter_config.json")
        path = rewritten(room / "adapter_config.json", data.draw(json_files(sound)))
        found = read_or_refused(lambda: read_adapter_config(path))
        assert found is None or (found.rank >= 1 and math.isfinite(found.alpha))

    @hostile
    @given(data=st.data(), both=st.booleans())
    def test_weights(self, tiny: Path, finished: Path, room: Path, data, both: bool) -> None:
        folder = room / "adapter"
        shutil.copytree(finished / "adapter", folder, dirs_exist_ok=True)
        weights = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
        rewritten(folder / "adapter_model.safetensors", data.draw(safetensors_files(weights)))
        if both:
            sound = read_json(finished / "adapter" / "adapter_config.json")
            rewritten(folder / "adapter_config.json", data.draw(changed(sound).map(json.dumps)).encode())
        bert = load_bert(tiny)
        before = [name for name, _ in bert.named_parameters()]
        if read_or_refused(lambda: load_adapter(bert, folder) or True) is None:
            assert [name for name, _ in bert.named_parameters()] == before

    @hostile
    @given(data=st.data())
    def test_card(self, finished: Path, room: Path, data) -> None:
        rewritten(
            room / "minibert.json", data.draw(json_files(read_json(finished / "adapter" / "minibert.json")))
        )
        read_or_refused(lambda: read_card(room))


class TestRuns:
    @hostile
    @given(data=st.data())
    def test_config(self, finished: Path, room: Path, data) -> None:
        rewritten(room / "config.json", data.draw(json_files(read_json(finished / "config.json"))))
        found = read_or_refused(lambda: read_run_config(RunFolder(room)))
        assert found is None or isinstance(found, Config)

    @hostile
    @given(data=st.data(), name=st.sampled_from(["config.json", "result.json", "metrics.jsonl"]))
    def test_what_a_report_reads(self, finished: Path, room: Path, data, name: str) -> None:
        folder = room / "listed"
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        if name == "metrics.jsonl":
            sound = (finished / name).read_bytes()
            line = json.loads(sound.splitlines()[0])
            content = data.draw(
                st.one_of(damaged(sound), changed(line).map(lambda v: json.dumps(v).encode() + b"\n"))
            )
        else:
            content = data.draw(json_files(read_json(finished / name)))
        rewritten(folder / name, content)
        runs, left_out = read_or_refused(lambda: read_runs([folder]))
        assert len(runs) + len(left_out) == 1
        assert all(isinstance(run.result["dev"], float | int) for run in runs)

    @hostile
    @given(data=st.data())
    def test_predictions(self, finished: Path, room: Path, data) -> None:
        sound = (finished / "predictions-dev.csv").read_bytes()
        cells = st.lists(TEXTS, max_size=8).map(",".join)
        tables = st.lists(cells, max_size=5).map("\n".join).map(lambda t: t.encode("utf-8", "surrogatepass"))
        path = rewritten(room / "predictions-dev.csv", data.draw(st.one_of(damaged(sound), tables)))
        found = read_or_refused(lambda: read_rows(path, TASKS["sst"]))
        assert found is None or all(math.isfinite(v) for row in found.values() for v in row)

    @hostile
    @given(data=st.data())
    def test_checkpoints(self, killed: Path, trainer: Trainer, room: Path, data) -> None:
        sound = max((killed / "checkpoint").glob("step-*"))
        content = data.draw(safetensors_files(sound.read_bytes()))
        path = rewritten(room / "state.safetensors", content)
        read_or_refused(lambda: made_with(path))
        read_or_refused(
            lambda: load_checkpoint(room, trainer.model, trainer.optimizer, trainer.scaler, path.name)
        )

    @hostile
    @given(data=st.data(), name=st.sampled_from(["adapter/minibert.json", "head.safetensors", "config.json"]))
    def test_a_run_to_predict_with(self, finished: Path, room: Path, data, name: str) -> None:
        folder = room / "whole"
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        sound = (finished / name).read_bytes()
        files = safetensors_files(sound) if name.endswith("safetensors") else json_files(json.loads(sound))
        rewritten(folder / name, data.draw(files))
        read_or_refused(lambda: load_run(folder))

    @hostile
    @given(data=st.data())
    def test_results(self, finished: Path, room: Path, data) -> None:
        folder = room / "scored"
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        rewritten(folder / "result.json", data.draw(json_files(read_json(finished / "result.json"))))
        read_or_refused(lambda: read_scored(folder))
        read_or_refused(lambda: check_unchanged(folder, read_run_config(RunFolder(folder))))

    @hostile
    @given(data=st.data())
    def test_logs_of_benchmarks(self, room: Path, data) -> None:
        about = {"model": "tiny", "machine": {"cores": 2}}
        lines = [about, {"round": 0, "name": "a", "measured": {"seconds": 1.0}}]
        sound = "".join(json.dumps(line) + "\n" for line in lines).encode()
        files = st.one_of(
            damaged(sound), changed(lines).map(lambda v: "\n".join(map(json.dumps, v)).encode())
        )
        read_or_refused(lambda: Log(rewritten(room / "log.jsonl", data.draw(files)), about))


GRID = """task = "sts"
epochs = 2
[axes]
seed = [0, 1]
[[grid]]
method = ["lora", "dora"]
rank = [1, 4]
targets = ["all", "query+value"]
[[grid]]
method = "full"
lr = {low = 1e-5, high = 1e-3, log = true}
"""
NAMES = [one.name for one in fields(Config)]
WORDS = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in NAMES]),
    st.sampled_from(["sts", "sst+qqp", "lora", "dora", "full", "1", "0.5", "1e-3", "all", "siamese",
                     "query=4", "sts=.5", "per-task", "--out", "--resume", "--profile"]),
    TEXTS,
)  # fmt: skip


class TestSettings:
    @hostile
    @given(
        content=st.one_of(
            damaged(GRID.encode()), st.binary(max_size=60), TEXTS.map(lambda t: t.encode("utf-8", "replace"))
        )
    )
    def test_grid_files(self, room: Path, content: bytes) -> None:
        path = rewritten(room / "grid.toml", content)
        read_or_refused(lambda: make_cells(read_table(path), str(path)))

    @hostile
    @given(data=st.data())
    def test_grids(self, data) -> None:
        sound = {"task": "sts", "axes": {"seed": [0, 1]}, "grid": [{"method": ["lora"], "rank": [1, 2]}],
                 "search": {"sampler": "tpe", "trials": 3}}  # fmt: skip
        table = data.draw(
            st.one_of(changed(sound), st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
        )
        if isinstance(table, dict):
            read_or_refused(lambda: make_cells(table))

    @hostile
    @given(words=st.lists(WORDS, max_size=8))
    def test_flags_of_a_run(self, words: list[str]) -> None:
        read_or_refused(lambda: parse(words))

    @hostile
    @given(words=st.lists(WORDS, max_size=8))
    def test_flags_of_a_grid(self, room: Path, words: list[str]) -> None:
        def cells() -> list:
            given = build_parser().parse_args(["--out", str(room / "runs"), *words])
            return make_cells(overridden({}, given), "flags")

        read_or_refused(cells)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_a_loop_or_a_fifo_in_the_place_of_a_file_is_refused(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    for how in ("folder", "loop", "fifo", "nothing"):
        folder = tmp_path / how
        shutil.copytree(tiny, folder)
        (folder / name).unlink()
        if how == "folder":
            (folder / name).mkdir()
        elif how == "fifo":
            os.mkfifo(folder / name)
        elif how == "loop":
            (folder / name).symlink_to(folder / name)
        assert read_or_refused(lambda at=folder: (load_bert(at), Tokenizer(at, 16, TINY.vocab_size))) is None


def test_a_data_file_that_is_a_fifo_is_refused(tiny: Path, small_data: Path, tmp_path: Path) -> None:
    """It is read twice, for its rows and for its hash, and would hang the second time."""
    data = Path(shutil.copytree(small_data, tmp_path / "data"))
    for split in ("train", "test-student"):
        path = data / FILES["sst"].format(split)
        path.unlink()
        os.mkfifo(path)
        ended = call(train.main, *flags(tiny, data, task="sst", out=tmp_path / "run"))
        assert (ended.code, ended.line) == (2, f"error: {path}: expected a file, got a FIFO")
        path.unlink()
        shutil.copy(small_data / path.name, path)


def test_a_data_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILES["sst"].format("dev")).mkdir()
    path = tmp_path / FILES["sst"].format("dev")
    assert read_or_refused(lambda: read_examples(path, TASKS["sst"], labelled=True)) is None
