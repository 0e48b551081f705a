"""A small model, and as much of the Hugging Face hub as giving it away needs."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMIT = "c" * 40
CONTENT = {
    "config.json": b'{"hidden_size": 8}',
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": b"weights" * 1000,
}
SHA256 = {file: hashlib.sha256(content).hexdigest() for file, content in CONTENT.items()}


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest()


# What the hub gives as hashes: sha256 for what is in large-file storage, git's blob id for the rest.
PUBLISHED = {
    "config.json": git_id(CONTENT["config.json"]),
    "tokenizer.json": git_id(CONTENT["tokenizer.json"]),
    "model.safetensors": SHA256["model.safetensors"],
}


def write(folder: Path, files: dict[str, bytes] = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def visible(cache: Path) -> list[str]:
    """What lies in a cache; locks stay."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


class FakeHub(BaseHTTPRequestHandler):
    """One model, org/tiny, with one branch, main, at one commit."""

    files: dict[str, bytes]
    published: dict[str, str]
    downloads: list[str]
    stall: threading.Event | None = None  # the weights stop halfway until it is set

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/tiny/revision/main", f"/api/models/org/tiny/revision/{COMMIT}"):
            return self.send(200, json.dumps(self.listing()).encode(), {}, body)
        file = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if file not in self.files:
            code = "RevisionNotFound" if "/org/tiny/revision/" in path else "RepoNotFound"
            return self.send(404, b"", {"X-Error-Code": code}, body)
        if body:
            self.downloads.append(file)
        etag = {"ETag": f'"{self.published[file]}"', "X-Repo-Commit": COMMIT}
        return self.send(200, self.files[file], etag, body)

    def listing(self) -> dict:
        siblings = []
        for file, content in self.files.items():
            size, published = len(content), self.published[file]
            sibling = {"rfilename": file, "size": size, "blobId": published}
            if len(published) == 64:
                sibling |= {
                    "blobId": "0" * 40,
                    "lfs": {"sha256": published, "size": size, "pointerSize": 130},
                }
            siblings.append(sibling)
        return {"id": "org/tiny", "sha": COMMIT, "siblings": siblings}

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        half = len(content) // 2
        self.wfile.write(content[:half])
        if self.stall and content == self.files.get("model.safetensors"):
            self.stall.wait(20)
        self.wfile.write(content[half:])

    def log_message(self, *args: object) -> None:
        pass
