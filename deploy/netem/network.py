"""The two namespaces `edge` and `cloud` at the ends of a link."""

from __future__ import annotations

from pathlib import Path

import router
from place import LinkError, Place, call
from router import Kind

SUBNETS = {"edge0": 1, "edge1": 3, "cloud0": 2}  # 10.77.N.0/24
ENDS = {"edge0": ("edge", "net0"), "edge1": ("edge", "net1"), "cloud0": ("cloud", "net0")}


def up(place: Place, kind: Kind | None) -> Kind:
    """Both namespaces and a router between them; what is left of a former link of this name is removed."""
    router.need(router.PROGRAMS)
    place.clear()
    for role in ("edge", "cloud", "router"):
        if Path("/run/netns", place.namespace(role)).exists():
            raise LinkError(f"there is a namespace {place.namespace(role)} that is not this program's: choose a --name")
    place.folder.mkdir(mode=0o755)
    try:
        for role in ("edge", "cloud", "router"):
            _namespace(place.namespace(role))
        kind = kind or router.best_kind(place.namespace("router"))
        for port in router.PORTS:
            _connect(place, port)
        router.start(place, kind)
        call("ip", "-n", place.namespace("edge"), "link", "set", "net1", "down")
        _route(place, "edge", 1, "net0")
        _route(place, "cloud", 2, "net0")
    except BaseException:
        place.clear()
        raise
    return kind


def _namespace(name: str) -> None:
    """With loopback only; interfaces to come have no IPv6, which would talk on the link by itself."""
    call("ip", "netns", "add", name)
    call("ip", "-n", name, "link", "set", "lo", "up")
    quiet = "f=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $f ] || echo 1 >$f"
    call("ip", "netns", "exec", name, "sh", "-c", quiet)


def _connect(place: Place, port: str) -> None:
    """A pair of interfaces between the router and a namespace. Large segments are cut before they get on the link."""
    (role, name), number = ENDS[port], SUBNETS[port]
    call("ip", "-n", place.namespace("router"), "link", "add", port, "gso_max_segs", "1", "type", "veth",
         "peer", "name", name, "netns", place.namespace(role))  # fmt: skip
    lines = [
        f"link set {name} address 02:77:00:00:{number:02}:01 gso_max_segs 1 up",
        f"address add 10.77.{number}.1/24 dev {name}",
    ]
    call("ip", "-n", place.namespace(role), "-batch", "-", given="\n".join(lines) + "\n")


def _route(place: Place, role: str, number: int, name: str) -> None:
    """Neighbours are fixed: a lost ARP reply would be a second without a network."""
    near = (254, 253) if role == "cloud" else (254,)
    lines = [
        f"neighbour replace 10.77.{number}.{host} lladdr 02:77:00:00:{number:02}:fe dev {name} nud permanent"
        for host in near
    ]
    lines.append(f"route replace default via 10.77.{number}.254 dev {name}")
    call("ip", "-n", place.namespace(role), "-batch", "-", given="\n".join(lines) + "\n")


def current(place: Place) -> str:
    """The interface of `edge` that has the default route."""
    words = call("ip", "-n", place.namespace("edge"), "route", "show", "default").split()
    return words[words.index("dev") + 1] if "dev" in words else ""


def move(place: Place, to: str = "") -> str:
    """The other interface of `edge` (or `to`) comes up and gets the routes, then this one goes down; its name."""
    here = current(place)
    there = to or ("net0" if here == "net1" else "net1")
    edge = place.namespace("edge")
    if here != there:
        call("ip", "-n", edge, "link", "set", there, "up")
        _route(place, "edge", SUBNETS["edge" + there[-1]], there)
        call("ip", "-n", edge, "link", "set", "net0" if there == "net1" else "net1", "down")
    return there


def forget(place: Place) -> None:
    """Empties what the two kernels have learnt about the path."""
    for role in ("edge", "cloud"):
        call("ip", "-n", place.namespace(role), "route", "flush", "cache")
        call("ip", "-n", place.namespace(role), "tcp_metrics", "flush")
