"""A row: one session's place in the batch, with the stream that carries its tokens back to the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloud_server.arrivals import Drafts, HiddenQueue
from protocol.errors import BadFrame, WireError
from protocol.frames import Draft, Hidden, Reason
from protocol.limits import MAX_DRAFT
from split_model.prefix import Place
from split_model.sampling import Sampling
from split_model.tokenizer import TextStream

MOST_PENDING = 4 * MAX_DRAFT  # drafts of one session that are not verified yet


@dataclass(frozen=True, slots=True)
class Emitted:
    """What one step made for one row: the tokens from `position` on, and why the answer ended if it did.

    Of `drafted` tokens that were verified `accepted` were right; `epoch` is that of drafts from now on.
    """

    position: int
    ids: tuple[int, ...]
    finish: Reason | None
    epoch: int = 0
    drafted: int = 0
    accepted: int = 0


class RowStream:
    """A row's tokens on the event loop's side; never longer than the answer."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Emitted | WireError] = asyncio.Queue()
        self.computed = asyncio.Event()  # more positions were, with or without a token

    def put(self, item: Emitted | WireError) -> None:
        self._items.put_nowait(item)

    async def next(self) -> Emitted:
        """The next token. Raises the WireError that ended the row, if one did."""
        item = await self._items.get()
        if isinstance(item, WireError):
            raise item
        return item


