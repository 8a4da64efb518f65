"""What the agent remembers between starts: small JSON files, 0600 in a 0700 folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from protocol import private_files

log = logging.getLogger(__name__)
LARGE = 16_384  # bytes: more than a ticket or a file of measurements takes


class State:
    """A disk that fails costs what was learned, never an answer: reads give nothing, and it is said once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._failing = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s cannot be made, nothing will be remembered: %s", folder, error)

    def probe(self) -> None:
        """Finds out, before anything slow begins, whether the folder can be written. Raises OSError that names it."""
        trial = self.folder / f"probe.{os.getpid()}.part"
        try:
            private_files.replace(trial, b"\0" * LARGE)
        except OSError as error:
            raise OSError(f"{self.folder}: tickets and measurements cannot be kept: {error.strerror}") from None
        finally:
            with contextlib.suppress(OSError):
                trial.unlink()

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
        try:
            private_files.replace(path, json.dumps(content).encode())
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written, going on without: %s", path, error.strerror)
            self._failing = True
