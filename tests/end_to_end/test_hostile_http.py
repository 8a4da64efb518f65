"""Bad input over HTTP to both programs: an error object, and nobody else is any the wiser."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from protocol.errors import FaultCode, SessionFault
from support.bystander import unharmed
from support.http_targets import LIMITS, Target, agent_target, cloud_target

pytestmark = pytest.mark.anyio
MEGABYTE = 1 << 20
LONG = {"prompt": "a", "temperature": 1, "seed": 12, "n": 4, "max_tokens": 900, "stream": True}  # of both models
MEMORY = 64 * MEGABYTE  # how much more may be resident after a test: allocators keep some


@pytest.fixture(scope="module", params=["cloud", "agent"])
async def server(
    request: pytest.FixtureRequest, key_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Target]:
    made = cloud_target(key_folder) if request.param == "cloud" else agent_target(tmp_path_factory.mktemp("agent"))
    async with made as target:
        yield target


@pytest.fixture
async def target(server: Target) -> AsyncIterator[Target]:
    """A server with a bystander, who is not to notice anything."""
    async with unharmed(server.session, server.held):
        yield server


def resident() -> int:
    """Bytes of this process, which both ends of a test are in."""
    return int(psutil.Process().memory_info().rss)


def error_of(answer: bytes) -> tuple[int, dict[str, str]]:
    """Status and error object of a raw answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head, answer
    return int(head.split()[1]), json.loads(body)["error"]


