"""The router: where it runs, and telling it something."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from place import PATIENCE_S, LinkError, Place, call

Kind = Literal["kernel", "guest"]
SCRIPT = Path(__file__).with_name("router.sh").resolve()
NICE = "-10"  # a router that waits for the processor is a slower link
PORTS = ("edge0", "edge1", "cloud0")
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "iptables": "iptables", "unshare": "util-linux", "bash": "bash"}
GUEST_PROGRAMS = {"linux.uml": "user-mode-linux", "modprobe": "kmod", "iptables-legacy": "iptables"}


def need(programs: dict[str, str]) -> None:
    """Raises LinkError that names the packages of the programs that are missing."""
    missing = {package: name for name, package in programs.items() if shutil.which(name) is None}
    if missing:
        raise LinkError(f"{', '.join(missing.values())} not found: install {' '.join(missing)}")


def best_kind(namespace: str) -> Kind:
    """`kernel` where it has sch_netem."""
    command = ["ip", "netns", "exec", namespace, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(command, capture_output=True).returncode:
        return "guest"
    call("ip", "netns", "exec", namespace, "tc", "qdisc", "del", "dev", "lo", "root")
    return "kernel"


def start(place: Place, kind: Kind) -> None:
    """Begins to forward between the router's ports, which are in its namespace."""
    namespace, folder = place.namespace("router"), place.folder
    os.mkfifo(folder / "commands")
    if kind == "guest":
        need(GUEST_PROGRAMS)
        for port in PORTS:
            _bridge(namespace, port)
        init = folder / "init"
        init.write_text(f"#!/bin/bash\nexec {shlex.quote(str(SCRIPT))} guest -\n")
        init.chmod(0o755)
        ports = [f"vec{n}:transport=tap,ifname={port}t,depth=256,gro=0" for n, port in enumerate(PORTS)]
        command = ["linux.uml", "mem=96M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}",
                   *ports, "con=null", "con0=fd:0,fd:1", "quiet", "panic=-1"]  # fmt: skip
    else:
        command = [str(SCRIPT), "kernel", str(folder)]
    alone = ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", "nice", "-n", NICE]
    commands = os.open(folder / "commands", os.O_RDWR)  # also for writing, so that it never ends
    try:
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*alone, *command], stdin=commands, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )
    finally:
        os.close(commands)
    place.remember(process.pid, "router")
    with suppress(OSError):  # where sessions share the processor as groups, niceness counts within one only
        Path(f"/proc/{process.pid}/autogroup").write_text(NICE)
    try:
        _answer(place, 0)
    except LinkError as error:
        raise LinkError(f"the router ({kind}) did not come up: {error}") from None


def _bridge(namespace: str, port: str) -> None:
    """Joins a port with a tap for the guest, which must not see that the far end is down: its driver would break."""
    lines = [
        f"tuntap add {port}t mode tap",
        f"link add {port}b type bridge forward_delay 0 mcast_snooping 0",
        *(f"link set {port}{end} master {port}b up" for end in ("", "t")),
        f"link set {port}b up",
    ]
    for line in lines:
        call("ip", "-n", namespace, *line.split())


def tell(place: Place, line: str) -> str:
    """What the router says to a command. Raises LinkError when it refuses."""
    if not (place.folder / "log").exists():
        raise LinkError(f"there is no link{place.name and ' ' + place.name}: link up PROFILE")
    begin = (place.folder / "log").stat().st_size
    commands = os.open(place.folder / "commands", os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.write(commands, line.encode() + b"\n")
    finally:
        os.close(commands)
    return _answer(place, begin)


def _answer(place: Place, begin: int) -> str:
    deadline = time.monotonic() + PATIENCE_S
    with (place.folder / "log").open(newline="") as log:
        log.seek(begin)
        said = ""
        while time.monotonic() < deadline:
            said += log.read()
            head, mark, tail = said.replace("\r", "").rpartition("DONE ")
            if mark and "\n" in tail:
                if tail.strip() != "0":
                    raise LinkError(head.strip()[-500:] or f"status {tail.strip()}")
                return head
            if not place.alive("router"):
                raise LinkError(f"the router has ended: {said.strip()[-500:]}")
            time.sleep(0.005)
    raise LinkError(f"no answer within {PATIENCE_S:g} s: {said.strip()[-500:]}")
