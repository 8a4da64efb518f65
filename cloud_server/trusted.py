"""Where trusted keys come from: the key folder or a JWKS, read again in the background, never for a request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.keys import BadKeys
from cloud_server.tokens import Trusted, Verifier

log = logging.getLogger(__name__)
EVERY_S = 10.0  # between two readings
JWKS_LIFE_S = 300.0  # a JWKS is read again after that, or sooner for a kid that is new
JWKS_TIMEOUT_S = 5.0  # for all of it
MAX_JWKS = 64 << 10  # bytes
MAX_ABSENT = 1024  # unknown kids remembered, for which a JWKS is not read sooner

Keys = Mapping[str, Ed25519PublicKey]


class Source(Protocol):
    """A place that says whom to trust."""

    async def read(self, missed: frozenset[str]) -> Trusted:
        """What it says now; `missed` are the unknown kids that tokens named since the last time. Raises BadKeys."""


class KeyFolder:
    """A folder made by `cloud-server keys`."""

    def __init__(self, folder: Path):
        self._folder = folder

    async def read(self, missed: frozenset[str]) -> Trusted:
        return await asyncio.to_thread(keys.read, self._folder)


class Jwks:
    """A JWKS file or URL; `folder` is a key folder, for its revocations."""

    def __init__(self, place: str, folder: Path | None = None, clock: Callable[[], float] = time.monotonic):
        url = urlsplit(place)
        self._url = place if url.scheme in ("http", "https") else None
        if url.scheme == "http" and url.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ValueError(f"--jwks {place}: must be https, or on this machine")
        self._tls = httpx.create_ssl_context() if self._url else False
        self._place, self._folder, self._clock = place, folder, clock
        self._keys: Keys = {}
        self._due = clock()
        self._absent: set[str] = set()

    async def read(self, missed: frozenset[str]) -> Trusted:
        revoked = await asyncio.to_thread(keys.read_revoked, self._folder) if self._folder else {}
        if self._clock() >= self._due:
            self._absent.clear()
            await self._renew()
        elif missed - self._absent:
            await self._renew()
        for kid in missed - self._keys.keys():
            if len(self._absent) < MAX_ABSENT:
                self._absent.add(kid)
        return Trusted(self._keys, revoked, None)

    async def _renew(self) -> None:
        """A set that cannot be had leaves the one before in place, so that revocations are still read."""
        try:
            data = await self._fetched() if self._url else await asyncio.to_thread(self._file)
            self._keys = _public(data)
            self._due = self._clock() + JWKS_LIFE_S
        except (OSError, ValueError, RecursionError, httpx.HTTPError, httpx.InvalidURL) as error:
            why = BadKeys(f"{self._place}: {str(error) or type(error).__name__}")
            if not self._keys:
                raise why from None
            log.warning("%s; going on with the %d keys read before", why, len(self._keys))

    def _file(self) -> bytes:
        with Path(self._place).open("rb") as file:
            return _bounded(file.read(MAX_JWKS + 1))

    async def _fetched(self) -> bytes:
        assert self._url is not None
        data, raw = b"", {"accept-encoding": "identity"}  # nothing is unpacked before it is bounded
        async with (
            asyncio.timeout(JWKS_TIMEOUT_S),
            httpx.AsyncClient(verify=self._tls) as client,
            client.stream("GET", self._url, headers=raw) as answer,
        ):
            answer.raise_for_status()
            async for piece in answer.aiter_raw():
                data = _bounded(data + piece)
        return data


@asynccontextmanager
async def verifying(config: ServerConfig, every_s: float = EVERY_S) -> AsyncIterator[Verifier | None]:
    """Whom the server lets in, kept up to date while it runs; None when it lets in anyone. Raises BadKeys."""
    source: Source
    if config.jwks:
        source = Jwks(config.jwks, config.keys)
    elif config.keys:
        source = KeyFolder(config.keys)
    else:
        yield None
        return
    verifier = Verifier(await source.read(frozenset()), config.issuer, config.audience)
    task = asyncio.create_task(_keep(verifier, source, every_s))
    try:
        yield verifier
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _keep(verifier: Verifier, source: Source, every_s: float) -> None:
    told = ""
    while True:
        await asyncio.sleep(every_s)
        try:
            verifier.take(await source.read(verifier.missed()))
            told = ""
        except BadKeys as error:
            if str(error) != told:
                log.error("%s; going on with the keys read before", error)
            told = str(error)
        except Exception:  # whatever breaks, revocations must go on being read
            log.exception("reading the keys broke")


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_JWKS:
        raise ValueError(f"over {MAX_JWKS} bytes")
    return data


def _public(data: bytes) -> Keys:
    """The Ed25519 keys of a JWKS, by kid; others are left out. Raises ValueError when there is none."""
    found = json.loads(data)
    entries = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(entries, list):
        raise ValueError("not a JWKS")
    public: dict[str, Ed25519PublicKey] = {}
    for entry in entries:
        try:
            key = jwt.PyJWK(entry, "EdDSA").key
            if isinstance(key, Ed25519PublicKey) and isinstance(entry["kid"], str):
                public[entry["kid"]] = key
        except (jwt.PyJWTError, LookupError, TypeError, ValueError, AttributeError):
            continue
    if not public:
        raise ValueError("holds no Ed25519 key with a kid")
    return public
