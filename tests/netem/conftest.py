"""One link for all tests, with the programs at its ends. Where it cannot be made, they are skipped with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.netem import Agent, Ends, Link, NoLink
from support.programs import Program


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "whole_netem: only with --netem, or `make test-netem`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [] if config.getoption("--netem") else [one for one in items if one.get_closest_marker("whole_netem")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [one for one in items if one not in left_out]


@pytest.fixture(scope="session")
def link() -> Iterator[Link]:
    """Each test says what it is like: `use`."""
    try:
        link = Link()
    except NoLink as reason:
        pytest.skip(str(reason))
    try:
        yield link
    finally:
        link.down()


@pytest.fixture(scope="session")
def ends(link: Link, tmp_path_factory: pytest.TempPathFactory) -> Ends:
    return Ends.on(link, tmp_path_factory.mktemp("ends"))


@pytest.fixture(scope="session")
def cloud(ends: Ends) -> Iterator[Program]:
    with ends.cloud() as running:
        yield running


@pytest.fixture(scope="module")
def steady_agent(ends: Ends, cloud: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """For tests that leave it no worse."""
    with ends.agent(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture
def agent(link: Link, ends: Ends, cloud: Program, tmp_path: Path) -> Iterator[Agent]:
    """A new one, that knows nothing of the network."""
    link.use("wifi")
    with ends.agent(tmp_path / "state") as running:
        yield running
