"""Who gets in, over HTTPS, QUIC and gRPC; what is refused changes nobody else's text and leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import jwt
import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.quota import Quota
from cloud_server.server import CloudServer, running
from cloud_server.tokens import Signer, Trusted, Verifier
from protocol.errors import FaultCode, SessionFault
from protocol.frames import Admitted, Done, Fault, ServerFrame, Tokens
from protocol.transport.base import ClientChannel, Connection, Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from split_model.sampling import Sampling
from support.bystander import unharmed
from support.checkpoints import checkpoint
from support.eventually import eventually
from support.forgery import FORGERIES, Forger
from support.phone import Phone, expected
from support.relay import UdpRelay
from support.tickets import WatchedStore, visit

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
BODY = {"model": "tiny-llama", "prompt": "the table", "max_tokens": 4, "temperature": 1, "seed": 2}
SAMPLED = Sampling(0.8, seed=3)
NEVER = 600  # answer tokens: far more than any of these tests waits for


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Keys of this test's own."""
    keys.make(tmp_path / "keys", ["localhost", "127.0.0.1"])
    return tmp_path / "keys"


@asynccontextmanager
async def serving(folder: Path, **quota: int) -> AsyncIterator[CloudServer]:
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=folder, slots=4, threads=1, quota=Quota(**quota))
    async with running(config) as server:
        yield server


@asynccontextmanager
async def wires(server: CloudServer, folder: Path) -> AsyncIterator[dict[str, Connection]]:
    trust = Trust((folder / "ca.pem").read_bytes())
    connections: dict[str, Connection] = {}
    try:
        connections["quic"] = await connect_quic(server.address, trust)
        connections["grpc"] = await connect_grpc(server.address, trust)
        yield connections
    finally:
        for connection in connections.values():
            await connection.aclose()


