"""The router: where it runs, and telling it something."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Literal

from place import PATIENCE_S, LinkError, Place, call

Kind = Literal["kernel", "guest"]
SCRIPT = Path(__file__).with_name("router.sh").resolve()
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
    """The router's ports are there when it returns; in the router's namespace they have the same names."""
    namespace, folder = place.namespace("router"), place.folder
    os.mkfifo(folder / "commands")
    if kind == "guest":
        need(GUEST_PROGRAMS)
        for port in PORTS:
            call("ip", "-n", namespace, "tuntap", "add", port, "mode", "tap")
            call("ip", "-n", namespace, "link", "set", port, "up")
        init = folder / "init"
        init.write_text(f"#!/bin/bash\nexec {shlex.quote(str(SCRIPT))} guest -\n")
        init.chmod(0o755)
        ports = [f"vec{n}:transport=tap,ifname={port},depth=256,gro=0" for n, port in enumerate(PORTS)]
        command = ["linux.uml", "mem=96M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}",
                   *ports, "con=null", "con0=fd:0,fd:1", "quiet"]  # fmt: skip
    else:
        command = [str(SCRIPT), "kernel", str(folder)]
    commands = os.open(folder / "commands", os.O_RDWR)  # also for writing, so that it never ends
    try:
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, "unshare", "--pid", "--fork", "--kill-child", *command],
                stdin=commands, stdout=log, stderr=log, start_new_session=True, cwd="/",
            )  # fmt: skip
    finally:
        os.close(commands)
    place.remember(process.pid)
    try:
        _answer(place, 0, process)
    except LinkError as error:
        raise LinkError(f"the router ({kind}) did not come up: {error}") from None


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
    return _answer(place, begin, None)


def _answer(place: Place, begin: int, process: subprocess.Popen[bytes] | None) -> str:
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
            if process and process.poll() is not None:
                raise LinkError(said.strip()[-500:] or f"it ended with {process.returncode}")
            time.sleep(0.005)
    raise LinkError(f"no answer within {PATIENCE_S:g} s: {said.strip()[-500:]}")
