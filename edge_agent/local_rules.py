"""Who may ask the agent: no web page of another origin, no name that was made to point here, nobody without the key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from protocol.api_errors import ApiError, shown
from protocol.http_gate import bearer

PUBLIC = frozenset({"/health", "/ready", "/"})  # asked without the key
PAGE = "/page/"  # and the page's files, which hold nothing and ask for it
PORTS = {"http": 80, "https": 443}


class LocalRules:
    """`port` is the agent's own, None for a Unix socket, which no web page can reach.

    `allow` are further `NAME` or `NAME:PORT` that clients may call it by. Raises ValueError for one that is neither.
    """

    def __init__(self, host: str, port: int | None, allow: Sequence[str] = (), key: str = ""):
        self._port, self._key = port, key.encode()
        self._allowed = {_place(one) for one in allow}
        if port is not None:
            self._allowed |= {("localhost", port), (host.lower(), port)} - {("0.0.0.0", port), ("::", port)}

    @property
    def locked(self) -> bool:
        """Clients need the key."""
        return bool(self._key)

    def check(self, http: HTTPConnection) -> None:
        """Raises ApiError 401 or 403."""
        host, origin = http.headers.get("host", ""), http.headers.get("origin")
        if self._port is not None and not self._ours("http", host):
            message = f"Host {shown(host)} is no address of this agent; --allow-host would make it one"
            raise ApiError(403, message, param="host", code="wrong_host")
        if origin is not None and not self._is_own(origin):
            message = f"Origin {shown(origin)}: web pages may not ask this agent"
            raise ApiError(403, message, param="origin", code="wrong_origin")
        path = http.scope["path"]
        free = not self._key or path in PUBLIC or path.startswith(PAGE)
        if not (free or hmac.compare_digest(bearer(http).encode("latin-1"), self._key)):
            raise ApiError(401, "this agent wants its key as a bearer token", code="wrong_key")

    def _is_own(self, origin: str) -> bool:
        scheme, _, authority = origin.partition("://")
        return scheme in PORTS and self._ours(scheme, authority)

    def _ours(self, scheme: str, authority: str) -> bool:
        try:
            name, port = _place(authority)
        except ValueError:
            return False
        port = port or PORTS[scheme]
        return bool({(name, port), (name, None)} & self._allowed) or (port == self._port and _is_loopback(name))


def _place(authority: str) -> tuple[str, int | None]:
    """`NAME[:PORT]` in its parts, the name in lower case, an IPv6 address without brackets. Raises ValueError."""
    try:
        parts = urlsplit(f"//{authority}")
        if parts.hostname and parts.netloc == authority and "@" not in authority:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ValueError(f"{shown(authority)} is neither NAME nor NAME:PORT")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