@asynccontextmanager
async def https(server: CloudServer, folder: Path, token: str = "") -> AsyncIterator[httpx.AsyncClient]:
    trust = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    headers = {"authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=f"https://{server.http}", verify=trust, headers=headers) as client:
        yield client


async def until(channel: ClientChannel, kind: type[ServerFrame]) -> ServerFrame:
    while not isinstance(frame := await channel.receive(), kind):
        assert not isinstance(frame, Fault | Done), frame
    return frame


async def held(server: CloudServer) -> tuple[int, ...]:
    """What sessions take, now; the compute thread had a moment to give back what it was asked to."""
    await asyncio.sleep(0.005)
    service = server.service
    load = service.worker.load
    return service.rooms.taken, len(service._rows), load.running, load.waiting, len(service.quotas)


async def vacated(server: CloudServer) -> None:
    """Everything that sessions take is back."""
    async with asyncio.timeout(60):
        while any((await held(server))[:4]):
            pass


def signer(folder: Path) -> Signer:
    found = keys.read(folder).signer
    assert found is not None
    return found


async def test_no_bad_token_gets_in_anywhere_or_disturbs_anyone(phone: Phone, folder: Path) -> None:
    forger, good = Forger(signer(folder)), keys.issue(folder, "honest")
    async with serving(folder) as server, wires(server, folder) as connections, https(server, folder) as client:

        async def session() -> tuple[int, ...]:
            assert (await client.get("/v1/models", headers={"authorization": f"Bearer {good}"})).status_code == 200
            await phone.ask(connections["grpc"], PROMPT, token=good, max_tokens=2)
            return (await phone.ask(connections["quic"], PROMPT, token=good, sampling=SAMPLED)).ids

        async with unharmed(session, lambda: held(server)):
            for name in FORGERIES:
                token, words = forger.make(name)
                headers = {"authorization": b"Bearer " + token.encode()} if token else {}
                for path in ("/v1/completions", "/v1/token"):
                    got = await client.post(path, json=BODY, headers=headers)
                    assert got.status_code == 401, name
                    error = got.json()["error"]
                    assert error["type"] == "authentication_error", name
                    assert words in error["message"], name
                for connection in connections.values():
                    with pytest.raises(SessionFault) as refused:
                        await phone.ask(connection, PROMPT, token=token)
                    long = name == "8 KB"  # too long for a frame to say
                    assert refused.value.code is (FaultCode.BAD_FRAME if long else FaultCode.UNAUTHENTICATED), name
                    assert ("limit 4096" if long else words) in refused.value.message, name
        assert await session() == expected(checkpoint(), PROMPT, SAMPLED, 8)


async def test_a_flood_of_unknown_kids_costs_look_ups_only(phone: Phone, folder: Path) -> None:
    good = keys.issue(folder, "honest")
    flood = [Forger(signer(folder)).unknown_kid(f"kid-{n}") for n in range(100)]
    async with serving(folder) as server, wires(server, folder) as connections:
        verifier = server.service.verifier
        assert verifier is not None
        trusted = verifier.trusted

        async def session() -> tuple[int, ...]:
            return (await phone.ask(connections["grpc"], PROMPT, token=good, sampling=SAMPLED)).ids

        async def refused(token: str) -> None:
            with pytest.raises(SessionFault, match="unknown key"):
                await phone.ask(connections["grpc"], PROMPT, token=token)

        async with unharmed(session, lambda: held(server)):
            await asyncio.gather(*(refused(token) for token in flood))
        began, alone = time.perf_counter(), Verifier(trusted)
        for token in flood * 10:
            with pytest.raises(SessionFault):
                alone.verify(token)
        assert time.perf_counter() - began < 5  # a thousand, which take some 20 ms on a quiet machine


async def test_a_scope_that_lacks_is_named(phone: Phone, folder: Path) -> None:
    admin, plain = keys.issue(folder, "ops", scopes=["admin"]), keys.issue(folder, "phone")
    async with serving(folder) as server, wires(server, folder) as connections, https(server, folder) as client:
        for method, path, token, scope in (
            ("POST", "/v1/completions", admin, "generate"), ("GET", "/v1/models", admin, "generate"),
            ("POST", "/admin/drain", plain, "admin"),
        ):  # fmt: skip
            got = await client.request(method, path, json=BODY, headers={"authorization": f"Bearer {token}"})
            assert got.status_code == 403
            assert f"lacks the scope '{scope}'" in got.json()["error"]["message"]
        with pytest.raises(SessionFault, match="'ops' lacks the scope 'generate'") as refused:
            await phone.ask(connections["quic"], PROMPT, token=admin)
        assert refused.value.code is FaultCode.UNAUTHENTICATED


async def test_a_token_is_renewed_for_the_same_device_and_scopes_and_no_longer_than_configured(folder: Path) -> None:
    first = keys.issue(folder, "phone", 86_400, ["generate", "admin"])
    async with serving(folder) as server, https(server, folder, first) as client:
        got = await client.post("/v1/token")
        assert got.status_code == 200
        answer = got.json()
        assert (answer["token_type"], answer["expires_in"], answer["scope"]) == ("Bearer", 900, "admin generate")
        before, after = (server.service.caller(token) for token in (first, answer["access_token"]))
        assert dataclasses.replace(after, expires=0) == dataclasses.replace(before, expires=0)
        assert after.expires <= time.time() + 900
        again = await client.post("/v1/token", headers={"authorization": f"Bearer {answer['access_token']}"})
        assert again.status_code == 200


async def test_a_session_whose_token_expires_may_finish_and_the_next_is_refused(phone: Phone, folder: Path) -> None:
    token = keys.issue(folder, "phone")
    async with serving(folder) as server, wires(server, folder) as connections:
        channel = await connections["quic"].open()
        await channel.send(phone.open_frame(PROMPT, token=token, max_tokens=60))
        await until(channel, Admitted)
        verifier = server.service.verifier
        assert verifier is not None
        verifier.take(Trusted({}, {}, None))  # to the server that is what an expired token looks like
        with pytest.raises(SessionFault, match="unauthenticated"):
            await phone.ask(connections["grpc"], PROMPT, token=token)
        done = await until(channel, Done)
        assert isinstance(done, Done)
        assert done.answer_tokens == 60
        await channel.aclose()


async def test_a_revoked_device_is_out_with_all_it_has_running_and_no_other(phone: Phone, folder: Path) -> None:
    lost, other = keys.issue(folder, "lost"), keys.issue(folder, "other")
    async with (
        serving(folder) as server, wires(server, folder) as connections, https(server, folder, lost) as client,
    ):  # fmt: skip
        renewed = (await client.post("/v1/token")).json()["access_token"]
        channel = await connections["quic"].open()
        await channel.send(phone.open_frame(PROMPT, token=renewed, max_tokens=NEVER))
        await until(channel, Tokens)
        neighbour = asyncio.create_task(phone.ask(connections["grpc"], PROMPT, token=other, max_tokens=60))
        async with client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": NEVER, "stream": True}) as text:
            lines = text.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            keys.revoke(folder, "lost")
            assert server.service.verifier is not None
            server.service.verifier.take(keys.read(folder))  # as the background task does every 10 s
            assert "'lost' was revoked" in "".join([line async for line in lines])
        fault = await until(channel, Fault)
        assert isinstance(fault, Fault)
        assert fault.code is FaultCode.UNAUTHENTICATED
        await channel.aclose()
        for token in (lost, renewed):
            got = await client.post("/v1/token", headers={"authorization": f"Bearer {token}"})
            assert got.status_code == 401
            assert "'lost' was revoked" in got.json()["error"]["message"]
        assert (await neighbour).ids == expected(checkpoint(), PROMPT, Sampling(), 60)
        await vacated(server)


async def test_both_doors_share_one_quota_and_name_the_limit_and_the_wait(phone: Phone, folder: Path) -> None:
    token, other = keys.issue(folder, "phone"), keys.issue(folder, "other")
    async with (
        serving(folder, requests=2) as server, wires(server, folder) as connections,
        https(server, folder, token) as client,
    ):  # fmt: skip
        await phone.ask(connections["quic"], PROMPT, token=token)
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        for stream in (False, True):
            got = await client.post("/v1/completions", json=BODY | {"stream": stream})
            assert got.status_code == 429
            assert got.json()["error"]["type"] == "rate_limit_error"
            assert "limit of 2 requests a minute" in got.json()["error"]["message"]
            assert 1 <= int(got.headers["retry-after"]) <= 30
        for connection in connections.values():
            with pytest.raises(SessionFault, match="limit of 2 requests a minute") as refused:
                await phone.ask(connection, PROMPT, token=token)
            assert refused.value.code is FaultCode.QUOTA
            assert 0 < refused.value.retry_after_s <= 30
        heard = await phone.ask(connections["quic"], PROMPT, token=other)
        assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)
        assert (await client.post("/v1/token")).status_code == 200  # else a phone at its limit would lose its token
        await vacated(server)


