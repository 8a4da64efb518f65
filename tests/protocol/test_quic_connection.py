"""What was mended in aioquic: early data survives a Retry and a refusal, windows open as frames are taken."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.connection import QuicConnection, QuicConnectionError
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, StreamDataReceived
from aioquic.quic.packet import QuicErrorCode
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.recovery import QuicPacketPacer, QuicPacketRecovery
from aioquic.quic.retry import QuicRetryTokenHandler
from aioquic.tls import Context
from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import CONNECTION_BYTES, RECEIVE_BYTES
from protocol.transport.base import ServerTls, Trust
from protocol.transport.quic_connection import MAX_CRYPTO, MAX_CRYPTO_GAPS, MAX_GAPS, MAX_STREAMS, MendedConnection
from protocol.transport.quic_ranges import SearchedRanges
from protocol.transport.tickets import ServerTickets
from support.certificates import Authority
from support.quic_pair import CLIENT, Pair, phone, ticket_of
from support.quic_raw import crypto, initial

REQUEST = bytes(range(256)) * 20  # 5 KB, five datagrams
INITIAL_WINDOW = 12_000


def completed(pair: Pair) -> HandshakeCompleted | None:
    """The server's handshake, if it is complete."""
    return next((event for event in pair.heard if isinstance(event, HandshakeCompleted)), None)


@pytest.fixture
def tickets() -> ServerTickets:
    return ServerTickets()


def test_a_request_in_early_data_arrives_with_the_first_flight(
    trust: Trust, tls: ServerTls, tickets: ServerTickets
) -> None:
    pair = Pair(phone(trust, ticket_of(trust, tls, tickets)), tls, tickets)
    pair.start()
    pair.client.send_stream_data(0, REQUEST)
    pair.up()
    assert pair.requested() == REQUEST
    assert completed(pair) is None
    pair.settle()
    assert completed(pair) == HandshakeCompleted("tandem/1", early_data_accepted=True, session_resumed=True)
    assert pair.requested() == REQUEST


def test_a_request_of_10_kb_fits_in_early_data(trust: Trust, tls: ServerTls, tickets: ServerTickets) -> None:
    pair = Pair(phone(trust, ticket_of(trust, tls, tickets)), tls, tickets)
    pair.start()
    pair.client.send_stream_data(0, REQUEST * 2)
    pair.up()
    assert pair.requested() == REQUEST * 2
    assert completed(pair) is None


@pytest.mark.parametrize("size", [len(REQUEST), 2 * len(REQUEST), 40 * len(REQUEST)])
def test_refused_early_data_costs_one_round_trip_and_no_window(
    trust: Trust, tls: ServerTls, tickets: ServerTickets, size: int
) -> None:
    restarted = Pair(phone(trust, ticket_of(trust, tls, tickets)), tls, ServerTickets())
    request = (REQUEST * 40)[:size]
    restarted.start()
    restarted.client.send_stream_data(0, request)
    restarted.up()
    assert restarted.requested() == b""
    restarted.down()
    restarted.up()
    assert completed(restarted) == HandshakeCompleted("tandem/1", early_data_accepted=False, session_resumed=False)
    first = restarted.requested()
    assert len(first) >= min(size, INITIAL_WINDOW - 1500)
    restarted.settle()
    assert restarted.requested() == request
    assert restarted.client.control.congestion_window >= INITIAL_WINDOW
    assert restarted.client.control.ssthresh is None
    assert restarted.client.control.bytes_in_flight == 0


@pytest.mark.parametrize("size", [len(REQUEST), 2 * len(REQUEST)])
def test_a_retry_costs_one_round_trip_and_keeps_early_data(
    trust: Trust, tls: ServerTls, tickets: ServerTickets, size: int
) -> None:
    pair = Pair(phone(trust, ticket_of(trust, tls, tickets)), tls, tickets, retry=QuicRetryTokenHandler())
    request = (REQUEST * 2)[:size]
    pair.start()
    pair.client.send_stream_data(0, request)
    pair.up()
    assert pair.server is None
    pair.down()
    pair.up()
    assert pair.requested() == request
    assert completed(pair) is None
    pair.settle()
    assert completed(pair) == HandshakeCompleted("tandem/1", early_data_accepted=True, session_resumed=True)
    assert pair.requested() == request
    assert pair.client.control.congestion_window >= INITIAL_WINDOW
    assert pair.client.control.bytes_in_flight == 0


