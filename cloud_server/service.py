"""What the wire's sessions and the HTTP endpoint both stand on: the model, the worker, the rooms, the counters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cloud_server.admission import RequestTable, Rooms
from cloud_server.config import ServerConfig
from cloud_server.engine import Engine
from cloud_server.keys import Verifier
from cloud_server.metrics import Metrics
from cloud_server.rows import Row
from cloud_server.scheduler import Scheduler
from cloud_server.worker import Worker
from protocol.errors import FaultCode, SessionFault, WireError
from protocol.frames import Digests, Load
from split_model.compute import Compute
from split_model.model import Model
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer, TextStream


class Service:
    """One model being served; made once, by `server`, when the model is loaded."""

    def __init__(
        self, config: ServerConfig, model: Model, tokenizer: ChatTokenizer, compute: Compute, verifier: Verifier | None
    ):
        self.config, self.model, self.tokenizer, self.verifier = config, model, tokenizer, verifier
        self.context = min(config.context or model.config.context, model.config.context)
        self.digests = Digests(model.weights_digest, tokenizer.digest, model.numerics)
        self.requests, self.rooms = RequestTable(), Rooms(config.slots, config.waiting)
        cache = model.new_cache(config.slots, self.context)
        scheduler = Scheduler(cache, config.step_tokens, model.config.stops, self.context)
        self.metrics = Metrics(model.config.name)
        self.worker = Worker(compute, Engine(model, cache), scheduler, config.slots, self.metrics.step)
        self.metrics.watch(lambda: self.worker.load)
        self.address = config.advertise  # where phones reach it, when that is known
        self.ready = False
        self.leaving = asyncio.Event()  # somebody asked the server to end
        self._rows: set[Row] = set()  # submitted, and not yet given back

    def device(self, token: str) -> str:
        """The device a token was issued to; any caller is `anonymous` on a server without keys."""
        return self.verifier.device(token) if self.verifier else "anonymous"

    def new_row(
        self, log: list[int], length: int, prompt_length: int, entry: int, sampling: Sampling, max_tokens: int,
        stop: tuple[str, ...] = (),
    ) -> Row:  # fmt: skip
        """A row for a checked request. Raises SessionFault BAD_REQUEST for what the model cannot do."""
        config = self.model.config
        if entry > config.layers:
            raise SessionFault(FaultCode.BAD_REQUEST, f"split {entry}, the model has {config.layers} layers")
        if length < 1:
            raise SessionFault(FaultCode.BAD_REQUEST, "the prompt has no tokens")
        if length >= self.context:
            message = f"{length} tokens of prompt and answer so far, the context holds {self.context}"
            raise SessionFault(FaultCode.BAD_REQUEST, message)
        if log and max(log) >= config.vocabulary:
            raise SessionFault(FaultCode.BAD_REQUEST, f"token id {max(log)}, the vocabulary has {config.vocabulary}")
        if length - prompt_length >= max_tokens:
            message = f"{length - prompt_length} answer tokens were delivered, max_tokens is {max_tokens}"
            raise SessionFault(FaultCode.BAD_REQUEST, message)
        text = TextStream(self.tokenizer, stop) if stop else None
        if text is not None:
            for token in log[prompt_length:]:
                text.push(token)
        return Row(entry, list(log), length, prompt_length, max_tokens, sampling, text)

    def enter(self, replacing: bool = False) -> None:
        """Takes the room that `running` gives back. Raises SessionFault BUSY or DRAINING."""
        self.rooms.enter(self.worker.load.wait_s, replacing)

    def drain(self) -> None:
        """Takes no new sessions; the program ends when the others have."""
        self.rooms.draining = True
        self.leaving.set()

    def abort(self) -> None:
        """Ends every session with a fault that says why."""
        for row in self._rows:
            row.stream.put(SessionFault(FaultCode.DRAINING, "the server is shutting down", 1.0))

    @asynccontextmanager
    async def running(self, row: Row, route: str, instead_of: Row | None = None) -> AsyncIterator[None]:
        """Submits a row that has entered a room, and gives both back whatever happens."""
        outcome = "cancelled"
        self._rows.add(row)
        try:
            self.worker.submit(row, instead_of)
            yield
            outcome = "done"
        except WireError as error:
            outcome = error.code.name.lower() if isinstance(error, SessionFault) else "lost"
            raise
        finally:
            self._rows.discard(row)
            self.worker.drop(row)
            self.rooms.leave()
            self.metrics.ended(row, route, outcome)

    def load(self, delivery_rate: float, credit: int) -> Load:
        """The state that a phone is told."""
        now = self.worker.load
        return Load(
            now.running, now.waiting, now.steps, now.wait_s, now.prefill_rate, now.decode_rate, delivery_rate, credit,
            self.rooms.draining,
        )  # fmt: skip
