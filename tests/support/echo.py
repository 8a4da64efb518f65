"""What a link is like: `serve HOST` at its far end, `ask HOST COUNT EVERY_S` and `push HOST BYTES` at this one."""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time

PORT = 9000


def serve(host: str) -> None:
    """Answers datagrams with where they came from, and a TCP connection with its bytes and seconds."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((host, PORT))
    tcp = socket.create_server((host, PORT))
    waiting = selectors.DefaultSelector()
    waiting.register(udp, selectors.EVENT_READ)
    waiting.register(tcp, selectors.EVENT_READ)
    print("up", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is udp:
                data, source = udp.recvfrom(2048)
                udp.sendto(data + f" {source[0]}:{source[1]}".encode(), source)
            else:
                _take(tcp.accept()[0])


def _take(connection: socket.socket) -> None:
    with connection:
        size, began = 0, time.monotonic()
        while data := connection.recv(65536):
            size += len(data)
        connection.sendall(json.dumps({"bytes": size, "seconds": time.monotonic() - began}).encode())


def ask(host: str, count: int, every_s: float) -> None:
    """Prints for each answer [number, round trip in ms, our address as the server saw it], and errors by name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.connect((host, PORT))
        began, sent, heard, errors = time.monotonic(), 0, [], set()
        while time.monotonic() < began + count * every_s + 1:
            try:
                if sent < count and time.monotonic() >= began + sent * every_s:
                    sent += 1
                    udp.send(f"{sent - 1} {time.monotonic()}".encode())
                udp.settimeout(every_s / 4)
                number, at, source = udp.recv(2048).decode().split()
                heard.append([int(number), 1e3 * (time.monotonic() - float(at)), source])
            except TimeoutError:
                if len(heard) == count:
                    break
            except OSError as error:
                errors.add(type(error).__name__ + f" {error.errno}")
    print(json.dumps({"heard": heard, "errors": sorted(errors)}))


def push(host: str, size: int) -> None:
    with socket.create_connection((host, PORT)) as tcp:
        tcp.sendall(bytes(size))
        tcp.shutdown(socket.SHUT_WR)
        print(tcp.recv(1024).decode())


if __name__ == "__main__":
    match sys.argv[1:]:
        case "serve", host:
            serve(host)
        case "ask", host, count, every_s:
            ask(host, int(count), float(every_s))
        case "push", host, size:
            push(host, int(size))
