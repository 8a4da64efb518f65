"""What one device may use: token buckets that hold a minute's worth, and sessions open at once."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import FaultCode, SessionFault

MAX_DEVICES = 16_384  # accounts kept; buckets of a device not seen for a minute are full again
REQUESTS, PROMPT, OUTPUT = "requests", "prompt tokens", "output tokens"


@dataclass(frozen=True, slots=True)
class Quota:
    """For each device, 0 for no limit."""

    requests: int = 0  # a minute
    prompt_tokens: int = 0  # a minute
    output_tokens: int = 0  # a minute
    sessions: int = 0  # open at once


UNLIMITED = Quota()


@dataclass(slots=True)
class _Bucket:
    """May go below nothing, by what was known only afterwards or was more than it can hold."""

    size: int
    level: float
    at: float

    def fill(self, now: float) -> None:
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.size / 60), now

    def wait_s(self, amount: float) -> float:
        """Until it holds `amount`, or all it can hold."""
        short = min(amount, self.size) - self.level
        return short * 60 / self.size if short > 1e-6 else 0.0


@dataclass(slots=True)
class _Account:
    """One device's; a limit of 0 has no bucket."""

    buckets: dict[str, _Bucket]
    sessions: int = 0

    def take(self, name: str, amount: int) -> None:
        if name in self.buckets:
            self.buckets[name].level -= amount


class Quotas:
    """The accounts of all devices, charged by the wire and by HTTP alike."""

    def __init__(self, quota: Quota, clock: Callable[[], float] = time.monotonic):
        sizes = {REQUESTS: quota.requests, PROMPT: quota.prompt_tokens, OUTPUT: quota.output_tokens}
        self._sizes = {name: size for name, size in sizes.items() if size}
        self._sessions, self._clock = quota.sessions, clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def __len__(self) -> int:
        return len(self._accounts)

    def enter(self, device: str, prompt_tokens: int, replacing: bool = False) -> None:
        """Charges a request and counts its session until `leave`; `replacing` takes over one that is about to be left.

        Raises SessionFault QUOTA, having charged nothing, that names the limit and the wait.
        """
        self.check(device, prompt_tokens, replacing)
        account = self._account(device)
        account.take(REQUESTS, 1)
        account.take(PROMPT, prompt_tokens)
        account.sessions += 1

    def check(self, device: str, prompt_tokens: int, replacing: bool = False) -> None:
        """Raises what `enter` would, and charges nothing."""
        account = self._account(device)
        if self._sessions and account.sessions >= self._sessions and not replacing:
            raise _over(f"{account.sessions} sessions of this device are open, limit {self._sessions}", 1.0)
        for name, amount in ((REQUESTS, 1), (PROMPT, prompt_tokens), (OUTPUT, 1)):
            bucket = account.buckets.get(name)
            if bucket and (wait := bucket.wait_s(amount)):
                raise _over(f"this device's limit of {bucket.size} {name} a minute is used up, wait {wait:.1f} s", wait)

    def spent(self, device: str, output_tokens: int) -> None:
        """Charges tokens of an answer. That may end in debt, which the device's next request waits for."""
        self._account(device).take(OUTPUT, output_tokens)

    def leave(self, device: str) -> None:
        self._account(device).sessions -= 1

    def _account(self, device: str) -> _Account:
        now = self._clock()
        account = self._accounts.get(device)
        if account is None:
            self._make_room()
            buckets = {name: _Bucket(size, size, now) for name, size in self._sizes.items()}
            account = self._accounts[device] = _Account(buckets)
        self._accounts.move_to_end(device)
        for bucket in account.buckets.values():
            bucket.fill(now)
        return account

    def _make_room(self) -> None:
        """Forgets the account that was not used for longest, of those without a session."""
        if len(self._accounts) >= MAX_DEVICES:
            idle = next((device for device, account in self._accounts.items() if not account.sessions), None)
            if idle is not None:  # sessions are bounded elsewhere, far below MAX_DEVICES
                del self._accounts[idle]


def _over(message: str, wait_s: float) -> SessionFault:
    return SessionFault(FaultCode.QUOTA, message, wait_s)