@pytest.mark.parametrize(
    ("quota", "words"),
    [
        ({"prompt_tokens": 60}, "limit of 60 prompt tokens a minute"),
        ({"output_tokens": 6}, "limit of 6 output tokens a minute"),
    ],
)
async def test_tokens_are_charged_as_they_are_used(
    phone: Phone, folder: Path, quota: dict[str, int], words: str
) -> None:
    token = keys.issue(folder, "phone")
    async with serving(folder, **quota) as server, wires(server, folder) as connections:
        heard = await phone.ask(connections["quic"], PROMPT, token=token)
        assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)
        with pytest.raises(SessionFault, match=words):
            await phone.ask(connections["quic"], PROMPT, token=token)


async def test_open_sessions_are_counted_until_they_end_and_a_take_over_is_none_more(
    phone: Phone, folder: Path
) -> None:
    token, name = keys.issue(folder, "phone"), bytes(16)
    async with serving(folder, sessions=1) as server, wires(server, folder) as connections:
        channel = await connections["quic"].open()
        await channel.send(phone.open_frame(PROMPT, token=token, max_tokens=NEVER, request_id=name))
        await until(channel, Tokens)
        with pytest.raises(SessionFault, match="limit 1"):
            await phone.ask(connections["quic"], PROMPT, token=token)
        heard = await phone.ask(connections["quic"], PROMPT, token=token, request_id=name, attempt=2)
        assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)
        await channel.aclose()
        await vacated(server)
        await phone.ask(connections["quic"], PROMPT, token=token)


async def test_a_replay_costs_nothing(phone: Phone, folder: Path) -> None:
    token, name = keys.issue(folder, "phone"), bytes(16)
    async with serving(folder, requests=2) as server, wires(server, folder) as connections:
        await phone.ask(connections["quic"], PROMPT, token=token, request_id=name)
        for _ in range(5):
            with pytest.raises(SessionFault, match="replayed"):
                await phone.ask(connections["quic"], PROMPT, token=token, request_id=name)
        await phone.ask(connections["quic"], PROMPT, token=token)


@asynccontextmanager
async def early(server: CloudServer, folder: Path, tickets: Path) -> AsyncIterator[tuple[UdpRelay, Connection]]:
    """A connection with a ticket, whose handshake cannot be completed before `relay.down.release()`."""
    trust, store = Trust((folder / "ca.pem").read_bytes()), WatchedStore(tickets)
    async with await UdpRelay.start(server.address) as relay:
        await visit(relay.address, trust, store)
        relay.down.hold()
        connection = await connect_quic(relay.address, trust, store)
        assert connection.ticket_age_s is not None
        try:
            yield relay, connection
        finally:
            await connection.aclose()


async def test_early_data_is_charged_after_the_handshake(phone: Phone, folder: Path, tmp_path: Path) -> None:
    token, quotas = keys.issue(folder, "phone"), None
    async with serving(folder, requests=1, output_tokens=100) as server:
        quotas = server.service.quotas
        async with early(server, folder, tmp_path / "tickets") as (relay, connection):
            channel = await connection.open()
            age = connection.ticket_age_s
            await channel.send(phone.open_frame(PROMPT, token=token, max_tokens=3, ticket_age_s=age))
            await eventually(lambda: server.service.worker.load.steps >= 3)  # the whole answer is computed
            quotas.check("phone", 1)  # nothing has been charged
            relay.down.release()
            done = await until(channel, Done)
            assert isinstance(done, Done)
            assert done.answer_tokens == 3
            with pytest.raises(SessionFault, match="requests a minute"):
                quotas.check("phone", 1)
            await channel.aclose()
        await vacated(server)


