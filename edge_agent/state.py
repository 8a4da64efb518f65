"""What the agent remembers between starts: small JSON files, 0600 in a 0700 folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class State:
    """A disk that fails costs what was learned, never an answer: reads give nothing, writes are logged."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s cannot be made, nothing will be remembered: %s", folder, error)

    def read(self, name: str) -> dict[str, object]:
        """The object in `name`.json; empty where there is none that can be read."""
        path = self.folder / f"{name}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s is not readable, going on without: %s", path, error)
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, name: str, content: dict[str, object]) -> None:
        """Replaces `name`.json in one move."""
        path = self.folder / f"{name}.json"
        half = path.with_suffix(f".{os.getpid()}.part")
        try:
            with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(content, file)
            half.replace(path)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
            with contextlib.suppress(OSError):
                half.unlink()
