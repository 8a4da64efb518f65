"""`make demo`: a cloud server and an agent on loopback, real questions on every route, and what each of them cost.

`KEEP=1 make demo` stays up afterwards and says how to `curl` it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from edge_agent import client

FULL = "assistant-20m"
START_S = 60.0
QUESTIONS = (  # topics of the data's dev split
    "I want to find a restaurant in San Jose. I would like some Mexican food.",
    "Can you help me find a one way flight from New York to Seattle next Monday?",
    "I need to transfer some money from my checking account.",
)
ROUTES: tuple[tuple[str, dict[str, object]], ...] = (
    ("phone", {"route": "local", "quality": "fast"}),
    ("cloud", {"route": "cloud"}),
    ("split 4", {"route": "split", "split": 4}),
    ("split 12", {"route": "split", "split": 12}),
    ("drafts", {"route": "speculative"}),
    ("auto", {"route": "auto"}),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the demo's two programs live."""

    folder: Path
    wire: int
    https: int
    http: int

    @classmethod
    def in_folder(cls, folder: Path) -> Place:
        return cls(folder, free_port(4433), free_port(8000), free_port(8080))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @property
    def https_url(self) -> str:
        return f"https://localhost:{self.https}"

    @property
    def ca(self) -> Path:
        return self.folder / "keys" / "ca.pem"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


def free_port(wanted: int) -> int:
    """`wanted`, or any port when something holds that one."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            tcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            tcp.bind(("127.0.0.1", port))
            udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            udp.bind(("127.0.0.1", tcp.getsockname()[1]))
            return int(tcp.getsockname()[1])
    raise SystemExit("no free port on 127.0.0.1")


@contextlib.contextmanager
def program(place: Place, name: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """Runs one of the two programs, its output in the demo's folder, and ends it on leaving."""
    with place.log(name).open("a") as log:
        command = [sys.executable, "-m", name, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_ready(process: subprocess.Popen[bytes], url: str, ca: Path | None, log: Path) -> float:
    """Seconds until `/ready` says yes; ends the demo with the program's own words when it never does."""
    began = time.monotonic()
    verify = ssl.create_default_context(cafile=str(ca)) if ca else True
    with httpx.Client(verify=verify, timeout=2) as client:
        while time.monotonic() - began < START_S and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/ready").status_code == 200:
                    return time.monotonic() - began
            time.sleep(0.05)
    raise SystemExit(f"{url} did not become ready; its log:\n{log.read_text()[-2000:]}")


def make_keys(place: Place) -> None:
    """A CA, a certificate and a device token, with the program's own commands."""
    keys, cloud = place.folder / "keys", [sys.executable, "-m", "cloud_server"]
    make = [*cloud, "keys", "--keys", keys, "--name", "localhost", "--name", "127.0.0.1"]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*cloud, "token", "--keys", keys, "--device", "demo", "--out", place.folder / "token"], check=True)


def cloud(place: Place, *more: object) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return program(
        place, "cloud_server", "serve", "--model", FULL, "--keys", place.folder / "keys", "--host", "127.0.0.1",
        "--port", place.wire, "--http-port", place.https, "--threads", 1, *more,
    )  # fmt: skip


def agent(place: Place) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return program(
        place, "edge_agent", "serve", "--cloud", f"127.0.0.1:{place.wire}", "--ca", place.ca, "--token-file",
        place.folder / "token", "--token-url", f"{place.https_url}/v1/token", "--state", place.folder / "state",
        "--port", place.http, "--threads", 1,
    )  # fmt: skip


def ask(place: Place, question: str, plan: dict[str, object], console: Console) -> tuple[str, dict[str, Any]]:
    """Streams one answer to the terminal; returns its text and the plan that the agent reports."""
    body = {
        "model": "tandem", "messages": [{"role": "user", "content": question}], "stream": True, "temperature": 0,
        "max_tokens": 60, "plan": plan,
    }  # fmt: skip
    text, report = "", {}
    with httpx.stream("POST", f"{place.url}/v1/chat/completions", json=body, timeout=60) as response:
        if response.status_code != 200:
            response.read()
            raise SystemExit(f"the agent answered {response.status_code}: {response.text}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise SystemExit(f"the answer ended with an error: {chunk['error']['message']}")
            report = chunk.get("plan", report)
            new = chunk["choices"][0]["delta"].get("content", "") if chunk["choices"] else ""
            text += new
            console.print(new, end="", markup=False, highlight=False, style="cyan")
    console.print()
    return text, report


def told(name: str, report: dict[str, Any]) -> list[str]:
    where = f"{report['route']}" + (f" {report['split']}" if report["split"] else "")
    early = "yes" if report.get("early_data") else "no"
    first = f"{report['first_token_ms']:.0f} ms"
    return [name, where, first, str(report["bytes_up"]), str(report["bytes_down"]), report["transport"] or "-", early,
            "yes" if report["exact"] else "no"]  # fmt: skip


def tour(place: Place, console: Console) -> None:
    """Everything the demo shows."""
    table = Table(title="One line an answer")
    for column in ("asked for", "ran", "first token", "bytes up", "bytes down", "over", "early data", "exact"):
        table.add_column(column)
    texts: dict[str, list[str]] = {}
    with agent(place) as running:
        seconds = wait_ready(running, place.url, None, place.log("edge_agent"))
        console.print(f"agent ready after {seconds:.1f} s\n")
        for question in QUESTIONS:
            console.print(f"[bold]{question}[/bold]")
            for name, plan in ROUTES:
                console.print(f"  [dim]{name:<9}[/dim]", end="")
                text, report = ask(place, question, plan, console)
                texts.setdefault(question, []).extend([text] if report["route"] != "local" else [])
                table.add_row(*told(name, report))
            console.print()
        console.print("[bold]How the agent scored the first question[/bold]")
        first = {"model": "tandem", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
        client.plan(client.AgentPlace(place.url), first)
    same = all(len(set(answers)) == 1 for answers in texts.values())
    console.print(f"cloud, split and drafts gave the same text for every question: {'yes' if same else 'NO'}\n")
    with agent(place) as running:
        wait_ready(running, place.url, None, place.log("edge_agent"))
        console.print("[bold]The agent again, after a restart: it has a ticket from last time.[/bold]\n  ", end="")
        _, report = ask(place, QUESTIONS[0], {"route": "cloud"}, console)
        table.add_row(*told("restart", report))
        console.print(table)
        if not report["early_data"]:
            raise SystemExit("the request after the restart did not go out as early data")
        if not same:
            raise SystemExit("the routes did not agree")
        if os.environ.get("KEEP") == "1":
            stay(place, console)


def stay(place: Place, console: Console) -> None:
    body = '{"model": "tandem", "messages": [{"role": "user", "content": "Find me a hotel in Paris."}]}'
    console.print("Up until Ctrl-C. Try:", style="bold")
    commands = (
        f"curl -N {place.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'",
        f"{Path(sys.executable).parent}/edge-agent plan 'Find me a hotel in Paris.' --url {place.url}",
        f"curl --cacert {place.ca} {place.https_url}/metrics",
    )
    for command in commands:
        print(f"  {command}")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


def main() -> None:
    console = Console(width=max(100, Console().width))
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as name:
        place = Place.in_folder(Path(name))
        make_keys(place)
        with cloud(place) as running:
            seconds = wait_ready(running, place.https_url, place.ca, place.log("cloud_server"))
            console.print(f"cloud server ready after {seconds:.1f} s, QUIC on UDP port {place.wire}")
            tour(place, console)


if __name__ == "__main__":
    main()
