"""A whole model in one process, for scripts and notebooks, and the reference for tests."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from split_model.attention import Span
from split_model.cache import Cache
from split_model.model import Model
from split_model.sampling import Sampling, sample
from split_model.settings import Precision
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer, TextStream

Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished answer; `ids` include the one that ended it."""

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class Runner:
    """Generates with one model. `prompt`: text, or messages for the chat template."""

    def __init__(self, model: str | Path, *, precision: Precision = Precision.BF16, chunk: int = 256):
        folder = find_model(model)
        self.tokenizer = ChatTokenizer.load(folder)
        self.model = Model.load(folder, precision=precision)
        self._chunk = chunk
        self._spare: Cache | None = None  # of an answer that has ended

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: Sequence[str] = (),
    ) -> Generation:
        """The whole answer. Raises ValueError when the prompt leaves no room."""
        prompt_ids = self.prompt_ids(prompt)
        answer, stops = TextStream(self.tokenizer, stop), self.model.config.stops
        ids, text = [], ""
        with closing(self.tokens(prompt_ids, max_tokens=max_tokens, sampling=sampling)) as tokens:
            for token in tokens:
                ids.append(token)
                if token not in stops:
                    text += answer.push(token)
                if answer.stopped:
                    break
        text += answer.finish()
        ended = answer.stopped or (bool(ids) and ids[-1] in stops)
        return Generation(text, tuple(ids), tuple(prompt_ids), "stop" if ended else "length")

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer's text in pieces, as it is made."""
        answer = TextStream(self.tokenizer, stop)
        with closing(self.tokens(self.prompt_ids(prompt), max_tokens=max_tokens, sampling=sampling)) as tokens:
            for token in tokens:
                if token not in self.model.config.stops and (text := answer.push(token)):
                    yield text
                if answer.stopped:
                    return
        if text := answer.finish():
            yield text

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Text is one user message where the tokenizer has a chat template, else a plain beginning to go on from."""
        if isinstance(prompt, str):
            if not self.tokenizer.chats:
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.chat(prompt)

    def tokens(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        stops: Collection[int] | None = None,
    ) -> Generator[int]:
        """Token ids up to and with the first of `stops` (default: the model's own)."""
        model, context = self.model, self.model.config.context
        if not 0 < len(prompt_ids) < context:
            raise ValueError(f"a prompt of {len(prompt_ids)} tokens, limit {context - 1}")
        stops = model.config.stops if stops is None else stops
        most = min(max_tokens, context - len(prompt_ids))
        cache = self._memory(len(prompt_ids) + most)
        position, pending = 0, list(prompt_ids)
        try:
            for _ in range(most):
                for at in range(0, len(pending), self._chunk):
                    x = self._forward(cache, position, pending[at : at + self._chunk])
                    position += len(x)
                (token,) = sample(model.logits(x[-1:]), [position], [sampling])
                yield token
                if token in stops:
                    return
                pending = [token]
        finally:
            cache.clear(0)
            self._spare = cache

    def _memory(self, context: int) -> Cache:
        """Of the answer before, where that has ended and was as long."""
        cache, self._spare = self._spare, None
        return cache if cache is not None and cache.context >= context else self.model.new_cache(1, context)

    def _forward(self, cache: Cache, position: int, ids: Sequence[int]) -> torch.Tensor:
        tiles = self.model.tiles([Span(0, position, len(ids))])
        return self.model.run(self.model.embed(torch.tensor(ids)), 0, self.model.config.layers, cache, tiles)
