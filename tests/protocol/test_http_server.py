"""The sockets that HTTP is served on."""

from __future__ import annotations

import socket

from protocol.http_server import bound


def test_an_answer_does_not_wait_for_the_client_to_acknowledge_what_came_before() -> None:
    with bound("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        served, _ = listener.accept()
        with served:
            assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
