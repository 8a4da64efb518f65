"""What can go wrong between the two programs, as one small tree."""

from __future__ import annotations

import enum


class FaultCode(enum.IntEnum):
    """Why a session was refused or ended; the numbers are those of split.proto."""

    BAD_FRAME = 1
    BAD_REQUEST = 2
    UNAUTHENTICATED = 3
    WRONG_MODEL = 4
    WRONG_TOKENIZER = 5
    REPLAYED = 6
    SUPERSEDED = 7
    BUSY = 8
    DRAINING = 9
    OVER_CREDIT = 10
    NOT_FINITE = 11
    SILENT = 12
    INTERNAL = 13
    QUOTA = 14
    CONTEXT_LENGTH_EXCEEDED = 15


class WireError(Exception):
    """Anything that ends a session from outside it."""


class LinkLost(WireError):
    """The path to the peer is gone, or never came up; what was under way may be tried again elsewhere."""


class SessionFault(WireError):
    """A peer's refusal, in words; sent as a `Fault` frame and raised again on the other side."""

    def __init__(self, code: FaultCode, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.code, self.message, self.retry_after_s = code, message, retry_after_s

    def __str__(self) -> str:
        return f"{self.code.name.lower()}: {self.message}"


class BadFrame(SessionFault):
    """Bytes that are no frame, or a frame out of bounds."""

    def __init__(self, message: str):
        super().__init__(FaultCode.BAD_FRAME, message)


class UnverifiedServer(LinkLost):
    """The server's certificate is not one the phone trusts."""
