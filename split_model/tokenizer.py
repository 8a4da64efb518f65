"""Text to token ids and back, chat templates, and text that appears token by token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from split_model.config import ModelError, read_object

# What a template can raise, by its own doing or by what its expressions do to the messages.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
BROKEN = "\N{REPLACEMENT CHARACTER}"


class TemplateError(ValueError):
    """A chat template that is missing, is broken, or refuses these messages; says why."""


class ChatTokenizer:
    """A checkpoint's tokenizer and, where it has one, its chat template. `digest`: 16 bytes over both."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, bos: str | None, eos: str | None, add_bos: bool):
        self._tokenizer, self._bos_text, self._eos_text = tokenizer, bos, eos
        self.bos = tokenizer.token_to_id(bos) if bos else None
        self.eos = tokenizer.token_to_id(eos) if eos else None
        self._add_bos = add_bos and self.bos is not None
        self._template = _compile(template) if template else None
        identity = json.dumps([template, bos, eos, add_bos]) + tokenizer.to_str()
        self.digest = hashlib.sha256(identity.encode()).digest()[:16]

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Raises ModelError."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{path}: no such file")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every bad file
            raise ModelError(f"{path}: not a tokenizer: {error}") from None
        config_path = folder / "tokenizer_config.json"
        config = read_object(config_path) if config_path.exists() else {}
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, _template(folder, config), _text(config.get("bos_token")),
                   _text(config.get("eos_token")), config.get("add_bos_token") is True)  # fmt: skip

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """A plain prompt, with the beginning-of-text token in front where the tokenizer or its config says so."""
        ids: list[int] = self._tokenizer.encode(text).ids
        if self._add_bos and self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The messages as the template writes them, up to where the answer begins. Raises TemplateError."""
        if self._template is None:
            raise TemplateError("this model has no chat template")
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._bos_text or "",
                eos_token=self._eos_text or "",
            )
        except REFUSALS as error:
            raise TemplateError(f"chat template: {error}") from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are skipped."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _text(token: Any) -> str | None:
    """A special token as config files write it: a string, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    alone = folder / "chat_template.jinja"
    if alone.exists():
        return alone.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template is a {type(found).__name__}")
    return found


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _compile(template: str) -> jinja2.Template:
    """In the environment that transformers documents for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ModelError(f"chat template: {error}") from None


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
        if self.stopped:
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
