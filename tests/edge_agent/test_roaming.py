"""A machine whose interfaces come and go: what the kernel tells of it, and what connections make of that."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from edge_agent.conditions import Network
from edge_agent.link import Link
from edge_agent.networks import Toward
from edge_agent.replicas import Links
from edge_agent.roaming import Changes
from edge_agent.state import State
from protocol.errors import LinkLost
from protocol.frames import Draft, Tokens
from protocol.transport.base import Address, ServerChannel, Trust, Way
from protocol.transport.memory import MemoryConnection
from protocol.transport.quic import connect_quic, serve_quic
from support.apart import Namespace, apart, ip
from support.certificates import Authority
from support.edge import always
from support.eventually import eventually

CLOUD = "10.9.9.9"


PAIR = "link add wlan0 type veth peer name far0"


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (PAIR, "link set wlan0 up"),
        (PAIR, "link del wlan0"),
        (PAIR, "addr add 10.1.1.1/24 dev wlan0"),
        (PAIR, "addr add fd00::1/64 dev wlan0"),
        ("addr add 10.1.1.1/24 dev lo", "addr del 10.1.1.1/24 dev lo"),
        ("link show", "route add 10.2.0.0/16 dev lo"),
        ("link show", "route add fd01::/64 dev lo"),
    ],
)
def test_the_kernel_tells_of_every_change(before: str, change: str) -> None:
    async def scene() -> None:
        ip(before)
        with contextlib.closing(Changes()) as changes:
            waiting = asyncio.create_task(changes.next())
            await turn()
            assert not waiting.done()
            ip(change)
            async with asyncio.timeout(20):
                await waiting

    apart(scene)


def test_changes_that_come_together_are_told_once_and_too_many_are_no_error() -> None:
    async def scene() -> None:
        with contextlib.closing(Changes()) as changes:
            changes._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for number in range(20):
                ip(f"addr add 10.1.{number}.1/24 dev lo")
            await changes.next()
            again = asyncio.create_task(changes.next())
            await turn()
            assert not again.done()
            again.cancel()

    apart(scene)


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def echo(channel: ServerChannel) -> None:
    while isinstance(frame := await channel.receive(), Draft):
        await channel.send(Tokens(frame.position, frame.tokens))


@asynccontextmanager
async def a_server_behind_two_interfaces(folder: Path) -> AsyncIterator[tuple[Address, Trust]]:
    """This thread's namespace has `wlan0` and `rmnet0`, each with a way to the server in another one."""
    authority, there = Authority.create(), Namespace()
    try:
        for number, name in enumerate(("wlan0", "rmnet0"), 1):
            ip(f"link add {name} type veth peer name peer{number} netns {there.path}")
            ip(f"addr add 10.0.{number}.1/24 dev {name}")
            ip(f"link set {name} up")
        with there.inside():
            ip(f"addr add {CLOUD}/32 dev lo")
            for number in (1, 2):
                ip(f"addr add 10.0.{number}.2/24 dev peer{number}")
                ip(f"link set peer{number} up")
            listener = await serve_quic(CLOUD, 0, authority.issue(folder, CLOUD), echo)
        ip(f"route add {CLOUD} via 10.0.1.2 dev wlan0 metric 100")
        ip(f"route add {CLOUD} via 10.0.2.2 dev rmnet0 metric 200")
        yield listener.address, authority.trust
        await listener.aclose()
    finally:
        there.close()


@asynccontextmanager
async def phone(folder: Path, link: Link) -> AsyncIterator[Link]:
    """Watches, as the agent does."""
    links = Links([link], State(folder / "state"), lambda host: Network.WIFI)
    links.start()
    try:
        await eventually(lambda: link.dialler.warm)
        yield link
    finally:
        await links.aclose()


def leave_wifi() -> None:
    ip("link set wlan0 down")


def prefer_cellular() -> None:
    ip(f"route add {CLOUD} via 10.0.2.2 dev rmnet0 metric 50")


def lose_the_address() -> None:
    ip("addr del 10.0.1.1/24 dev wlan0")


