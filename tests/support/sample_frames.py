"""Frames that are right, to send or to spoil."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from protocol.frames import Digests, Hidden, Open, Scaled, Tokens, WireSampling, encode
from protocol.limits import MAX_FRAME

DIGESTS = Digests(b"w" * 16, b"t" * 16, b"n" * 16)
OPEN = Open(
    request_id=b"r" * 16,
    attempt=0,
    model="a model",
    digests=DIGESTS,
    split=0,
    sampling=WireSampling(),
    max_tokens=8,
    prompt_length=3,
    log_length=3,
    log=(1, 2, 3),
)
# two positions of 32 channels in 8 bits, two of them apart
HIDDEN_8 = Hidden(7, 2, 32, bytes(range(64)), Scaled(b"\0\0\x80\x3f" * 2, (3, 31), b"\x80\x3f" * 4))


def opening(**changes: Any) -> Open:
    """OPEN, changed."""
    return replace(OPEN, **changes)


def hidden_8(**changes: Any) -> Hidden:
    """HIDDEN_8, changed, in what makes numbers of its integers too."""
    assert HIDDEN_8.scaled is not None
    own = {name: changes.pop(name) for name in ("scales", "apart", "apart_data") if name in changes}
    return replace(HIDDEN_8, scaled=replace(HIDDEN_8.scaled, **own), **changes)


def opening_of(size: int) -> Open:
    """An Open with a log of so many ids of one byte each."""
    return opening(log=(1,) * size, log_length=size, prompt_length=size)


def tokens_of(size: int) -> Tokens:
    """Tokens whose encoded frame has exactly so many bytes; MAX_FRAME at most."""
    assert 1000 < size <= MAX_FRAME
    ids = (1,) * (size - len(encode(Tokens(7, (1,) * 999))) + 999 - 4)
    spare = size - len(encode(Tokens(7, ids)))
    return Tokens(7, ids + (1,) * spare)
