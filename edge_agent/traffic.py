"""What a session moves: bytes of its frames, and the packets around them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_agent.conditions import Cloud
from edge_agent.job import Job
from protocol.frames import position_bytes

PACKET = 1200  # bytes of payload a packet carries
PACKET_OVERHEAD = 65  # bytes of IP, UDP and QUIC headers and tag around it
FIRST_WINDOW = 12_000  # bytes that may be under way on a new connection (ten packets: RFC 9002, section 7.2)
OPEN_BYTES = 180  # of an Open frame without token ids, stop strings and device token
HIDDEN_BYTES = 24  # around the hidden states of a frame
DRAFT_BYTES = 12  # of a Draft frame without its token ids
TOKEN_BYTES = 14  # of a frame that carries one token
ADMITTED_BYTES = 75
LOAD_BYTES = 60  # of the one that follows at once
DONE_BYTES = 30


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes up with the prompt, up with the answer, and down, with packet overhead; round trips after a handshake.

    `covered`: of the bytes up, those that are sent while a site computes, and so take no time.
    """

    prompt: float = 0.0
    answer: float = 0.0
    down: float = 0.0
    trips: float = 0.0
    covered: float = 0.0

    @property
    def up(self) -> float:
        return self.prompt + self.answer


def on_the_wire(size: int) -> int:
    """Bytes with the overhead of the packets that carry them."""
    return size + PACKET_OVERHEAD * math.ceil(size / PACKET)


def digits(vocabulary: int) -> int:
    """Bytes of a token id, at most: a varint."""
    return max(1, math.ceil(math.log(vocabulary, 128)))


def cloud_opening(job: Job, vocabulary: int, token_bytes: int) -> int:
    """Bytes of an Open with the token ids."""
    return on_the_wire(_open_bytes(job, token_bytes) + digits(vocabulary) * len(job.prompt))


def split_opening(job: Job, width: int, token_bytes: int) -> int:
    """Bytes of an Open without them, and of the prompt's hidden states."""
    prompt = position_bytes(width, job.wish.hidden_bits) * len(job.prompt)
    return on_the_wire(_open_bytes(job, token_bytes) + HIDDEN_BYTES + prompt)


def hidden_traffic(positions: int, width: int) -> int:
    """Bytes of the hidden states of so many positions of an answer, which go in bf16; none: no frame."""
    return on_the_wire(HIDDEN_BYTES + 2 * width * positions) if positions else 0


def down_traffic(frames: float, tokens: float, vocabulary: int) -> float:
    """Bytes of the whole way down: `tokens` in so many frames."""
    more = digits(vocabulary) * max(0.0, tokens - frames)
    around = on_the_wire(ADMITTED_BYTES) + on_the_wire(LOAD_BYTES) + on_the_wire(DONE_BYTES)
    return around + frames * on_the_wire(TOKEN_BYTES) + more


def _open_bytes(job: Job, token_bytes: int) -> int:
    return OPEN_BYTES + token_bytes + sum(len(stop.encode()) + 2 for stop in job.stop)


def opening_trips(cloud: Cloud, first_flight: float) -> float:
    """Round trips before an answer can begin: the handshake, and what slow start adds for a large first flight."""
    if not cloud.cold:
        return float(cloud.handshake_trips)
    # n windows, each twice the one before, carry (2^n - 1) first windows; the first of them costs no extra trip.
    return cloud.handshake_trips + max(0, math.ceil(math.log2(1 + first_flight / FIRST_WINDOW)) - 1)
