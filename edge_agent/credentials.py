"""This phone's token: read from a private file, renewed in time, looked up by every session. And whom it trusts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import logging
import math
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from edge_agent.state import State
from protocol import private_files
from protocol.limits import MAX_TOKEN

log = logging.getLogger(__name__)
RENEW_AT = 2 / 3  # of a token's life
FIRST_RETRY_S, MOST_RETRY_S = 5.0, 60.0
NAP_S = 60.0  # timers stand still while a phone sleeps, so the clock is asked again
TIMEOUT_S = 10.0  # for one whole request
MAX_ANSWER = 64 << 10  # bytes


class Credentials:
    """`token` is looked up whenever it is needed; `renewing` keeps it valid, by asking `urls`."""

    def __init__(self, token: str = "", file: Path | None = None, urls: Sequence[str] = (), ca: bytes = b"",
                 clock: Callable[[], float] = time.time):  # fmt: skip
        self._token, self._file, self._urls, self._clock = token, file, urls, clock
        self._trust = trust_in(ca) if urls and ca else None
        self._told = ""
        self.due = _due(token)  # when to renew, as Unix time

    def token(self) -> str:
        return self._token

    @asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        """Renews in the background until left."""
        task = asyncio.create_task(self._keep()) if self._token and self._trust else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def renew(self) -> None:
        """Gets a new token for the one there is, and keeps it in the file too. Raises OSError with the reason."""
        assert self._trust is not None
        answer = _object(await ask("POST", self._urls, self._trust, self._token))
        token, life = answer.get("access_token"), answer.get("expires_in")
        if not isinstance(life, int | float) or not 0 < life < math.inf:
            raise OSError("the answer does not say how long the token lives")
        self._token, self.due = _checked(token), self._clock() + RENEW_AT * life
        if self._file is not None:
            await asyncio.to_thread(private_files.replace, self._file, f"{token}\n".encode())

    async def _keep(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            if (left := self.due - self._clock()) > 0:
                await asyncio.sleep(min(left, NAP_S))
                continue
            try:
                if self._file is not None:  # somebody may have put a better one there
                    self._token = read_token(self._file)
                await self.renew()
                retry_s, self._told = FIRST_RETRY_S, ""
            except (OSError, ValueError) as error:
                self._tell(f"the device token was not renewed: {error}")
                self.due = max(self.due, self._clock() + retry_s)
                retry_s = min(2 * retry_s, MOST_RETRY_S)

    def _tell(self, message: str) -> None:
        if message != self._told:
            log.warning("%s", message)
        self._told = message


def read_token(file: Path) -> str:
    """The token in a file that is its owner's alone. Raises OSError, ValueError that names the file."""
    with file.open("rb") as opened:
        mode = os.fstat(opened.fileno()).st_mode & 0o777
        data = opened.read(MAX_TOKEN + 2)
    if mode & 0o077:
        raise ValueError(f"{file} has mode {mode:04o}, and others may read the token: chmod 600 {file}")
    try:
        return _checked(data.decode("ascii").strip())
    except ValueError:
        raise ValueError(f"{file} holds no token: must be 1 to {MAX_TOKEN} printable characters") from None


def trust_in(ca: bytes) -> ssl.SSLContext:
    """Takes servers that this CA (PEM) certified. Raises ValueError."""
    try:
        return ssl.create_default_context(cadata=ca.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"the CA does not read: {error}") from None


def normal_fingerprint(text: str) -> str:
    """64 hex digits, of whatever notation of a SHA-256. Raises ValueError."""
    digits = re.sub(r"[\s:]", "", text).lower().removeprefix("sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise ValueError(f"--fingerprint {text!r}, must be the 64 hex digits of a SHA-256")
    return digits


def token_urls(given: Sequence[str], hosts: Sequence[str]) -> tuple[str, ...]:
    """Where to renew: what was given, or the usual port of every cloud. Raises ValueError."""
    for url in given:
        if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
            raise ValueError(f"--token-url {url!r}, must be https://HOST…")
    return tuple(given) or tuple(f"https://{host}/v1/token" for host in hosts)


async def pinned_ca(urls: Sequence[str], fingerprint: str, folder: Path) -> bytes:
    """PEM of the CA with this fingerprint: fetched once from the hosts of `urls`, then kept in the state folder.

    The fetch trusts nobody; the fingerprint decides. Raises OSError.
    """
    state = State(folder)
    kept = _pinned(str(state.read("ca").get("pem")), fingerprint)
    if kept is None:
        nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
        answer = await ask("GET", [urljoin(url, "/ca.pem") for url in urls], nobody)
        kept = _pinned(answer.decode("ascii", "replace"), fingerprint)
        if kept is None:
            raise OSError(f"the server's /ca.pem does not have the fingerprint {fingerprint}")
        state.write("ca", {"pem": kept})
    return kept.encode("ascii")


def _pinned(pem: str, fingerprint: str) -> str | None:
    """The certificate if it is the one, written anew from the bytes that were hashed: nothing else may come along."""
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.strip())
    except ValueError:
        return None
    return ssl.DER_cert_to_PEM_cert(der) if hashlib.sha256(der).hexdigest() == fingerprint else None


async def ask(method: str, urls: Sequence[str], trust: ssl.SSLContext, token: str = "") -> bytes:
    """The body that the first of `urls` gives with status 200. Raises OSError with the reason of the last."""
    import httpx  # late: it takes memory, and a phone without a token has no use for it

    failure = OSError("there is nobody to ask")
    headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})
    async with httpx.AsyncClient(verify=trust, trust_env=False) as client:
        for url in urls:
            try:
                async with asyncio.timeout(TIMEOUT_S), client.stream(method, url, headers=headers) as answer:
                    body = b""
                    async for piece in answer.aiter_raw():
                        body += piece
                        if len(body) > MAX_ANSWER:
                            raise OSError(f"over {MAX_ANSWER} bytes")
                if answer.status_code == 200:
                    return body
                failure = OSError(f"{url}: {answer.status_code} {_reason(body)}")
            except (OSError, httpx.HTTPError, httpx.InvalidURL) as error:
                failure = OSError(f"{url}: {str(error) or type(error).__name__}")
    raise failure


def _reason(body: bytes) -> str:
    with contextlib.suppress(OSError):
        error = _object(body).get("error")
        if isinstance(error, dict):
            return str(error.get("message"))[:200]
    return ""


def _object(body: bytes) -> dict[str, object]:
    """Raises OSError: a server that speaks nonsense is as good as none."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise OSError("the answer is no JSON object")
    return found


def _checked(token: object) -> str:
    """A token that fits a header. Raises ValueError."""
    if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token) or len(token) > MAX_TOKEN:
        raise ValueError("not a token")
    return token


def _due(token: str) -> float:
    """When to renew a token: at RENEW_AT of its life, at once if its clock or form is strange to us."""
    try:
        body = token.split(".")[1]
        claims = _object(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        issued, expires = float(str(claims["iat"])), float(str(claims["exp"]))
    except (OSError, LookupError, ValueError):
        return 0.0
    due = issued + RENEW_AT * (expires - issued)
    return due if issued <= time.time() + NAP_S and math.isfinite(due) else 0.0