@dataclass(eq=False, slots=True)
class Row:
    """The only mutable record of a session; after `Worker.submit` the compute thread alone writes it."""

    entry: int  # the first layer that runs here
    log: list[int]  # prompt and answer; for entry > 0 only the answer
    length: int  # positions known, the answer's included
    prompt_length: int
    max_tokens: int  # with the prompt no more than the context holds
    sampling: Sampling
    text: TextStream | None  # watches for stop strings
    drafts: Drafts = field(default_factory=Drafts)
    sparse: bool = False  # as in Span
    owner: str | None = None  # the device, where it is known: what it leaves may be used by its later sessions
    stream: RowStream = field(default_factory=RowStream)
    promised: int = 0  # positions that it was certain to find held
    place: Place = Place()  # noqa: RUF009 - frozen; what was found for it at admission, until it is seated
    slot: int | None = None
    done: int = 0  # positions whose keys and values are in the slot
    reused: int = 0  # of them, those that an earlier session had computed
    hidden: HiddenQueue = field(default_factory=HiddenQueue)  # of positions from `done` on, when entry > 0
    paused: bool = False
    ended: bool = False
    first: int = field(init=False)  # position of the first token that is made here
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None  # when it got its slot
    compute_s: float = 0.0
    left: float = -math.inf  # when its latest token left, on the performance counter
    away_s: float = math.inf  # from there to what came back for it

    def __post_init__(self) -> None:
        self.first = self.length

    @property
    def ready(self) -> int:
        """Positions that could be computed now, drafted ones included."""
        return 0 if self.ended or self.paused else self._at_hand()

    @property
    def starved(self) -> bool:
        """Nothing can be computed before the phone sends something."""
        return not self.ended and not self._at_hand()

    def _at_hand(self) -> int:
        known, most = self.length - self.done, self.most_drafts
        drafted = min(len(self.drafts.pending), most)
        if self.entry:
            return min(self.hidden.rows, known + drafted)
        if known == 1 and self.drafts.waits and most and not drafted and self.length > self.first:
            return 0  # neither the first token of a session waits for a draft nor the last of an answer
        return known + drafted

    @property
    def most_drafts(self) -> int:
        """How many drafts may be verified in one pass: no token is drawn behind the answer's end."""
        return min(self.drafts.limit, self.max_tokens - self.answer_tokens - 1)

    @property
    def answer_tokens(self) -> int:
        return self.length - self.prompt_length

    @property
    def queue_s(self) -> float:
        return (self.started or time.monotonic()) - self.arrived

    @property
    def key(self) -> tuple[str, bool] | None:
        """Whose KV this is, and of which kind; None for what no later session may use."""
        return None if self.entry or self.owner is None else (self.owner, self.sparse)

    def ids(self, start: int, count: int) -> list[int]:
        """Token ids of computed-next positions, drafted ones included (entry 0 only)."""
        known = self.log[start : start + count]
        return known + self.drafts.first(count - len(known))

    def accept(self, drawn: Sequence[int], stops: frozenset[int]) -> Emitted:
        """Takes the tokens drawn behind the last one known and behind each draft, up to the first that has no draft.

        A draft is right when it equals the token drawn in its place, and only then what was drawn after it counts.
        """
        verified, position, epoch = len(drawn) - 1, self.length, self.drafts.epoch
        ids: list[int] = []
        finish, right, looked_at = None, 0, 0
        for token in drawn:
            ids.append(token)
            finish = self._append(token, stops)
            compared = bool(self.drafts.pending)
            agreed = self.drafts.settle(token)
            right, looked_at = right + agreed, looked_at + compared
            if finish is not None or not agreed:
                break
        self.done = self.length - 1  # behind it the slot holds what was rejected
        self.drafts.held = min(self.drafts.held, self.done)
        if self.drafts.epoch > epoch:
            self.hidden.clear()
        drafted = max(verified, right)
        self.drafts.drafted += looked_at  # nothing is known of those behind a wrong one
        self.drafts.accepted += right
        self.ended = finish is not None
        return Emitted(position, tuple(ids), finish, self.drafts.epoch, drafted, right)

    def _append(self, token: int, stops: frozenset[int]) -> Reason | None:
        self.log.append(token)
        self.length += 1
        if token in stops or self._meets_stop_string(token):
            return Reason.STOP
        return Reason.LENGTH if self.answer_tokens >= self.max_tokens else None

    def _meets_stop_string(self, token: int) -> bool:
        if self.text is None:
            return False
        self.text.push(token)
        return self.text.stopped

    def propose(self, draft: Draft) -> None:
        """Takes in a phone's draft. Raises BadFrame for one that does not follow what came before."""
        drafts, tokens = self.drafts, draft.tokens
        if not tokens:
            drafts.alone = True  # whatever its epoch: it says nothing about tokens
            return
        if draft.epoch < drafts.epoch:
            return
        self._adopt(draft.epoch)
        drafts.alone = False
        end = self.length + len(drafts.pending)
        if draft.position != end and (drafts.pending or not self.first <= draft.position < end):
            raise BadFrame(f"draft from position {draft.position} on, expected {end}")
        known = self._known(draft.position, len(tokens))
        if list(tokens[: len(known)]) != known:
            self._deviate()
            return
        if len(drafts.pending) + len(tokens) - len(known) > MOST_PENDING:
            raise BadFrame(f"{len(drafts.pending) + len(tokens)} drafts to be verified, limit {MOST_PENDING}")
        drafts.pending.extend(tokens[len(known) :])

    def expects(self, hidden: Hidden) -> bool:
        """Whether these hidden states are to be computed; those of an older epoch are not.

        Raises BadFrame for positions out of order, or of tokens that are neither known nor drafted.
        """
        if hidden.epoch < self.drafts.epoch:
            self.hidden.refuse(hidden.size)
            return False
        self._adopt(hidden.epoch)
        start, end = self.done + self.hidden.rows, self.length + len(self.drafts.pending)
        if hidden.position != start or start + hidden.rows > end:
            raise BadFrame(
                f"hidden states of positions {hidden.position} to {hidden.position + hidden.rows - 1}, "
                f"expected {start} to at most {end - 1}"
            )
        return True

    def _adopt(self, epoch: int) -> None:
        """Goes over to an epoch of the phone's, which saw that a token is not what it was about to send."""
        if epoch == self.drafts.epoch:
            return
        most = self.length - self.first if self.drafts.limit else 0
        if epoch > most:
            raise BadFrame(f"epoch {epoch}, at most {most}: one a token of the answer, in a session with drafts")
        self._deviate()
        self.drafts.epoch = epoch

    def _deviate(self) -> None:
        self.drafts.deviate()
        self.hidden.clear()

    def _known(self, position: int, count: int) -> list[int]:
        """Ids of those of the positions from `position` in the answer on that have one."""
        start = position - (self.length - len(self.log))
        return self.log[start : start + count]


@dataclass(frozen=True, slots=True)
class Part:
    """A row's share of a step: positions `[start, start + count)`, a token drawn behind the last `wanted` of them."""

    row: Row
    start: int
    count: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the batch; parts are sorted by entry."""

    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        return sum(part.count for part in self.parts)