BIG = "9" * 400
BODIES: list[tuple[bytes, str]] = [
    (b"", "the body: Field required"),
    (b"{", "the body is not JSON: Expecting property name enclosed in double quotes at character 1"),
    (b"[]", "the body: Input should be a valid dictionary"),
    (b"null", "the body: "),
    (b'"\x00"', "Invalid control character at"),
    (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"seed":' + b"9" * 5000 + b"}", "the body is not JSON: Exceeds the limit"),
    (b'{"temperature":NaN}', "NaN is no JSON number"),
    (b'{"user":[-Infinity]}', "-Infinity is no JSON number"),
    (b'{"model":"a","model":"b"}', "the key 'model' comes twice"),
    (b"{" + b",".join(b'"k%d":0' % n for n in range(2000)) + b"}", "an object of 2000 keys, limit 1024"),
]
FIELDS: list[tuple[dict[str, object], str]] = [
    ({"max_tokens": -5}, "max_tokens: Input should be greater than or equal to 1 (got -5)"),
    ({"max_tokens": 10**30}, "max_tokens: Input should be less than or equal to 131072 (got 1000"),
    ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer (got '5')"),
    ({"max_tokens": True}, "max_tokens: Input should be a valid integer (got True)"),
    ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
    ({"max_tokens": [1]}, "max_tokens: Input should be a valid integer (got [1])"),
    ({"temperature": "hot"}, "temperature: Input should be a valid number (got 'hot')"),
    ({"temperature": float("1e999")}, "Infinity is no JSON number"),
    ({"temperature": -0.5}, "temperature: Input should be greater than or equal to 0 (got -0.5)"),
    ({"top_p": 7}, "top_p: Input should be less than or equal to 1 (got 7)"),
    ({"seed": 1 << 64}, "seed: Input should be less than 18446744073709551616 (got 18446744073709551616)"),
    ({"n": 10**9}, "n: Input should be less than or equal to 8 (got 1000000000)"),
    ({"n": 0}, "n: Input should be greater than or equal to 1 (got 0)"),
    (
        {"stop": ["x"] * 10_000},
        "stop: List should have at most 16 items after validation, not 10000 (got ['x', 'x', 'x', ...])",
    ),
    ({"stop": ["x" * 257]}, "stop.0: String should have at most 256 characters (got 'xxx"),
    ({"stop": ["\N{PILE OF POO}" * 65]}, "stop.0: a stop string of 260 bytes, limit 256"),
    ({"stop": ""}, "stop: String should have at least 1 character (got '')"),
    ({"stop": [1] * 10_000}, "stop.0: Input should be a valid string (got 1)"),
    ({"stream": "yes"}, "stream: Input should be a valid boolean (got 'yes')"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage: Input should be a valid boolean (got 1)"),
    ({"model": "m" * 10_000}, "model: String should have at most 256 characters (got 'mmm"),
    ({"model": "\ud800"}, "model: character 0 is a lone surrogate, which no text may hold (got '\\ud800')"),
    ({"model": ""}, "model: String should have at least 1 character (got '')"),
    ({"prompt": "a \udfff b"}, "prompt: character 2 is a lone surrogate, which no text may hold (got 'a \\udfff b')"),
    ({"prompt": ""}, "prompt: String should have at least 1 character (got '')"),
    ({"prompt": ["the", "table"]}, "prompt: List should have at most 1 item after validation, not 2 (got ['the',"),
    ({"prompt": [[7, 8]]}, "prompt.0: Input should be a valid string (got [7, 8])"),
    ({"prompt": None}, "prompt: Input should be a valid string (got None)"),
    ({"prompt": "the table " * 2000}, "tokens"),
    ({"logit_bias": {str(n): n for n in range(500)}}, "logit_bias is not supported (got {"),
    ({"\ud800": {"deep": [[[[[[[[]]]]]]]]}, "tools": [[[[[[]]]]]]}, "tools is not supported (got [[[[...]]]])"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=range(len(BODIES)))
async def test_a_body_that_is_no_request_is_refused_in_words(target: Target, body: bytes, words: str) -> None:
    async with target.client() as http:
        got = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400
    error = got.json()["error"]
    assert words in error["message"]
    assert len(error["message"]) < 300
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "words"), FIELDS, ids=[f"{n}-{next(iter(one))!a}" for n, (one, _) in enumerate(FIELDS)]
)
async def test_a_field_that_cannot_be_is_named_with_its_value_and_limit(
    target: Target, change: dict[str, object], words: str
) -> None:
    async with target.client() as http:
        body = json.dumps(target.asked(**change))
        got = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400
    error = got.json()["error"]
    assert words in error["message"]
    assert len(error["message"]) < 300
    assert error["param"] is None or words.startswith(error["param"]) or words == "tokens"


async def test_a_conversation_that_cannot_be_is_refused_at_its_first_fault(target: Target) -> None:
    message = {"role": "user", "content": "hello"}
    cases: list[tuple[object, str]] = [
        ([], "messages: List should have at least 1 item"),
        ("hello", "messages: Input should be a valid list (got 'hello')"),
        ([1] * 300_000, "messages.0: Input should be a valid dictionary"),
        ([message] * 20_000, "messages: List should have at most 4096 items"),
        ([message | {"role": "root"}], "messages.0.role: Input should be 'system', 'user', 'assistant' or 'developer'"),
        ([message | {"content": 5}], "messages.0.content: Input should be a valid string (got 5)"),
        (
            [message | {"content": [{"type": "image"}] * 40_000}],
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ([message | {"content": "\ud83d"}], "messages.0.content: character 0 is a lone surrogate"),
    ]
    async with target.client() as http:
        for messages, words in cases:
            body = json.dumps({"model": target.model, "messages": messages})
            assert len(body) <= LIMITS.body
            got = await http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
            assert got.status_code == 400
            assert words in got.json()["error"]["message"]


async def test_a_whole_number_may_have_a_point(target: Target) -> None:
    async with target.client() as http:
        asked = target.asked(max_tokens=3.0, n=1.0, seed=5.0, top_k=-1.0)
        assert (await http.post("/v1/completions", json=asked)).json()["usage"]["completion_tokens"] == 3


async def test_control_characters_in_a_prompt_are_characters(target: Target) -> None:
    prompt = "".join(map(chr, range(32))) + "\x7f\x85\u2028\ufeff\ufffe\u202e"
    async with target.client() as http:
        got = [await http.post("/v1/completions", json=target.asked(prompt=prompt)) for _ in range(2)]
    assert [one.status_code for one in got] == [200, 200]
    assert got[0].json()["choices"] == got[1].json()["choices"]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", None])
async def test_another_content_type_is_refused(target: Target, kind: str | None) -> None:
    async with target.client() as http:
        headers = {"content-type": kind} if kind else {}
        got = await http.post("/v1/completions", content=json.dumps(target.asked()), headers=headers)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "invalid_content_type")


async def poured(target: Target, head: bytes, chunked: bool = False) -> tuple[bytes, int]:
    """What comes back to a body of a hundred megabytes, and how many bytes of it went out by then."""
    reader, writer = await target.connect()
    piece, sent, answer = bytes(64 << 10), 0, b""

    async def listen() -> None:
        nonlocal answer
        with contextlib.suppress(ConnectionError):
            while got := await reader.read(MEGABYTE):
                answer += got

    listening = asyncio.create_task(listen())
    try:
        writer.write(head)
        with contextlib.suppress(ConnectionError):
            while sent < 100 * MEGABYTE and not listening.done() and not writer.is_closing():
                writer.write(b"10000\r\n%b\r\n" % piece if chunked else piece)
                await writer.drain()
                await asyncio.sleep(0)  # a TLS transport that is closing takes everything and lets nobody run
                sent += len(piece)
        await listening
        return answer, sent
    finally:
        writer.close()


async def test_a_hundred_megabytes_are_not_taken_in(target: Target) -> None:
    before, whole = resident(), {"content_type": "application/json", "content_length": 100 * MEGABYTE}
    line, parts = "POST /v1/completions HTTP/1.1", {"content_type": "application/json", "transfer_encoding": "chunked"}
    for head, chunked in ((target.head(line, **whole), False), (target.head(line, **parts), True)):
        answer, sent = await poured(target, head, chunked)
        status, error = error_of(answer)
        assert (status, error["code"]) == (413, "body_too_large")
        assert f"{LIMITS.body}" in error["message"]
        assert sent < 30 * MEGABYTE
    stranger, sent = await poured(target, target.head(line, **whole | {"authorization": "Bearer x"}))
    assert (error_of(stranger)[0], sent < 30 * MEGABYTE) == (401, True)
    unasked, sent = await poured(target, target.head("GET /health HTTP/1.1", **whole))
    assert unasked.startswith(b"HTTP/1.1 200 ")
    assert sent < 30 * MEGABYTE
    assert resident() < before + MEMORY


async def test_a_body_somewhat_too_large_is_told_to_a_client_that_reads_only_afterwards(target: Target) -> None:
    async with target.client() as http:
        for headers, status in (({}, 413), ({"authorization": "Bearer x"}, 401)):
            got = await http.post("/v1/completions", content=bytes(6 * MEGABYTE), headers=headers)
            assert got.status_code == status


async def test_a_slow_body_is_answered_and_a_slow_head_is_cut_off(target: Target) -> None:
    body = target.head("POST /v1/completions HTTP/1.1", content_type="application/json", content_length=500)
    began = time.monotonic()
    slow, chunked, head, silent, again = await asyncio.gather(
        target.raw(body + b'{"model":'),
        target.raw(body.replace(b"content-length: 500", b"transfer-encoding: chunked") + b"5\r\n{"),
        target.raw(b"GET /health HTTP/1.1\r\nho"),
        target.raw(b""),
        target.raw(target.head("GET /health HTTP/1.1") + b"GET /"),  # a slow head on a connection that was good
    )
    assert time.monotonic() - began < 30
    for got in (slow, chunked):
        status, error = error_of(got)
        assert (status, error["code"]) == (408, "body_too_slow")
        assert "after 2 s" in error["message"]
    assert (head, silent) == (b"", b"")
    assert again.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "data",
    [b"\x16\x03\x01\x02\x00" * 50, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2\r\n\r\nSM\r\n\r\n",
     b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 100_000,
     b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: " + b"9" * 300 + b"\r\n\r\n"],
    ids=["tls", "host", "http2", "length", "head", "digits"],
)  # fmt: skip
async def test_what_is_no_http_gets_an_error_object(target: Target, data: bytes) -> None:
    status, error = error_of(await target.raw(data))
    assert (status, error["code"]) == (400, "invalid_http")


async def test_a_broken_chunk_ends_its_own_connection(target: Target) -> None:
    head = target.head("POST /v1/completions HTTP/1.1", content_type="application/json", transfer_encoding="chunked")
    status, _ = error_of(await target.raw(head + b"zz\r\nhello"))
    assert status == 400


def unread(client: socket.socket) -> bytes:
    """What had come for a client that did not read."""
    client.settimeout(10)
    found = b""
    with contextlib.suppress(OSError):
        while got := client.recv(MEGABYTE):
            found += got
    return found


async def test_a_client_that_stops_reading_is_given_up(server: Target) -> None:
    before, client = resident(), None
    try:
        async with unharmed(server.session, server.held):  # at whose end the client is still there
            client = await server.stalled(server.post(**LONG))
        assert resident() < before + MEMORY
        found = await asyncio.to_thread(unread, client)
    finally:
        if client is not None:
            client.close()
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b"[DONE]" not in found, len(found)


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_client_that_vanishes_frees_what_it_held(target: Target, stream: bool, how: str) -> None:
    client = await target.stalled(target.post(stream=stream, max_tokens=900))
    if stream:
        await asyncio.to_thread(client.recv, 1)
    if how == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


async def test_two_hundred_at_once_are_answered_or_told_to_come_again(server: Target) -> None:
    async def ask() -> int:
        with contextlib.suppress(ConnectionError):  # beyond the bound on connections
            got = await server.raw(server.post().replace(b"content-type", b"connection: close\r\ncontent-type"))
            if got:
                status = int(got.split()[1])
                assert status == 200 or b"retry-after" in got
                return status
        return 0

    async def session() -> object:
        """The bystander may be told to come again too."""
        while True:
            try:
                return await server.session()
            except SessionFault as busy:
                if busy.code is not FaultCode.BUSY:
                    raise

    async with unharmed(session, server.held):
        told = await asyncio.gather(*(ask() for _ in range(200)))
    assert set(told) <= {0, 200, 429, 503}
    assert told.count(200) >= 8
    async with server.client() as http:
        assert (await http.post("/v1/completions", json=server.asked())).status_code == 200


async def test_two_thousand_half_open_connections_keep_nobody_out(target: Target) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(2000, most[1] - 300)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(most[1], count + 300) if most[0] < count + 300 else most[0], most[1])
    )
    before, loop, place = resident(), asyncio.get_running_loop(), (target.address.host, target.address.port)
    taken: list[socket.socket] = []
    try:
        for number in range(count):
            taken.append(socket.socket())
            taken[-1].setblocking(False)
            await loop.sock_connect(taken[-1], place)
            if number % 500 == 250:
                async with target.client() as http:
                    assert (await http.post("/v1/completions", json=target.asked())).status_code == 200
        async with target.client() as http:
            assert (await http.post("/v1/completions", json=target.asked())).status_code == 200
        assert resident() < before + MEMORY
    finally:
        for one in taken:
            one.close()
