"""What the wire's sessions and the HTTP endpoint both stand on: the model, the worker, the rooms, the counters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from cloud_server.admission import RequestTable, Rooms
from cloud_server.arrivals import Drafts
from cloud_server.config import ServerConfig
from cloud_server.drafter import Drafter
from cloud_server.engine import Engine
from cloud_server.metrics import Metrics
from cloud_server.quota import UNLIMITED, Quotas
from cloud_server.rows import Emitted, Row
from cloud_server.scheduler import Scheduler
from cloud_server.shared import beginning
from cloud_server.tokens import ANYONE, Caller, Verifier
from cloud_server.worker import Worker
from protocol.errors import FaultCode, SessionFault, WireError
from protocol.frames import Digests, Load
from protocol.prefixes import Pace
from protocol.request_log import RequestLine, log_request
from split_model.compute import Compute
from split_model.model import Model
from split_model.prefix import Prefixes, expiring
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer, TextStream

requests = logging.getLogger("cloud_server.requests")


@dataclass(slots=True)
class Guest:
    """Whose request it is, and what of it has been charged."""

    caller: Caller
    tokens: int  # of prompt, or of the log of a session that is resumed
    replacing: bool = False  # takes over from an older attempt
    early: bool = False  # charged only after the handshake, so that a replayed packet costs its victim nothing
    charged: bool = False
    answered: int = 0  # tokens


class Service:
    """One model being served; made once, by `server`, when the model is loaded."""

    def __init__(
        self, config: ServerConfig, model: Model, tokenizer: ChatTokenizer, compute: Compute,
        verifier: Verifier | None, tiny: Model | None = None,
    ):  # fmt: skip
        self.config, self.model, self.tokenizer, self.verifier = config, model, tokenizer, verifier
        self.context = min(config.context or model.config.context, model.config.context)
        self.digests = Digests(model.weights_digest, tokenizer.digest, model.numerics)
        self.pace = Pace()
        self.requests, self.rooms = RequestTable(), Rooms(config.slots, config.waiting)
        slots = config.slots + bool(config.shared_prefix)
        cache = model.new_cache(slots, self.context)
        drafter = Drafter(tiny, slots, self.context, model.config.vocabulary) if tiny else None
        self.prefixes = Prefixes(cache, drafter.cache if drafter else None, config.keep_s)
        scheduler = Scheduler(self.prefixes, config.step_tokens, model.config.stops)
        self.drafts = drafter is not None
        self.metrics = Metrics(model.config.name)
        self._compute, self._engine = compute, Engine(model, cache)
        self.worker = Worker(compute, self._engine, scheduler, config.slots, self.metrics.step, drafter)
        self.metrics.watch(lambda: self.worker.load, lambda: self.rooms.draining)
        self.address = config.advertise  # where phones reach it, when that is known
        self.ready = False
        self.leaving = asyncio.Event()  # somebody asked the server to end
        self._rows: dict[Row, Guest] = {}  # submitted, and not yet given back
        self.quotas = Quotas(config.quota if verifier else UNLIMITED)
        self._revoked: Mapping[str, float] = verifier.trusted.revoked if verifier else {}
        if verifier:
            verifier.changed = self._expel

    async def share(self, system: str) -> None:
        """Computes the beginning of chats with this system message, for every device's sessions. Raises ModelError."""
        ids = beginning(self.tokenizer, system, self.context)

        def fill() -> None:
            slot, _, _ = self.prefixes.take((), None)
            self._engine.fill(slot, ids, self.config.step_tokens)
            self.prefixes.share(slot, ids)

        await self._compute.call(fill)

    def expiring(self) -> AbstractAsyncContextManager[None]:
        """While it is entered, what devices left is zeroed when its time is over."""
        return expiring(self._compute, self.prefixes)

    def caller(self, token: str) -> Caller:
        """Whom a token speaks for; on a server without keys that is anyone. Raises SessionFault UNAUTHENTICATED."""
        return self.verifier.verify(token) if self.verifier else ANYONE

    def new_row(
        self, log: list[int], length: int, prompt_length: int, entry: int, sampling: Sampling, max_tokens: int,
        stop: tuple[str, ...] = (), draft: int = 0, cloud_draft: int = 0, sparse: bool = False,
    ) -> Row:  # fmt: skip
        """A row for a checked request, with drafts by the phone, by this server if it has a tiny model, or none.

        Raises SessionFault for what the model cannot do.
        """
        config = self.model.config
        if entry > config.layers:
            raise SessionFault(FaultCode.BAD_REQUEST, f"split {entry}, the model has {config.layers} layers")
        if length < 1:
            raise SessionFault(FaultCode.BAD_REQUEST, "the prompt has no tokens")
        if length >= self.context:
            message = f"{length} tokens of prompt and answer so far, the context holds {self.context}"
            raise SessionFault(FaultCode.CONTEXT_LENGTH_EXCEEDED, message)
        if log and max(log) >= config.vocabulary:
            raise SessionFault(FaultCode.BAD_REQUEST, f"token id {max(log)}, the vocabulary has {config.vocabulary}")
        if length - prompt_length >= max_tokens:
            message = f"{length - prompt_length} answer tokens were delivered, max_tokens is {max_tokens}"
            raise SessionFault(FaultCode.BAD_REQUEST, message)
        text = TextStream(self.tokenizer, stop) if stop else None
        if text is not None:
            for token in log[prompt_length:]:
                text.push(token)
        drafts = Drafts(draft) if draft or not self.drafts else Drafts(cloud_draft, local=True)
        most = min(max_tokens, self.context - prompt_length)
        return Row(entry, list(log), length, prompt_length, most, sampling, text, drafts, sparse)

    def enter(self, guest: Guest) -> None:
        """Takes a room and charges the guest, if it may be charged yet; `leave` gives back.

        Raises SessionFault BUSY, DRAINING or QUOTA, having taken nothing.
        """
        self.quotas.check(guest.caller.device, guest.tokens, guest.replacing)
        self.rooms.enter(self.worker.load.wait_s, guest.replacing)
        if not guest.early:
            self.charge(guest)

    def charge(self, guest: Guest) -> None:
        """Raises SessionFault QUOTA, having charged nothing."""
        device = guest.caller.device
        self.quotas.enter(device, guest.tokens, guest.replacing)
        self.quotas.spent(device, guest.answered)
        guest.charged = True

    def leave(self, guest: Guest) -> None:
        """Gives back what `enter` took."""
        self.rooms.leave()
        if guest.charged:
            self.quotas.leave(guest.caller.device)

    def drain(self) -> None:
        """Takes no new sessions; the program ends when the others have."""
        self.rooms.draining = True
        self.leaving.set()

    def abort(self) -> None:
        """Ends every session with a fault that says why."""
        for row in self._rows:
            row.stream.put(SessionFault(FaultCode.DRAINING, "the server is shutting down", 1.0))

    def _expel(self) -> None:
        """Ends what revoked devices still have running, and zeroes what they left; a token that only expired may see
        its session to the end."""
        before, self._revoked = self._revoked, self.verifier.trusted.revoked if self.verifier else {}
        gone = {device for device, at in self._revoked.items() if before.get(device) != at}
        for row, guest in self._rows.items():
            if self.verifier and self.verifier.revoked(guest.caller):
                row.owner = None
                row.stream.put(SessionFault(FaultCode.UNAUTHENTICATED, f"device {guest.caller.device!r} was revoked"))
        self.worker.do(self.prefixes.forget, lambda key: isinstance(key, tuple) and key[0] in gone)

    async def next(self, row: Row) -> Emitted:
        """The next tokens of a running row, charged to its guest. Raises the WireError that ended the row."""
        emitted, guest = await row.stream.next(), self._rows[row]
        guest.answered += len(emitted.ids)
        if guest.charged:
            self.quotas.spent(guest.caller.device, len(emitted.ids))
        self.metrics.round(emitted)
        if emitted.position == row.prompt_length:
            self.metrics.first_token(row)
        return emitted

    @asynccontextmanager
    async def running(self, row: Row, route: str, guest: Guest, instead_of: Row | None = None) -> AsyncIterator[None]:
        """Submits the row of a guest that has entered, and gives everything back whatever happens."""
        outcome = "cancelled"
        self._rows[row] = guest
        row.owner = guest.caller.device if self.verifier else None
        try:
            crowded = instead_of is not None or self.rooms.taken > self.config.slots  # a claim would hold up others
            row.place = self.prefixes.claim([] if row.entry else row.log, None if crowded else row.key)
            row.promised = row.place.held
            self.worker.submit(row, instead_of)
            yield
            outcome = "done"
        except WireError as error:
            outcome = error.code.name.lower() if isinstance(error, SessionFault) else "lost"
            raise
        finally:
            del self._rows[row]
            self.worker.drop(row)
            self.leave(guest)
            self.metrics.ended(row, route, outcome)

    def ended(self, line: RequestLine) -> None:
        """Books a request, over HTTP or on the wire, whatever became of it."""
        self.metrics.request(line)
        log_request(requests, line)

    def load(self, delivery_rate: float, credit: int) -> Load:
        """The state that a phone is told."""
        now = self.worker.load
        return Load(
            now.running, now.waiting, now.steps, now.wait_s, now.prefill_rate, now.decode_rate, delivery_rate, credit,
            self.rooms.draining, now.draft_rate,
        )  # fmt: skip