def test_a_retry_and_a_refusal_together(trust: Trust, tls: ServerTls, tickets: ServerTickets) -> None:
    pair = Pair(phone(trust, ticket_of(trust, tls, tickets)), tls, ServerTickets(), retry=QuicRetryTokenHandler())
    pair.start()
    pair.client.send_stream_data(0, REQUEST)
    pair.settle()
    assert pair.requested() == REQUEST
    assert pair.client.control.ssthresh is None
    assert pair.client.control.bytes_in_flight == 0


def test_a_ticket_serves_one_connection(trust: Trust, tls: ServerTls, tickets: ServerTickets) -> None:
    ticket = ticket_of(trust, tls, tickets)
    accepted = []
    for _ in range(2):
        pair = Pair(phone(trust, ticket), tls, tickets)
        pair.start()
        pair.client.send_stream_data(0, REQUEST)
        pair.settle()
        assert pair.requested() == REQUEST
        done = completed(pair)
        assert done is not None
        assert (pair.server and pair.server.ticket_age_s is not None) == done.session_resumed
        accepted.append(done.early_data_accepted)
    assert accepted == [True, False]


def test_a_replayed_first_flight_brings_no_request(trust: Trust, tls: ServerTls, tickets: ServerTickets) -> None:
    pair = Pair(phone(trust, ticket_of(trust, tls, tickets)), tls, tickets)
    pair.start()
    pair.client.send_stream_data(0, REQUEST)
    flight = [data for data, _ in pair.client.datagrams_to_send(now=pair.now)]
    for data in flight:
        pair.arrive(data)
    assert pair.requested() == REQUEST
    attacker = Pair(pair.client, tls, tickets)
    for data in flight:
        attacker.arrive(data)
    assert attacker.requested() == b""


def connected(trust: Trust, tls: ServerTls) -> Pair:
    pair = Pair(phone(trust), tls)
    pair.start()
    pair.settle()
    return pair


