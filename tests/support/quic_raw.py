"""First packets made by hand, and a UDP socket that counts, for peers that do not play by the rules."""

from __future__ import annotations

import asyncio
import os
import socket
from dataclasses import dataclass

from aioquic._buffer import Buffer
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicPacketType, QuicProtocolVersion, pull_quic_header
from aioquic.tls import Epoch

from protocol.transport.base import Address, Trust
from support.quic_pair import SERVER, phone

V1 = int(QuicProtocolVersion.VERSION_1)
TAG, NUMBER = 16, 4  # bytes of a packet's seal and of the packet numbers used here
LEAST = 1200  # bytes of a datagram with a first packet


@dataclass(frozen=True, slots=True)
class Hello:
    """A phone's ClientHello, and the connection id that it names."""

    message: bytes
    cid: bytes

    @classmethod
    def of(cls, trust: Trust) -> Hello:
        client = phone(trust)
        client.connect(SERVER, now=0.0)
        return cls(bytes(client._crypto_streams[Epoch.INITIAL].sender._buffer), client.host_cid)

    def packet(self, *, token: bytes = b"", to: bytes | None = None) -> bytes:
        """A good first packet for one more connection."""
        return initial(crypto(self.message), token=token, to=to or os.urandom(8), source=self.cid)


def varint(value: int) -> bytes:
    size = 0 if value < 1 << 6 else 1 if value < 1 << 14 else 2 if value < 1 << 30 else 3
    return (value | size << (8 * 2**size - 2)).to_bytes(2**size, "big")


def crypto(data: bytes, offset: int = 0) -> bytes:
    """A CRYPTO frame."""
    return b"\x06" + varint(offset) + varint(len(data)) + data


def initial(
    frames: bytes, *, to: bytes, source: bytes = b"", token: bytes = b"", number: int = 0, keys: bytes | None = None
) -> bytes:
    """An Initial packet with these frames, padded to LEAST; `keys` is the id they come from, when not `to`."""
    pair = CryptoPair()
    pair.setup_initial(cid=to if keys is None else keys, is_client=True, version=V1)
    ids = bytes([len(to)]) + to + bytes([len(source)]) + source
    head = bytes([0xC0 | NUMBER - 1]) + V1.to_bytes(4, "big") + ids + varint(len(token)) + token
    frames += bytes(max(0, LEAST - len(head) - 2 - NUMBER - TAG - len(frames)))
    size = NUMBER + len(frames) + TAG
    header = head + (size | 0x4000).to_bytes(2, "big") + number.to_bytes(NUMBER, "big")
    return pair.encrypt_packet(header, frames, number)


class Peer:
    """A socket that sends what it is told and counts both ways. `at` is the loopback address it sends from."""

    def __init__(self, server: Address, at: str = "127.0.0.1"):
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.setblocking(False)
        self._socket.bind((at, 0))
        self._socket.connect((server.host, server.port))
        self.sent = self.received = 0
        self.answers: list[bytes] = []
        asyncio.get_running_loop().add_reader(self._socket, self._read)

    def send(self, data: bytes) -> None:
        self.sent += self._socket.send(data)

    def _read(self) -> None:
        try:
            while True:
                self.answers.append(self._socket.recv(65536))
                self.received += len(self.answers[-1])
        except OSError:  # nothing more for now, or the port is closed
            return

    def kinds(self) -> set[QuicPacketType]:
        """Of the packets that the answers begin with."""
        return {pull_quic_header(Buffer(data=data), host_cid_length=8).packet_type for data in self.answers}

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
