"""Session tickets: the phone's on disk, the server's in memory; each is used once."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aioquic.tls import CipherSuite, SessionTicket

from protocol import private_files
from protocol.limits import CHAIN_LIFE, TICKET_LIFE
from protocol.transport.base import Address, Trust

log = logging.getLogger(__name__)

KEPT = 4  # tickets per replica


@dataclass(frozen=True, slots=True)
class Kept:
    """A ticket, and when the certificate of its server was last checked (Unix time): a resumed handshake does not."""

    ticket: SessionTicket
    checked: float


class TicketStore:
    """A folder (0700), one file (0600) per ticket; taking one removes its file, so that no two processes use it.

    A folder that cannot be written is logged, once, and holds nothing: tickets only save time.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._failing = False

    def add(self, address: Address, trust: Trust, kept: Kept) -> None:
        """Keeps a ticket, and at most KEPT for this replica."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = self.folder / f"{_key(address, trust)}-{time.time_ns():020}.json"
            private_files.replace(file, _dump(kept).encode())
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s: tickets are not kept, going on without: %s", self.folder, error.strerror)
            self._failing = True
        self._remove(self._newest_first(address, trust)[KEPT:])

    def take(self, address: Address, trust: Trust) -> Kept | None:
        """The newest ticket that has not expired, no longer in the store; a file that does not read is no ticket."""
        for path in self._newest_first(address, trust):
            try:
                text = path.read_text()
                path.unlink()  # fails if another process was first
                kept = _load(text)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                log.warning("%s is not a usable ticket: %s", path, error)
                self._remove([path])
                continue
            if kept.ticket.is_valid and 0 <= time.time() - kept.checked < CHAIN_LIFE:
                return kept
        return None

    def drop(self, address: Address, trust: Trust) -> None:
        """Forgets this replica's tickets, after it refused one."""
        self._remove(self._newest_first(address, trust))

    def _newest_first(self, address: Address, trust: Trust) -> list[Path]:
        return sorted(self.folder.glob(f"{_key(address, trust)}-*.json"), reverse=True)

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s was not removed: %s", path, error)


def _key(address: Address, trust: Trust) -> str:
    """Names the replica and what was trusted: a resumed handshake does not check the certificate again."""
    name = f"{address} {trust.server_name or address.host} ".encode()
    return hashlib.sha256(name + hashlib.sha256(trust.ca).digest()).hexdigest()[:32]


def _dump(kept: Kept) -> str:
    ticket = kept.ticket
    return json.dumps(
        {
            "checked": kept.checked,
            "age_add": ticket.age_add,
            "cipher_suite": int(ticket.cipher_suite),
            "not_valid_after": ticket.not_valid_after.timestamp(),
            "not_valid_before": ticket.not_valid_before.timestamp(),
            "resumption_secret": ticket.resumption_secret.hex(),
            "server_name": ticket.server_name,
            "ticket": ticket.ticket.hex(),
            "max_early_data_size": ticket.max_early_data_size,
            "other_extensions": [[kind, data.hex()] for kind, data in ticket.other_extensions],
        }
    )


def _load(text: str) -> Kept:
    """Raises ValueError for anything that `_dump` did not write; a ticket lives for TICKET_LIFE at most."""
    try:
        got = json.loads(text)
        issued = datetime.fromtimestamp(got["not_valid_before"], UTC)
        expires = datetime.fromtimestamp(got["not_valid_after"], UTC)
        ticket = SessionTicket(
            age_add=int(got["age_add"]),
            cipher_suite=CipherSuite(got["cipher_suite"]),
            not_valid_after=min(expires, issued + timedelta(seconds=TICKET_LIFE)),
            not_valid_before=issued,
            resumption_secret=bytes.fromhex(got["resumption_secret"]),
            server_name=str(got["server_name"]),
            ticket=bytes.fromhex(got["ticket"]),
            max_early_data_size=got["max_early_data_size"],
            other_extensions=[(int(kind), bytes.fromhex(data)) for kind, data in got["other_extensions"]],
        )
        return Kept(ticket, float(got["checked"]))
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"not a ticket: {error!r}") from None


@dataclass(frozen=True, slots=True)
class Issued:
    """A ticket that a server gave out, and when, by the monotonic clock."""

    ticket: SessionTicket
    at: float


class ServerTickets:
    """What one server gave out and has not seen again: the oldest goes when it is full.

    `refused` is called for one that is not known, not any more, or too old.
    """

    def __init__(self, limit: int = 10_000, refused: Callable[[], None] = lambda: None):
        self._limit, self._refused = limit, refused
        self._issued: OrderedDict[bytes, Issued] = OrderedDict()

    def __len__(self) -> int:
        return len(self._issued)

    def add(self, ticket: SessionTicket) -> None:
        self._issued[ticket.ticket] = Issued(ticket, time.monotonic())
        while len(self._issued) > self._limit:
            self._issued.popitem(last=False)

    def take(self, label: bytes) -> Issued | None:
        """The ticket of this label, once, and only within TICKET_LIFE."""
        issued = self._issued.pop(label, None)
        if issued is None or time.monotonic() - issued.at > TICKET_LIFE:
            self._refused()
            return None
        return issued
