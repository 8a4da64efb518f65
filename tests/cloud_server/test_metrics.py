"""What /metrics says after real sessions, over real transports."""

from __future__ import annotations

import os
import ssl
import time
from pathlib import Path

import httpx
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer, running
from protocol.errors import FaultCode, SessionFault
from protocol.transport.base import Connection, Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from protocol.transport.tickets import TicketStore
from support.checkpoints import checkpoint
from support.phone import Phone

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))


class Scraped:
    """The numbers of /metrics, by name and some of the labels."""

    def __init__(self, text: str):
        self._lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]

    def __call__(self, name: str, **labels: object) -> float:
        """The sum over the labels that are not given."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(value)
            for series, value in self._lines
            if series.partition("{")[0] == name and all(one in series for one in wanted)
        )


async def scraped(server: CloudServer, key_folder: Path) -> Scraped:
    verify = ssl.create_default_context(cafile=str(key_folder / "ca.pem"))
    async with httpx.AsyncClient(base_url=f"https://{server.http}", verify=verify) as http:
        body = {"model": "tiny-llama", "prompt": "the table", "max_tokens": 3}
        headers = {"authorization": f"Bearer {keys.issue(key_folder, 'tester', 60)}"}
        assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json=body)).status_code == 401
        return Scraped((await http.get("/metrics")).text)


async def test_sessions_are_counted_by_route_entry_transport_fault_and_bytes(key_folder: Path) -> None:
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=key_folder, slots=4, threads=1)
    phone, token, trust = (
        Phone(checkpoint()),
        keys.issue(key_folder, "phone", 60),
        Trust((key_folder / "ca.pem").read_bytes()),
    )
    async with running(config) as server:
        before = await scraped(server, key_folder)
        for connect in (connect_quic, connect_grpc):
            connection: Connection = await connect(server.address, trust)
            await connection.handshake()
            await phone.ask(connection, PROMPT, token=token)
            await phone.ask(connection, PROMPT, split=2, token=token)
            with pytest.raises(SessionFault):
                await phone.ask(connection, PROMPT, token="nothing")
            await connection.aclose()
        after = await scraped(server, key_folder)

    def grew(name: str, **labels: object) -> float:
        return after(name, **labels) - before(name, **labels)

    assert grew("tandem_sessions_total", route="cloud", outcome="done") == 2
    assert grew("tandem_sessions_total", route="split", outcome="done") == 2
    assert grew("tandem_sessions_total", route="http", outcome="done") == 1
    assert grew("tandem_faults_total", code="unauthenticated") == 2
    assert grew("tandem_rows_total", entry=2) == 16  # a prompt in one chunk, and seven tokens, twice
    assert grew("tandem_rows_total", entry=0) == 19
    assert grew("vllm:generation_tokens_total") == 4 * 8 + 3
    assert grew("vllm:request_success_total", finished_reason="length") == 5
    assert grew("vllm:request_queue_time_seconds_count") == grew("vllm:e2e_request_latency_seconds_count") == 5
    assert grew("tandem_step_seconds_count") == grew("vllm:iteration_tokens_total_count") > 0
    assert grew("http_requests_total", handler="/v1/completions", status="2xx", method="POST") == 1
    assert grew("http_requests_total", status="4xx") == 1
    assert after("vllm:kv_cache_usage_perc") == after("vllm:num_requests_waiting") == after("tandem_draining") == 0
    assert grew("tandem_rtt_seconds_count") == 3  # gRPC measures none
    for transport in ("quic", "grpc"):
        assert grew("tandem_channels_total", transport=transport) == 3
        assert grew("tandem_bytes_total", transport=transport, direction="in") > 50 * 64 * 2  # hidden states
        assert 100 < grew("tandem_bytes_total", transport=transport, direction="out") < 5000
    assert after("process_resident_memory_bytes") > 1e7
    assert after("process_open_fds") > 3
    assert after("tandem_certificate_expiry_timestamp_seconds") > time.time() + 800 * 86_400


async def test_early_data_is_counted_by_what_became_of_it(key_folder: Path, tmp_path: Path) -> None:
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=key_folder, threads=1)
    phone, token, trust = (
        Phone(checkpoint()),
        keys.issue(key_folder, "phone", 60),
        Trust((key_folder / "ca.pem").read_bytes()),
    )
    tickets, name = TicketStore(tmp_path / "tickets"), os.urandom(16)

    async def ask(request_id: bytes) -> bool:
        connection = await connect_quic(server.address, trust, tickets)
        try:
            age = connection.ticket_age_s
            heard = await phone.ask(connection, PROMPT, token=token, request_id=request_id, ticket_age_s=age)
            await connection.handshake()
            return heard.admitted.early
        finally:
            await connection.aclose()

    async with running(config) as server:
        assert not await ask(name)
        kept = {path: path.read_bytes() for path in tickets.folder.iterdir()}
        assert await ask(os.urandom(16))
        with pytest.raises(SessionFault) as refused:
            await ask(name)
        assert refused.value.code is FaultCode.REPLAYED
        for path in tickets.folder.iterdir():
            path.unlink()
        for path, content in kept.items():  # used before
            path.write_bytes(content)
        assert not await ask(os.urandom(16))
        after = await scraped(server, key_folder)
    counts = {result: after("tandem_early_data_total", result=result) for result in ("accepted", "replayed", "refused")}
    assert counts == {"accepted": 1, "replayed": 1, "refused": 1}
