"""The rules of the house: who may import whom, and where each foreign library lives."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "split_model", "edge_agent", "cloud_server", "training")
ALLOWED = {
    "protocol": set(),
    "split_model": {"models"},
    "edge_agent": {"protocol", "split_model"},
    "cloud_server": {"protocol", "split_model"},
    "training": {"split_model"},
}
HOMES: dict[str, str | tuple[str, ...]] = {
    "aioquic": "protocol/transport/",
    "grpc": "protocol/transport/grpc",
    "psutil": "edge_agent/conditions.py",
    "uvicorn": ("protocol/http_connections.py", "protocol/http_server.py"),
    "fastapi": (
        "protocol/api.py",
        "protocol/api_errors.py",
        "protocol/http_server.py",
        "protocol/openai.py",
        "protocol/reply.py",
        "edge_agent/app.py",
        "cloud_server/app.py",
    ),
    "pydantic": (
        "protocol/api.py",
        "protocol/api_errors.py",
        "protocol/openai.py",
        "edge_agent/app.py",
        "edge_agent/replay.py",
        "cloud_server/app.py",
    ),
    "google": ("protocol/frames.py", "protocol/split_pb2.py"),
    "transformers": "training/",
    "huggingface_hub": "split_model/source.py",
    "jinja2": "split_model/render.py",
    "tokenizers": ("split_model/tokenizer", "training/"),
    "jwt": ("cloud_server/tokens.py", "cloud_server/trusted.py"),
}
TOP = {
    "edge_agent", "cloud_server", "protocol", "deploy", "tests", "docker-compose.yml", "pyproject.toml", "split_model",
    "training", "models", "benchmarks", "docs", "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt",
}  # fmt: skip


def imports() -> Iterator[tuple[str, str]]:
    """(file, imported module) for every import in the packages."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module]
                for name in names:
                    yield str(path.relative_to(ROOT)), name


def test_programs_never_import_each_other_and_libraries_neither() -> None:
    for file, name in imports():
        package, target = file.split("/")[0], name.split(".")[0]
        if target in (*PACKAGES, "models") and target != package:
            assert target in ALLOWED[package], f"{file} imports {name}"


def test_each_foreign_library_has_one_home() -> None:
    for file, name in imports():
        home = HOMES.get(name.split(".")[0])
        if home is not None:
            assert file.startswith(home), f"{file} imports {name}"


def test_torch_stays_out_of_the_protocol_but_for_the_tensor_codec() -> None:
    for file, name in imports():
        if file.startswith("protocol/") and name.split(".")[0] == "torch":
            assert file == "protocol/tensor.py"


def test_the_top_level_is_fixed() -> None:
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - {"build"} - {name for name in found if name.endswith(".egg-info")} <= TOP
