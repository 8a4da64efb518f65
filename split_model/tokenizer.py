"""Text to token ids and back, and text that appears token by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from split_model.chat_template import ChatTemplate, TemplateError
from split_model.tokenizer_files import read_tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


class ChatTokenizer:
    """A checkpoint's tokenizer and, where it has one, its chat template. `digest`: 16 bytes over both."""

    def __init__(self, tokenizer: Tokenizer, special: Mapping[str, str], template: ChatTemplate | None = None):
        self._tokenizer, self._template = tokenizer, template
        self.bos, self.eos = (_id(tokenizer, special.get(name)) for name in ("bos_token", "eos_token"))
        added = tokenizer.get_added_tokens_decoder()
        self._silent = frozenset(index for index, token in added.items() if token.special)
        identity = json.dumps([template.text if template else None, dict(special)], sort_keys=True)
        self.digest = hashlib.sha256((identity + tokenizer.to_str()).encode()).digest()[:16]

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Raises ModelError."""
        return cls(*read_tokenizer(folder))

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with what the tokenizer puts around it; a beginning that the text has is not doubled."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids[1:] if self.bos is not None and ids[:2] == [self.bos, self.bos] else ids

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The messages as the template writes them, up to where the answer begins. Raises TemplateError."""
        if self._template is None:
            raise TemplateError("this model has no chat template")
        text = self._template.render(messages)
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError as error:
            raise TemplateError(f"chat template: writes no text: {error}") from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are skipped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def silent(self, token: int) -> bool:
        """Whether it is no part of any text: a special token, or a row of the embedding that no token has."""
        return token in self._silent or self._tokenizer.id_to_token(token) is None


def _id(tokenizer: Tokenizer, token: str | None) -> int | None:
    return None if token is None else tokenizer.token_to_id(token)


class TextStream:
    """Incremental text of one answer: never half a character, and nothing of or after the first stop string."""

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._old, self._read = 0, 0  # ids [old, read) are shown; decoding starts at `old` for the sake of spaces
        self._shown = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """New text that is safe to show, often empty."""
        if self.stopped or self._tokenizer.silent(token):  # which would hide the space behind it
            return ""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._old : self._read])
        text = self._tokenizer.decode(self._ids[self._old :])
        whole = text.rstrip(BROKEN)  # one for each byte of a character that is not complete, or one for all
        new = whole[len(before) + self._shown :]
        self._shown += len(new)
        if whole == text:
            self._old, self._read, self._shown = self._read, len(self._ids), 0
        return self._release(new)

    def finish(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._old : self._read])
        rest = self._tokenizer.decode(self._ids[self._old :])[len(before) + self._shown :]
        text = self._release(rest) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