async def test_early_data_is_authenticated_at_once(phone: Phone, folder: Path, tmp_path: Path) -> None:
    async with serving(folder) as server, early(server, folder, tmp_path / "tickets") as (relay, connection):
        metrics = server.service.metrics
        channel = await connection.open()
        bad = Forger(signer(folder)).make("forged")[0]
        await channel.send(phone.open_frame(PROMPT, token=bad, ticket_age_s=connection.ticket_age_s))
        await eventually(lambda: 'code="unauthenticated"' in metrics.text().decode())
        relay.down.release()
        fault = await until(channel, Fault)
        assert isinstance(fault, Fault)
        assert fault.code is FaultCode.UNAUTHENTICATED
        await channel.aclose()


async def test_early_requests_of_a_device_at_its_limit_are_refused_at_once(
    phone: Phone, folder: Path, tmp_path: Path
) -> None:
    token = keys.issue(folder, "phone")
    async with serving(folder, requests=1) as server:
        server.service.quotas.enter("phone", 1)
        async with early(server, folder, tmp_path / "tickets") as (relay, connection):
            channel = await connection.open()
            await channel.send(phone.open_frame(PROMPT, token=token, ticket_age_s=connection.ticket_age_s))
            await eventually(lambda: 'code="quota"' in server.service.metrics.text().decode())
            relay.down.release()
            fault = await until(channel, Fault)
            assert isinstance(fault, Fault)
            assert fault.code is FaultCode.QUOTA
            assert fault.retry_after_s > 0
            await channel.aclose()


async def test_the_ca_is_given_to_anyone_and_no_key_is(folder: Path) -> None:
    async with serving(folder) as server, https(server, folder) as client:
        got = await client.get("/ca.pem")
        assert got.content == (folder / "ca.pem").read_bytes()
        for path in ("/ca.key", "/server.key", "/signing", "/revoked"):
            assert (await client.get(path)).status_code == 401


async def test_a_certificate_and_keys_of_others_can_be_used(phone: Phone, folder: Path, tmp_path: Path) -> None:
    ours = signer(folder)
    jwk = jwt.algorithms.OKPAlgorithm.to_jwk(ours.key.public_key(), as_dict=True) | {"kid": "theirs"}
    (tmp_path / "jwks.json").write_text(str({"keys": [jwk]}).replace("'", '"'))
    config = ServerConfig(
        checkpoint(), port=0, http_port=0, threads=1, jwks=str(tmp_path / "jwks.json"), issuer="https://id.example",
        audience="phones", certificate=folder / "server.pem", certificate_key=folder / "server.key",
    )  # fmt: skip
    token = Forger(Signer("theirs", ours.key)).signed(iss="https://id.example", aud=["phones", "others"])
    async with running(config) as server, wires(server, folder) as connections, https(server, folder, token) as client:
        for connection in connections.values():
            heard = await phone.ask(connection, PROMPT, token=token)
            assert heard.ids == expected(checkpoint(), PROMPT, Sampling(), 8)
        with pytest.raises(SessionFault, match="unknown key"):
            await phone.ask(connections["quic"], PROMPT, token=keys.issue(folder, "phone"))
        assert (await client.post("/v1/token")).status_code == 404
        assert (await client.get("/ca.pem")).status_code == 404


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "0.0.0.0"}, "without --keys only loopback is listened on, not 0.0.0.0"),
        ({"host": "::"}, "only loopback"),
        ({"host": "example.org"}, "only loopback"),
        ({"jwks": "jwks.json"}, "--jwks needs a certificate"),
        ({"issuer": "x"}, "--jwks lets in"),
        ({"certificate": Path("x")}, "need each other"),
        ({"token_life_s": 1e9}, "--token-life 1e+09"),
    ],
)
async def test_a_server_that_would_be_open_by_mistake_does_not_start(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    config = dataclasses.replace(ServerConfig(tmp_path, port=0, http_port=0), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as refused:
        async with running(config):
            pass
    assert words in str(refused.value)


async def test_without_keys_anyone_is_served_on_loopback_over_http_alone() -> None:
    config = ServerConfig(checkpoint(), port=0, http_port=0, threads=1, quota=Quota(requests=1))
    async with running(config) as server, httpx.AsyncClient(base_url=f"http://{server.http}") as client:
        for _ in range(2):
            assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        assert (await client.post("/v1/token")).status_code == 404
    dataclasses.replace(config, host="0.0.0.0", insecure=True).check()
