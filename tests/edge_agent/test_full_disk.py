"""A disk that is full: told before the start; while the agent runs, it goes on without tickets and says so once."""

from __future__ import annotations

import contextlib
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import running
from edge_agent.__main__ import main
from edge_agent.config import AgentConfig
from edge_agent.server import serving
from support.edge import checkpoints

ASK = {"model": "tandem", "prompt": "the table", "max_tokens": 4, "temperature": 0, "plan": {"route": "cloud"}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def start(capsys: pytest.CaptureFixture[str], state: Path) -> str:
    tiny, full = checkpoints()
    capsys.readouterr()
    given = ("serve", "--no-cloud", "--tiny", tiny, "--full", full, "--port", 0, "--state", state)
    assert main([str(one) for one in given]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_full_disk_is_told_before_the_start(capsys: pytest.CaptureFixture[str], disk: Path) -> None:
    fill(disk)
    said = start(capsys, disk / "state")
    assert f"{disk / 'state'}: tickets and measurements cannot be kept: No space left on device" in said


def test_so_is_a_folder_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "file/state: tickets and measurements cannot be kept: Not a directory" in start(
        capsys, tmp_path / "file" / "state"
    )


@pytest.mark.anyio
async def test_a_disk_that_fills_up_ends_nothing(
    disk: Path, key_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny, full = checkpoints()
    cloud = ServerConfig(full, port=0, http_port=0, keys=key_folder, threads=1)
    state, ca = disk / "state", (key_folder / "ca.pem").read_bytes()
    caplog.set_level(logging.WARNING)
    async with running(cloud) as server:
        config = AgentConfig(
            tiny, full, clouds=(server.address,), port=0, ca=ca, token=keys.issue(key_folder, "phone", 60), state=state,
            edge_layers=0, threads=1,
        )  # fmt: skip
        async with serving(config) as agent, httpx.AsyncClient(base_url=f"http://{agent.address}", timeout=60) as http:
            assert (await http.post("/v1/completions", json=ASK)).status_code == 200
            link = agent.agent.means.links.links[0]
            for _ in range(3):  # each handshake brings a ticket
                assert link.dialler.connection is not None
                await link.drop(link.dialler.connection)
                for path in (state / "tickets").iterdir():
                    path.unlink()
                fill(disk)
                answer = await http.post("/v1/completions", json=ASK)
                assert answer.status_code == 200
                assert answer.json()["plan"]["route"] == "cloud"
    told = [record.getMessage() for record in caplog.records]
    assert len([one for one in told if "tickets are not kept, going on without: No space left" in one]) == 1
    assert len([one for one in told if "cannot be written" in one]) <= 1
    assert not [path for path in (state / "tickets").iterdir() if path.suffix != ".json"]
