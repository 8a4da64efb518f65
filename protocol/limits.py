"""Every bound on what one peer may send another."""

from __future__ import annotations

from dataclasses import dataclass

MAX_FRAME = 1 << 20  # bytes of one frame
TENSOR_CHUNK = 256 << 10  # bytes of hidden states in one frame
CHANNELS_APART = 16  # of so many channels of 8-bit hidden states, one may be sent apart
REQUEST_ID = 16  # bytes
DIGEST = 16  # bytes
MAX_TOKEN = 4096  # bytes of a device token
MAX_MODEL_NAME = 256  # bytes
MAX_STOPS = 16
MAX_STOP = 256  # bytes of one stop string
MAX_KEYS = 1024  # of one JSON object
MAX_MESSAGES = 4096  # of one conversation
MAX_PARTS = 1024  # of one message
MAX_LOG = 131_072  # positions of one token log
MAX_DRAFT = 64  # tokens of one draft
MAX_MESSAGE = 1024  # bytes of a fault's message
HIDDEN_CREDIT = 4 << 20  # bytes of hidden states a session may have under way
RECEIVE_QUEUE = 64  # frames read from the network and not yet taken by their session
RECEIVE_BYTES = 2 << 20  # and their bytes; room for a frame of MAX_FRAME and its length in any case
CONNECTION_BYTES = 2 * RECEIVE_BYTES  # and those of all sessions on one connection
HIDDEN_WAIT = 60.0  # seconds a split session may owe hidden states that it has the credit for
STALLED = 15.0  # seconds without progress after which a peer that takes nothing is given up
EARLY_AGE_TOLERANCE = 10.0  # seconds between the two clocks' ideas of a ticket's age
TICKET_LIFE = 4 * 3600.0  # seconds
CHAIN_LIFE = 24 * 3600.0  # seconds that tickets may follow from tickets before a certificate is checked again
PING_AFTER = 0.25  # seconds without a datagram while a session is open
SILENCE_PAUSE = 3.0  # seconds without a sign of life after which a session is paused
SILENCE_END = 15.0  # and after which it is ended


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of an HTTP server; times in seconds."""

    body: int = 1 << 20  # bytes
    body_s: float = 60.0  # for all of a body to come; 1 MiB takes 42 s at 0.2 Mbit/s
    head_s: float = 10.0  # for a TLS handshake and for all of a request's head
    idle_s: int = 30  # for the next request to begin
    write_s: float = 20.0  # for a client to read a full buffer empty
    connections: int = 256  # at once
