"""Names of models: directories, the built-in pair, and the hub, which here is a server and a cache made by the test."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import cloud_server.__main__ as cloud_server
import edge_agent.__main__ as edge_agent
from split_model.config import ModelConfig, ModelError
from split_model.runner import Runner
from split_model.source import find_model
from support.checkpoints import checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {"gated": (403, "GatedRepo"), "gone": (401, "RepoNotFound"), "broken": (500, "")}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: `org/tiny` with all kinds of files, and names that are refused."""

    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    unwanted = ("pytorch_model.bin", "model-q8.gguf", "onnx/model.safetensors", "consolidated.safetensors", "README.md")

    def do_GET(self) -> None:
        organisation, name = self.path.removeprefix("/api/models").split("/")[1:3]
        name, revision = name.split("?")[0], self.path.split("/revision/")[-1]
        if name in REFUSED or (organisation == "org" and name != "tiny"):
            status, code = REFUSED.get(name, (404, "RepoNotFound"))
            return self.answer(b"{}", status, **{"X-Error-Code": code, "X-Error-Message": "a reason\nin two lines"})
        if "/resolve/" in self.path:
            return self.send_file(self.path.split(f"/{COMMIT}/")[1])
        if "/tree/" in self.path:
            found = [{"type": "file", "path": path, "size": self.size(path), "oid": str(at)}
                     for at, path in enumerate((*self.files, *self.unwanted))]  # fmt: skip
            return self.answer(json.dumps(found).encode())
        if "/revision/" in self.path and revision not in ("main", "v1", COMMIT):
            return self.answer(b"{}", 404, **{"X-Error-Code": "RevisionNotFound"})
        return self.answer(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode())

    do_HEAD = do_GET

    def size(self, name: str) -> int:
        return (checkpoint() / name).stat().st_size if name in self.files else 9

    def send_file(self, name: str) -> None:
        assert name in self.files, f"{name} was asked for"
        self.answer((checkpoint() / name).read_bytes(), **{"ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value.replace("\n", " "))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    checkpoint()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


def prepared(cache: Path, name: str = "org/tiny") -> Path:
    """A snapshot as the hub's library keeps it: names that point at blobs."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for folder in (place / "refs", place / "blobs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(Hub.files):
        shutil.copy(checkpoint() / file, place / "blobs" / str(number))
        (snapshot / file).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def refusal(name: str) -> str:
    with pytest.raises(ModelError) as refused:
        find_model(name)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"{name}: ")
    return str(refused.value)


def test_a_model_in_the_cache_needs_no_network(cache: Path) -> None:
    snapshot = prepared(cache)
    assert find_model("org/tiny") == find_model(f"org/tiny@{COMMIT}") == find_model("org/tiny@main") == snapshot
    assert ModelConfig.read(snapshot).name == "tiny"
    assert Runner("org/tiny").generate("a table", max_tokens=4).ids


def test_both_programs_take_the_hubs_names(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared(cache)
    (prepared(cache, "org/other") / "model.safetensors").unlink()  # which they say, and end
    for main, arguments in (
        (edge_agent.main, ("serve", "--no-cloud", "--state", tmp_path, "--tiny", "org/tiny", "--full", "org/other")),
        (cloud_server.main, ("serve", "--http-port", 0, "--model", "org/other", "--tiny", "org/tiny")),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert "models--org--other" in (said := capsys.readouterr().err.splitlines()[-1])
        assert "model.safetensors: no such file" in said


def test_a_download_takes_what_is_needed_and_stays(hub: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find_model("org/tiny")
    assert {path.name for path in folder.iterdir()} == set(Hub.files)
    assert (folder / "model.safetensors").read_bytes() == (checkpoint() / "model.safetensors").read_bytes()
    assert find_model("org/tiny@v1") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/tiny") == folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/gone", "nor on the hub; a private one needs `hf auth login`"),
        ("org/unknown", "nor on the hub; a private one needs `hf auth login`"),
        ("org/gated", "gated: accept its terms on http://127.0.0.1:[0-9]+/org/gated, then log in"),
        ("org/tiny@v7", "no revision 'v7' of it"),
        ("org/broken", "the hub did not answer"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line_with_what_to_do(hub: str, name: str, words: str) -> None:
    assert re.search(words, refusal(name))


def test_without_the_network_it_says_what_is_missing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"not whole in the cache {cache}, and HF_HUB_OFFLINE forbids" in refusal("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert f"not whole in the cache {cache}, and the hub did not answer" in refusal("org/tiny")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "../nowhere", "/nowhere/at", "org/tiny@", "org/a b", "~/model"])
def test_what_can_be_no_name_on_the_hub_is_not_asked_for(cache: Path, name: str) -> None:
    assert "neither a directory nor a built-in model, nor a hub's id (org/name[@revision])" in refusal(name)


def test_an_id_that_the_hub_forbids_is_said(cache: Path) -> None:
    assert "nor an id that the hub allows" in refusal("org/a--b")


def test_a_full_disk_is_said(hub: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert f"no space left for it in {cache}" in refusal("org/tiny")
