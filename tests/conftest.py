"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, default=None, help="folder of dialogues (see training/data.py)")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
