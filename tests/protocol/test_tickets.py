"""Tickets: on disk for the phone, in memory for the server, each taken once."""

from __future__ import annotations

import stat
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aioquic.tls import CipherSuite, SessionTicket
from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import CHAIN_LIFE, TICKET_LIFE
from protocol.transport import tickets as module
from protocol.transport.base import Address, Trust
from protocol.transport.tickets import KEPT, Kept, ServerTickets, TicketStore

HERE, THERE = Address("192.0.2.1", 4433), Address("192.0.2.2", 4433)
TRUST = Trust(b"a CA")


def ticket(label: bytes = b"label", age: float = 1.0, life: float = 86400.0) -> SessionTicket:
    issued = datetime.now(UTC) - timedelta(seconds=age)
    return SessionTicket(
        age_add=7,
        cipher_suite=CipherSuite.AES_128_GCM_SHA256,
        not_valid_after=issued + timedelta(seconds=life),
        not_valid_before=issued,
        resumption_secret=b"secret",
        server_name="localhost",
        ticket=label,
        max_early_data_size=0xFFFFFFFF,
        other_extensions=[(57, b"parameters")],
    )


def kept(label: bytes = b"label", checked: float = 1.0, **of: float) -> Kept:
    """`checked` is so many seconds ago."""
    return Kept(ticket(label, **of), time.time() - checked)


@pytest.fixture
def store(folder: Path) -> TicketStore:
    return TicketStore(folder)


def test_a_ticket_comes_back_as_it_was_once(store: TicketStore) -> None:
    put = kept()
    store.add(HERE, TRUST, put)
    taken, ends = store.take(HERE, TRUST), put.ticket.not_valid_before + timedelta(seconds=TICKET_LIFE)
    assert taken == Kept(replace(put.ticket, not_valid_after=ends), put.checked)
    assert store.take(HERE, TRUST) is None


def test_another_process_finds_what_this_one_left(store: TicketStore, folder: Path) -> None:
    store.add(HERE, TRUST, kept())
    assert TicketStore(folder).take(HERE, TRUST) is not None
    assert store.take(HERE, TRUST) is None


def test_nobody_else_can_read_them(store: TicketStore, folder: Path) -> None:
    store.add(HERE, TRUST, kept())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_the_newest_of_several_is_taken_first_and_few_are_kept(store: TicketStore, folder: Path) -> None:
    for number in range(KEPT + 3):
        store.add(HERE, TRUST, kept(bytes([number])))
    labels = []
    while (taken := store.take(HERE, TRUST)) is not None:
        labels.append(taken.ticket.ticket[0])
    assert labels == [6, 5, 4, 3]
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("address", "trust"),
    [(THERE, TRUST), (HERE, Trust(b"another CA")), (HERE, Trust(b"a CA", "another.name"))],
    ids=["address", "ca", "name"],
)
def test_a_ticket_is_for_one_replica_and_one_trust(store: TicketStore, address: Address, trust: Trust) -> None:
    store.add(HERE, TRUST, kept())
    assert store.take(address, trust) is None
    store.drop(address, trust)
    assert store.take(HERE, TRUST) is not None


def test_dropping_forgets_all_of_a_replica(store: TicketStore, folder: Path) -> None:
    for address in (HERE, HERE, THERE):
        store.add(address, TRUST, kept())
    store.drop(HERE, TRUST)
    assert store.take(HERE, TRUST) is None
    assert store.take(THERE, TRUST) is not None


@pytest.mark.parametrize(
    "late",
    [
        {"age": TICKET_LIFE + 1}, {"age": 100, "life": 99}, {"age": -3600},
        {"checked": CHAIN_LIFE + 1}, {"checked": -3600}, {"checked": float("nan")},
    ],
)  # fmt: skip
def test_a_ticket_out_of_its_time_is_no_ticket(store: TicketStore, folder: Path, late: dict[str, float]) -> None:
    store.add(HERE, TRUST, kept(**late))
    assert store.take(HERE, TRUST) is None
    assert not list(folder.iterdir())


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"age_add":', b"\xff\xfe", b'{"ticket": 3}'])
def test_a_spoiled_file_is_no_ticket_and_the_next_is_taken(store: TicketStore, folder: Path, content: bytes) -> None:
    for label in (b"older", b"newer"):
        store.add(HERE, TRUST, kept(label))
    max(folder.iterdir()).write_bytes(content)
    taken = store.take(HERE, TRUST)
    assert taken is not None
    assert taken.ticket.ticket == b"older"


@given(st.text() | st.dictionaries(st.text(), st.integers() | st.text() | st.none()).map(str))
def test_anything_that_is_no_ticket_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        module._load(text)


def test_an_absent_or_unusable_folder_is_an_empty_store(tmp_path: Path) -> None:
    assert TicketStore(tmp_path / "absent").take(HERE, TRUST) is None
    TicketStore(tmp_path / "absent").drop(HERE, TRUST)
    (tmp_path / "file").write_text("not a folder")
    broken = TicketStore(tmp_path / "file")
    broken.add(HERE, TRUST, kept())
    assert broken.take(HERE, TRUST) is None


def test_the_server_knows_a_ticket_once() -> None:
    known = ServerTickets()
    known.add(ticket(b"one"))
    issued = known.take(b"one")
    assert issued is not None
    assert issued.ticket.ticket == b"one"
    assert known.take(b"one") is None
    assert known.take(b"another") is None


def test_the_server_forgets_the_oldest() -> None:
    known = ServerTickets(limit=3)
    for number in range(5):
        known.add(ticket(bytes([number])))
    assert len(known) == 3
    assert [known.take(bytes([number])) is not None for number in range(5)] == [False, False, True, True, True]


def test_the_server_takes_no_ticket_past_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    known, now = ServerTickets(), 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    known.add(ticket(b"a"))
    known.add(ticket(b"b"))
    now += TICKET_LIFE
    assert known.take(b"a") is not None
    now += 1
    assert known.take(b"b") is None
