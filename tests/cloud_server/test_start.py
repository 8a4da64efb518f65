"""A cloud server that cannot start says why: one line that names the thing, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cloud_server.__main__ import main
from support.checkpoints import checkpoint, save_tokenizer

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "keys"
    assert main(["keys", "--keys", str(folder), "--name", "127.0.0.1"]) == 0
    checkpoint()  # before what is printed is listened to: making it prints too
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    threads = threading.active_count()
    assert main([str(one) for one in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cloud-server: ")
    assert said.count("\n") == 1, said
    assert threading.active_count() <= threads
    return said


def serve(model: Path, keys: Path, port: int = 0, http_port: int = 0) -> tuple[object, ...]:
    return (
        "serve", "--host", "127.0.0.1", "--model", model, "--keys", keys, "--port", port, "--http-port", http_port,
        "--threads", 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nowhere"), "nowhere: neither a directory nor a built-in model"),
        (("--keys", "/nowhere"), "/nowhere"),
        (("--slots", "0"), "--slots 0, must be at least 1"),
        (("--retry-above", "-1"), "--retry-above -1, must be at least 0"),
        (("--handshakes-per-prefix", "0"), "--handshakes-per-prefix 0, must be more than 0"),
        (("--drain", "-1"), "--drain -1, must be 0 to"),
        (("--port", "70000"), "--port 70000, must be 0 to 65535"),
    ],
    ids=" ".join,
)
def test_a_wrong_argument(
    capsys: pytest.CaptureFixture[str], keys: Path, arguments: tuple[str, str], words: str
) -> None:
    assert words in refused(capsys, *serve(checkpoint(), keys), *arguments)


def truncated(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])


def header_cut(folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:40])


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 16)


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS)


def tensor_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, folder / WEIGHTS)


def shard_missing(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def folder_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def config_broken(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": ')


def tokenizer_broken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def weights_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, WEIGHTS),
        (header_cut, WEIGHTS),
        (garbage, WEIGHTS),
        (empty, WEIGHTS),
        (weights_a_folder, WEIGHTS),
        (tensor_missing, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (tensor_of_another_shape, "model.norm.weight has shape (63,), the config says (64,)"),
        (shard_missing, "model-00001-of-00002.safetensors: no such file"),
        (folder_empty, "tokenizer.json"),
        (config_broken, "config.json"),
        (tokenizer_broken, "tokenizer.json"),
    ],
)
def test_a_model_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], keys: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    spoil(folder)
    said = refused(capsys, *serve(folder, keys))
    assert str(folder) in said
    assert words in said


def test_a_tiny_model_of_another_tokenizer(capsys: pytest.CaptureFixture[str], keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    save_tokenizer(folder, 280)
    said = refused(capsys, *serve(checkpoint(), keys), "--tiny", folder)
    assert f"--tiny {folder}: its tokenizer is not that of tiny-llama" in said
    assert "nowhere: neither" in refused(capsys, *serve(checkpoint(), keys), "--tiny", "nowhere")


def not_a_key(path: Path) -> None:
    path.write_text("-----BEGIN PRIVATE KEY-----\nnothing\n-----END PRIVATE KEY-----\n")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [not_a_key, a_folder, Path.unlink])
@pytest.mark.parametrize("name", ["server.key", "server.pem", "signing"])
def test_keys_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], keys: Path, tmp_path: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(keys, folder)
    file = next((folder / name).iterdir()) if (folder / name).is_dir() else folder / name
    spoil(file)
    said = refused(capsys, *serve(checkpoint(), folder))
    assert str(file if spoil is not Path.unlink else file.parent) in said


def test_a_key_that_is_not_the_certificate_s(capsys: pytest.CaptureFixture[str], keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    shutil.copytree(keys, folder)
    shutil.copy(folder / "ca.key", folder / "server.key")
    assert "server.key does not go with" in refused(capsys, *serve(checkpoint(), folder))


@pytest.mark.parametrize("kind", ["http", "TCP", "UDP"])
def test_a_port_in_use_is_named_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], keys: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    truncated(folder)  # would be found too
    with socket.socket(type=socket.SOCK_DGRAM if kind == "UDP" else socket.SOCK_STREAM) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind != "UDP":
            taken.listen()
        port = taken.getsockname()[1]
        ports = {"http_port": port} if kind == "http" else {"port": port}
        said = refused(capsys, *serve(folder, keys, **ports))
    assert f"127.0.0.1:{port}: Address already in use" in said
    assert kind in said or kind == "http"