@pytest.mark.parametrize("change", [leave_wifi, prefer_cellular, lose_the_address])
def test_a_session_goes_on_over_the_other_interface(tmp_path: Path, change: Callable[[], None]) -> None:
    async def scene() -> None:
        async with (
            a_server_behind_two_interfaces(tmp_path) as (address, trust),
            phone(tmp_path, Link(address, partial(connect_quic, trust=trust))) as link,
        ):
            connection = await link.connect()
            channel = await connection.open()
            await channel.send(Draft(0, (0,)))
            assert await channel.receive() == Tokens(0, (0,))
            assert link.dialler.network == "wlan0 10.0.1.0/24"
            change()
            async with asyncio.timeout(20):
                for number in range(1, 4):
                    await channel.send(Draft(number, (number,)))
                    assert await channel.receive() == Tokens(number, (number,))
                await eventually(lambda: connection._port.way.here == "10.0.2.1")  # type: ignore[attr-defined]
                await eventually(lambda: link.dialler.network == "rmnet0 10.0.2.0/24")
            assert link.dialler.connection is connection
            assert not connection.displaced()

    apart(scene)


def test_a_session_outlives_a_time_without_any_network(tmp_path: Path) -> None:
    async def scene() -> None:
        async with (
            a_server_behind_two_interfaces(tmp_path) as (address, trust),
            phone(tmp_path, Link(address, partial(connect_quic, trust=trust))) as link,
        ):
            connection = await link.connect()
            channel = await connection.open()
            await channel.send(Draft(0, (0,)))
            await channel.receive()
            ip("link set rmnet0 down")
            leave_wifi()
            await channel.send(Draft(1, (1,)))
            await eventually(lambda: link.dialler.network == "")
            assert not connection.displaced()
            assert not await connection.move()
            ip("link set wlan0 up")
            ip(f"route add {CLOUD} via 10.0.1.2 dev wlan0")
            async with asyncio.timeout(20):
                assert await channel.receive() == Tokens(1, (1,))
            assert link.dialler.connection is connection

    apart(scene)


class Tcp(MemoryConnection):
    """Cannot move, and knows which address it sends from."""

    transport = "grpc"

    def __init__(self, address: Address):
        super().__init__(echo)
        way = Way.now(socket.AF_INET, (address.host, address.port))
        assert way is not None
        self._way = way

    def displaced(self) -> bool:
        return self._way.gone()


def test_a_connection_that_cannot_move_is_closed_and_another_dialled(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_server_behind_two_interfaces(tmp_path) as (address, _):

            async def refuse(address: Address) -> Tcp:
                raise LinkLost("no UDP")

            async def dial(address: Address) -> Tcp:
                return Tcp(address)

            async with phone(tmp_path, Link(address, refuse, dial)) as link:
                first = await link.connect()
                channel = await first.open()
                leave_wifi()
                with pytest.raises(LinkLost):
                    await channel.receive()
                assert first.closed
                assert not (await link.connect()).closed

    apart(scene)


def test_what_one_network_blocks_the_other_does_not(tmp_path: Path) -> None:
    async def scene() -> None:
        async with a_server_behind_two_interfaces(tmp_path) as (address, trust):

            async def dial(address: Address) -> Tcp:
                return Tcp(address)

            async with phone(tmp_path, Link(address, partial(connect_quic, trust=trust), dial)) as link:
                assert link.dialler.connection.transport == "quic"  # type: ignore[union-attr]
                link.dialler.udp.block("rmnet0 10.0.2.0/24")
                assert not link.dialler.udp_blocked
                leave_wifi()
                await eventually(lambda: link.dialler.udp_blocked)
                assert (await link.connect()).transport == "grpc"
                ip("link set wlan0 up")
                ip(f"route add {CLOUD} via 10.0.1.2 dev wlan0 metric 100")
                await eventually(lambda: not link.dialler.udp_blocked)
                assert (await link.connect()).transport == "quic"

    apart(scene)


def test_a_replica_that_was_lost_is_tried_at_once_from_another_network(tmp_path: Path) -> None:
    async def scene() -> None:
        async with (
            a_server_behind_two_interfaces(tmp_path) as (address, trust),
            phone(tmp_path, Link(address, partial(connect_quic, trust=trust))) as link,
        ):
            link.lost("silent")
            link.retry_at = float("inf")
            leave_wifi()
            await eventually(lambda: link.unreachable is None)

    apart(scene)


def test_a_network_is_named_by_its_interface_and_prefix() -> None:
    async def scene() -> None:
        toward = Toward(Address("127.0.0.1", 9))
        assert await toward.name() == "lo 127.0.0.0/24"
        assert await Toward(Address("203.0.113.5", 9)).name() == ""
        assert await Toward(Address("no.such.host.invalid", 9)).name() == ""

    apart(scene)


@pytest.mark.anyio
async def test_without_netlink_the_replicas_are_watched_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_NETLINK", raising=False)
    with pytest.raises(OSError, match="no netlink"):
        Changes()
    async with phone(tmp_path, Link(Address("127.0.0.1", 1), always(MemoryConnection(echo)))) as link:
        assert link.dialler.warm
