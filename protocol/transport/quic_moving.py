"""aioquic's connection on a changing path: what aioquic leaves to its timers is done at once.

Relies on private names of aioquic 1.7, as quic_connection does.
"""

from __future__ import annotations

import math
from typing import Any

from aioquic.quic.connection import NetworkAddress, QuicConnection
from aioquic.quic.packet_builder import QuicPacketBuilder


class MovingConnection(QuicConnection):
    """One end; only a client moves, and a server follows it."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.heard_at = -math.inf  # the latest datagram that could be read
        self._wide = False

    # the client

    def ask(self) -> None:
        """Has a sign of life sent for, whatever is under way."""
        self._send_probe()

    def go_on(self, now: float, *, elsewhere: bool) -> None:
        """The client has another socket; `elsewhere`: on another network.

        The first packet is full, since a server answers an unknown address with three times what it got at most.
        """
        self.change_connection_id()
        if elsewhere:
            self._start_over(now)
        self._loss._pto_count = 0
        self._wide = True
        self.ask()

    def _write_ping_frame(self, builder: QuicPacketBuilder, uids: Any = (), comment: str = "") -> None:
        super()._write_ping_frame(builder, uids, comment)
        if self._wide:
            builder._datagram_needs_padding, self._wide = True, False

    # both

    def receive_datagram(self, data: bytes, addr: NetworkAddress, now: float) -> None:
        path, alive_until = self._network_paths[:1], self._close_at
        super().receive_datagram(data, addr, now)
        if self._close_at == alive_until:  # moves with every packet that could be read
            return
        silent_s, self.heard_at = now - self.heard_at, now
        if path and path[0] is not self._network_paths[0]:
            self._follow(path[0].addr, now)
        elif silent_s > self._loss.get_probe_timeout() and self._handshake_confirmed:
            self._loss._pto_count = 0  # the path bears again: what is due leaves now

    def _follow(self, before: NetworkAddress, now: float) -> None:
        """The client speaks from another address: what is on its way to the one before may vanish, and is little."""
        if before[0] != self._network_paths[0].addr[0]:
            self._start_over(now)
        else:
            self._send_all_again(now)
        self._loss._pto_count = 0

    def _start_over(self, now: float) -> None:
        """Another network: nothing is known of its round trip and capacity (RFC 9000, 9.4)."""
        self._send_all_again(now)
        loss = self._loss
        loss._rtt_initialized, loss._rtt_min = False, math.inf
        loss._rtt_latest = loss._rtt_smoothed = loss._rtt_variance = 0.0
        self._on_other_network()

    def _on_other_network(self) -> None:
        """For the congestion control, to forget the path."""

    def _send_all_again(self, now: float) -> None:
        for space in self._loss.spaces:
            packets = tuple(space.sent_packets.values())
            self._loss._on_packets_lost(congestion_event=False, now=now, packets=packets, space=space)
            space.loss_time = None
