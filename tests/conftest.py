"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloud_server import keys

torch.set_num_threads(1)  # small models gain nothing from a second, and waiting for it costs much on a busy machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=None, help="folder of dialogues (see training/data.py)")
    parser.addoption("--compose", action="store_true", help="run docker-compose.yml for real")
    parser.addoption("--netem", action="store_true", help="all profiles, routes and events of tests/netem")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def key_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a server on loopback. Shared: a test that changes keys makes its own."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    keys.make(folder, ["localhost", "127.0.0.1"])
    return folder
