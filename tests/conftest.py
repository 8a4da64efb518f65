"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small models gain nothing from a second, and waiting for it costs much on a busy machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=None, help="folder of dialogues (see training/data.py)")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