def test_a_burst_of_the_initial_window_leaves_at_once(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    pair.client.send_stream_data(0, REQUEST * 2)
    pair.up()
    assert pair.requested() == REQUEST * 2


def test_a_stream_stops_at_its_window_and_goes_on_as_its_frames_are_taken(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    pair.client.send_stream_data(0, bytes(2 * RECEIVE_BYTES))
    pair.settle()
    assert len(pair.requested()) == RECEIVE_BYTES
    assert pair.client.unsent(0) == RECEIVE_BYTES
    assert pair.server
    assert not pair.server.taken(0, 1000)
    assert pair.server.taken(0, RECEIVE_BYTES // 2)
    pair.settle()
    assert len(pair.requested()) == RECEIVE_BYTES * 3 // 2


def test_a_peer_that_ignores_the_window_is_cut_off(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    pair.client.send_stream_data(0, b"x")
    pair.client._streams[0].max_stream_data_remote = 10 * RECEIVE_BYTES
    pair.client.send_stream_data(0, bytes(2 * RECEIVE_BYTES))
    pair.settle()
    assert len(pair.requested()) <= RECEIVE_BYTES
    assert pair.server
    assert isinstance(pair.server.ending, ConnectionTerminated)


def test_bytes_behind_a_gap_do_not_open_the_window(trust: Trust, tls: ServerTls) -> None:
    """What arrives behind a gap stays in memory, so a peer that leaves gaps must not get more room."""
    pair = connected(trust, tls)
    pair.client.send_stream_data(0, bytes(2 * RECEIVE_BYTES))
    pair.client._streams[0].sender._pending.subtract(0, 1000)  # never sent
    pair.settle()
    assert pair.requested() == b""
    assert pair.server
    assert pair.server._streams[0].receiver.highest_offset == RECEIVE_BYTES
    assert pair.server._streams[0].max_stream_data_local == RECEIVE_BYTES


def received_by(server: MendedConnection) -> int:
    """Bytes of streams that the server's memory may hold for its peer."""
    return sum(stream.receiver.highest_offset for stream in server._streams.values())


def test_all_streams_of_a_connection_share_one_window(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    assert pair.server
    streams = range(0, 4 * 8, 4)  # ids of client-initiated bidirectional ones
    for stream_id in streams:
        pair.client.send_stream_data(stream_id, bytes(RECEIVE_BYTES))
    pair.server.untaken = CONNECTION_BYTES  # as their readers count it, who take nothing
    pair.settle()
    assert received_by(pair.server) == CONNECTION_BYTES
    assert not pair.server.taken(0, 1000)
    pair.server.untaken = 0
    assert pair.server.taken(0, 1000)
    pair.settle()
    assert received_by(pair.server) == len(streams) * RECEIVE_BYTES


def test_a_peer_that_ignores_the_connections_window_is_cut_off(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    assert pair.server
    pair.server.untaken = CONNECTION_BYTES
    pair.client._remote_max_data = 10 * CONNECTION_BYTES
    for stream_id in range(0, 4 * 8, 4):
        pair.client.send_stream_data(stream_id, bytes(RECEIVE_BYTES))
    pair.settle()
    assert pair.server.ending is not None
    assert "connection data limit" in pair.server.ending.reason_phrase


def test_a_stream_of_nothing_but_gaps_ends_its_connection(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    pair.client.send_stream_data(0, bytes(4 * MAX_GAPS))
    for offset in range(0, 4 * MAX_GAPS, 2):
        pair.client._streams[0].sender._pending.subtract(offset, offset + 1)
    pair.settle()
    assert pair.server
    assert pair.server.ending is not None
    assert "gaps" in pair.server.ending.reason_phrase


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=40))
def test_ranges_that_are_searched_are_the_same(added: list[tuple[int, int]]) -> None:
    plain, searched = RangeSet(), SearchedRanges()
    for start, size in added:
        plain.add(start, start + size)
        searched.add(start, start + size)
        assert list(searched) == list(plain)


def half_open(trust: Trust, tls: ServerTls, *packets: bytes) -> MendedConnection:
    """A server that had these first packets."""
    pair = Pair(phone(trust), tls)
    for data in packets:
        pair.arrive(data)
    assert pair.server
    return pair.server


def test_a_handshake_of_nothing_but_gaps_ends(trust: Trust, tls: ServerTls) -> None:
    to, frames = os.urandom(8), [crypto(b"x", offset) for offset in range(0, 4 * MAX_CRYPTO_GAPS, 2)]
    packets = [initial(b"".join(frames[at::8]), to=to, number=at) for at in range(8)]
    server = half_open(trust, tls, *packets)
    assert server.ending is not None
    assert "gaps" in server.ending.reason_phrase


@pytest.mark.parametrize("offset", [MAX_CRYPTO, 2**40])
def test_a_handshake_without_end_is_cut_off(trust: Trust, tls: ServerTls, offset: int) -> None:
    """aioquic keeps half a megabyte behind a gap, and 16 MB of a message that is not complete."""
    server = half_open(trust, tls, initial(crypto(b"x", offset), to=os.urandom(8)))
    assert server.ending is not None
    assert server.ending.error_code == QuicErrorCode.CRYPTO_BUFFER_EXCEEDED


def test_a_silent_stranger_is_sent_three_times_its_bytes_in_all_time(
    trust: Trust, authority: Authority, tmp_path: Path
) -> None:
    """With a certificate that does not fit, probes, and a farewell."""
    pair = Pair(phone(trust), authority.issue(tmp_path, "localhost", *(f"host-{i}.example" for i in range(400))))
    pair.start()
    (first, _), *_ = pair.client.datagrams_to_send(now=pair.now)
    pair.arrive(first)
    server, sent, until = pair.server, 0, pair.now + 10
    assert server
    while (at := server.get_timer()) is not None and at < until:
        sent += sum(len(data) for data, _ in server.datagrams_to_send(now=pair.now))
        pair.now = max(pair.now, at)
        server.handle_timer(now=pair.now)
    server.close(reason_phrase="farewell " * 40)
    sent += sum(len(data) for data, _ in server.datagrams_to_send(now=pair.now))
    assert 2 * len(first) < sent <= 3 * len(first)


def test_only_so_many_streams_are_open_and_only_the_phone_opens_them(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    for number in range(MAX_STREAMS):
        assert pair.client.can_open
        pair.client.send_stream_data(4 * number, b"x")
    assert not pair.client.can_open
    pair.settle()
    assert len({e.stream_id for e in pair.heard if isinstance(e, StreamDataReceived)}) == MAX_STREAMS
    assert pair.server
    assert not pair.server.can_open


def test_nothing_can_be_opened_before_the_first_handshake(trust: Trust, tls: ServerTls, tickets: ServerTickets) -> None:
    cold, warm = phone(trust), phone(trust, ticket_of(trust, tls, tickets))
    for client in (cold, warm):
        client.connect(CLIENT, now=0.0)
    assert not cold.can_open
    assert warm.can_open


def test_bytes_are_counted(trust: Trust, tls: ServerTls) -> None:
    pair = connected(trust, tls)
    assert pair.server
    assert pair.client.bytes_sent == pair.server.bytes_received > 1200
    assert pair.server.bytes_sent == pair.client.bytes_received > 1200


def test_the_private_names_are_still_there(trust: Trust, tls: ServerTls) -> None:
    """Fails when aioquic changes what the mends rely on: look at each mend again before changing this list."""
    pair = connected(trust, tls)
    pair.client.send_stream_data(0, b"x")
    connection, stream = pair.client, pair.client._streams[0]
    for owner, names in {
        connection: "_close_at _close_event _crypto_streams _handshake_complete _is_client _local_max_data "
        "_local_max_streams_bidi _local_max_streams_uni _local_next_stream_id_bidi _loss _network_paths _pacing_at "
        "_remote_max_streams_bidi _spaces _state _streams tls",
        connection._network_paths[0]: "bytes_received bytes_sent is_validated",
        connection._local_max_data: "sent used value",
        connection._loss: "_cc _pacer",
        connection._loss._pacer: "_max_datagram_size",
        stream: "max_stream_data_local max_stream_data_local_sent",
        stream.sender: "_buffer_stop highest_offset buffer_is_empty",
        stream.receiver: "_buffer _ranges is_finished",
        connection._local_max_streams_bidi: "value sent",
    }.items():
        assert not [name for name in names.split() if not hasattr(owner, name)]
    assert hasattr(stream.receiver._ranges, "_RangeSet__ranges")
    for function, parameters in {
        QuicConnection._connect: "now",
        QuicConnection._initialize: "peer_cid",
        QuicConnection._handle_crypto_frame: "context frame_type buf",
        QuicConnection._handle_stream_frame: "context frame_type buf",
        QuicConnection._write_connection_limits: "builder space",
        QuicConnection._write_stream_limits: "builder space stream",
        QuicConnection._on_max_stream_data_delivery: "delivery stream",
        QuicPacketRecovery._on_packets_lost: "congestion_event now packets persistent_congestion space",
        QuicPacketPacer.next_send_time: "now",
        QuicPacketPacer.update_after_send: "now",
        QuicPacketPacer.update_rate: "congestion_window smoothed_rtt",
        QuicConnectionProtocol._transmit_soon: "",
        QuicConnectionProtocol.transmit: "",
        QuicServer._connection_id_issued: "cid protocol",
        QuicServer._connection_id_retired: "cid protocol",
        QuicServer._connection_terminated: "protocol",
    }.items():
        assert list(inspect.signature(function).parameters)[1:] == parameters.split()
    for owner, words in {
        QuicConnectionProtocol: "self._loop self._quic self._timer self._transport _connection_id_issued_handler "
        "_connection_id_retired_handler _connection_terminated_handler",
        QuicServer: "self._configuration self._protocols self._retry self._transport self._loop",
        QuicConnection: "self._connect(now=now) self._initialize(self._peer_cid.cid) (self._handle_crypto_frame, "
        "(self._handle_stream_frame, self._write_stream_limits( self._write_connection_limits(builder=builder,",
    }.items():
        assert not [word for word in words.split() if word not in inspect.getsource(owner)]
    assert "in self._supported_groups" in inspect.getsource(Context)
    assert issubclass(QuicConnectionError, Exception)
