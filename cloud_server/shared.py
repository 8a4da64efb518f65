"""The operator's own prefix: a system prompt that is computed once, and copied into sessions that begin with it."""

from __future__ import annotations

from pathlib import Path

from split_model.chat_template import TemplateError
from split_model.config import ModelError
from split_model.prefix import common
from split_model.tokenizer import ChatTokenizer

MOST = 1 << 20  # bytes of such a file
# First words as different as can be: what chats that begin with these have in common ends before them.
WORDS = ("a", "Z", "7", " ", "\n", "é", "中", "?", "")


def read_prefix(path: Path) -> str:
    """The file's text, without line ends behind it. Raises ModelError."""
    try:
        data = path.read_bytes()
        text = data.decode().rstrip("\r\n")
    except OSError as error:
        raise ModelError(f"--shared-prefix {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelError(f"--shared-prefix {path}: not UTF-8 at byte {error.start}") from None
    if not text.strip() or len(data) > MOST:
        raise ModelError(f"--shared-prefix {path}: {len(data)} bytes of text, must be 1 to {MOST}")
    return text


def beginning(tokenizer: ChatTokenizer, system: str, context: int) -> tuple[int, ...]:
    """Ids that every chat with this system message begins with. Raises ModelError."""

    def chats(message: str) -> list[list[int]]:
        start = {"role": "system", "content": message}
        return [tokenizer.chat([start, {"role": "user", "content": word}]) for word in WORDS]

    try:
        first, *others = chats(system)
        besides = tokenizer.chat([{"role": "user", "content": WORDS[0]}])
    except TemplateError as error:
        raise ModelError(f"--shared-prefix: {error}") from None
    length = min(common(first, other) for other in others)
    if length <= common(first[:length], besides):
        raise ModelError("--shared-prefix: the chat template writes nothing of a system message")
    if length > context // 2:
        raise ModelError(f"--shared-prefix: {length} tokens, limit {context // 2}, half of what the context holds")
    return tuple(first[:length])
