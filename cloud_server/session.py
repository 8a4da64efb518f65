"""One session on the wire, from Open to Done."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import replace

from cloud_server.intake import Intake
from cloud_server.rows import Emitted, Row
from cloud_server.service import Guest, Service
from cloud_server.tokens import GENERATE
from protocol import limits
from protocol.errors import BadFrame, FaultCode, LinkLost, SessionFault, WireError
from protocol.frames import Admitted, Close, Done, Draft, Fault, Hidden, Load, Open, Tokens
from protocol.prefixes import prefix
from protocol.request_log import RequestLine, milliseconds
from protocol.transport.base import Address, ServerChannel
from split_model.sampling import Sampling

log = logging.getLogger(__name__)
LOAD_AFTER = 0.25  # seconds without another frame
LOAD_EVERY = 1.0  # seconds in any case: a phone may want to go on elsewhere
STRANGE = frozenset({FaultCode.BAD_FRAME, FaultCode.UNAUTHENTICATED})  # refusals that wait when they are many


class Session:
    """Serves one channel; whatever it takes is given back when `serve` returns."""

    def __init__(self, service: Service, channel: ServerChannel):
        self._service, self._channel = service, channel
        self._told = False  # that the server is draining
        self._began = self._load_at = time.monotonic()
        self._line = RequestLine("", "", "", peer=channel.peer, transport=channel.transport)  # as far as it is known

    async def serve(self) -> None:
        """Never raises but for cancellation: a fault is told to the peer, and every end is logged in one line."""
        self._service.metrics.channel(self._channel.transport)
        reason = "cancelled"
        try:
            reason = await self._run()
        except SessionFault as fault:
            reason = fault.code.name.lower()
            self._service.metrics.fault(reason)
            if self._channel.early and fault.code is FaultCode.REPLAYED:
                self._service.metrics.early("replayed")
            log.debug("%s: %s", self._channel.peer, fault)
            if fault.code in STRANGE:
                await asyncio.sleep(self._service.pace.wait_s(_place(self._channel.peer)))
            with contextlib.suppress(WireError):
                await self._channel.send(Fault(fault.code, fault.message, fault.retry_after_s))
        except LinkLost as lost:
            reason = "lost"
            log.debug("%s: %s", self._channel.peer, lost)
        except Exception:  # a fault of ours must not look like a lost link
            reason = "internal"
            log.exception("%s: the session broke", self._channel.peer)
            with contextlib.suppress(WireError):
                await self._channel.send(Fault(FaultCode.INTERNAL, "the session broke on the server"))
        finally:
            self._book(reason)

    def _book(self, reason: str) -> None:
        channel, total = self._channel, milliseconds(time.monotonic() - self._began)
        line = replace(self._line, reason=reason, early=channel.early, total_ms=total)
        self._service.ended(replace(line, bytes_in=channel.bytes_up, bytes_out=channel.bytes_down))
        self._service.metrics.rtt(channel.rtt_s())

    async def _run(self) -> str:
        """Serves the session to its end, and says why that was."""
        opened = await self._opened()
        service, entry = self._service, opened.split
        route = "speculative" if opened.draft else "split" if entry else "cloud"
        self._line = replace(self._line, request=opened.request_id.hex(), attempt=opened.attempt, route=route,
                             tokens_in=opened.log_length)  # fmt: skip
        caller = service.caller(opened.token)
        self._line = replace(self._line, device=caller.device)
        caller.need(GENERATE)
        self._check_digests(opened)
        s = opened.sampling
        sampling = Sampling(s.temperature, s.top_p, s.top_k, s.seed)
        row = service.new_row(
            list(opened.log), opened.log_length, opened.prompt_length, entry, sampling, opened.max_tokens, opened.stop,
            opened.draft, opened.cloud_draft, opened.sparse,
        )  # fmt: skip
        device = caller.device
        early = await self._judge_early(device, opened)
        # From here to `running` nothing waits: what is refused is no attempt, and a replay takes and costs nothing.
        service.requests.check(device, opened.request_id, opened.attempt)
        replacing = service.requests.running(device, opened.request_id) is not None
        guest = Guest(caller, opened.log_length, replacing, early)
        service.enter(guest)
        try:
            attempt, older = service.requests.claim(device, opened.request_id, opened.attempt)
        except SessionFault:
            service.leave(guest)
            raise
        if older is not None:
            older.stream.put(SessionFault(FaultCode.SUPERSEDED, f"attempt {opened.attempt} took over"))
        attempt.row = row
        try:
            async with service.running(row, route, guest, older):
                return await self._converse(row, opened, guest)
        finally:
            attempt.row = None
            self._line = replace(self._line, tokens_out=guest.answered, queue_ms=milliseconds(row.queue_s))

    async def _opened(self) -> Open:
        limit = self._service.config.open_s
        try:
            async with asyncio.timeout(limit):
                frame = await self._channel.receive()
        except TimeoutError:
            raise SessionFault(FaultCode.SILENT, f"no Open within {limit:g} s") from None
        if not isinstance(frame, Open):
            raise BadFrame(f"the first frame is {type(frame).__name__}, must be Open")
        return frame

    def _check_digests(self, opened: Open) -> None:
        mine, theirs = self._service.digests, opened.digests
        if opened.model != self._service.model.config.name or theirs.weights != mine.weights:
            served = f"{self._service.model.config.name!r} with weights {mine.weights.hex()}"
            raise SessionFault(
                FaultCode.WRONG_MODEL, f"{opened.model!r} with weights {theirs.weights.hex()}, this server has {served}"
            )
        if theirs.tokenizer != mine.tokenizer:
            raise SessionFault(
                FaultCode.WRONG_TOKENIZER,
                f"tokenizer {theirs.tokenizer.hex()}, this server's is {mine.tokenizer.hex()}",
            )

    async def _judge_early(self, device: str, opened: Open) -> bool:
        """Whether to run before the handshake is complete; otherwise waits for it.

        Early data runs at once if its id is new and both clocks agree about its ticket.
        """
        channel, metrics = self._channel, self._service.metrics
        if not channel.early:
            return False
        known, stated = channel.ticket_age_s, opened.ticket_age_s
        agreed = known is not None and stated is not None and abs(known - stated) <= limits.EARLY_AGE_TOLERANCE
        if agreed and not self._service.requests.knows(device, opened.request_id):
            metrics.early("accepted")
            return True
        metrics.early("waited")
        await channel.handshake()
        return False

    async def _converse(self, row: Row, opened: Open, guest: Guest) -> str:
        exact = self._service.model.exact and opened.digests.numerics == self._service.digests.numerics
        intake = Intake(row, self._service.model.config.vocabulary)
        tasks = [asyncio.create_task(self._read(row, intake))]
        renewer = asyncio.create_task(self._renew(row, intake))
        if guest.early:
            tasks.append(asyncio.create_task(self._charge_late(row, guest)))
        try:
            early, credit = self._channel.early, intake.credit()
            await self._channel.send(Admitted(self._service.digests, exact, row.promised, credit, early))
            await self._channel.send(self._load(intake))  # so that the phone knows the rates from the first answer on
            done = await self._write(row, intake)
            if guest.early:  # an answer may be shorter than a handshake, and is to be charged all the same
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if not guest.charged:
                    await row.stream.next()  # raises why not
            await self._channel.send(done)
            return done.reason.name.lower()
        finally:
            for task in (*tasks, renewer):
                task.cancel()
            await asyncio.gather(*tasks, renewer, return_exceptions=True)

    async def _charge_late(self, row: Row, guest: Guest) -> None:
        """Charges a request that came as early data once its phone has shown that it is no replay."""
        try:
            await self._channel.handshake()
            self._service.charge(guest)
        except WireError as error:
            row.stream.put(error)

    async def _read(self, row: Row, intake: Intake) -> None:
        """Takes frames until the phone closes or goes; what ends the session reaches the writer by the row's stream."""
        try:
            while True:
                match await self._channel.receive():
                    case Hidden() as hidden:
                        intake.hidden(hidden)
                        self._service.worker.feed(row, hidden)
                    case Draft() as draft:
                        intake.draft(draft)
                        self._service.worker.feed(row, draft)
                    case Close():
                        raise LinkLost("closed by the phone")
                    case other:
                        raise SessionFault(FaultCode.BAD_REQUEST, f"{type(other).__name__} in a session under way")
        except WireError as error:
            row.stream.put(error)
        except Exception:
            log.exception("%s: reading broke", self._channel.peer)
            row.stream.put(SessionFault(FaultCode.INTERNAL, "reading broke on the server"))

    async def _write(self, row: Row, intake: Intake) -> Done:
        """Sends the answer's tokens as they come; returns what is to be said at its end."""
        while True:
            self._watch_silence(row)
            intake.check_owed()
            if self._service.rooms.draining and not self._told:
                self._told = True
                await self._channel.send(self._load(intake))
            try:
                async with asyncio.timeout(LOAD_AFTER):
                    emitted = await self._service.next(row)
            except TimeoutError:
                await self._channel.send(self._load(intake))
                continue
            intake.told()
            await self._deliver(emitted)
            if time.monotonic() - self._load_at > LOAD_EVERY and emitted.finish is None:
                await self._channel.send(self._load(intake))
            if emitted.finish is not None:
                counts = (row.drafts.drafted, row.drafts.accepted)
                return Done(emitted.finish, row.answer_tokens, row.queue_s, row.compute_s, *counts)

    async def _deliver(self, emitted: Emitted) -> None:
        if self._line.first_token_ms is None:
            self._line = replace(self._line, first_token_ms=milliseconds(time.monotonic() - self._began))
        await self._channel.send(Tokens(emitted.position, emitted.ids, emitted.epoch))

    async def _renew(self, row: Row, intake: Intake) -> None:
        """Raises the credit whenever half of it is used up, so that a long prompt need not wait for the next Load."""
        while row.entry:
            await row.stream.computed.wait()
            row.stream.computed.clear()
            if intake.half_used:
                await self._channel.send(self._load(intake))

    def _load(self, intake: Intake) -> Load:
        self._load_at = time.monotonic()
        return self._service.load(self._channel.delivery_rate(), intake.credit())

    def _watch_silence(self, row: Row) -> None:
        silent = self._channel.silent_s()
        if silent > limits.SILENCE_END:
            raise SessionFault(FaultCode.SILENT, f"nothing heard for {silent:.0f} s, limit {limits.SILENCE_END:g}")
        if (silent > limits.SILENCE_PAUSE) != row.paused:
            self._service.worker.pause(row, silent > limits.SILENCE_PAUSE)


def _place(peer: str) -> str:
    """The prefix of a peer that has one."""
    try:
        return prefix(Address.parse(peer).host)
    except ValueError:
        return ""
