"""JSON objects of a checkpoint directory, read field by field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 1 << 40  # no size of a model is larger, and no number in its config


class ModelError(Exception):
    """A checkpoint that cannot be used; the message is one line that names the file and the reason."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError when it is missing or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: a JSON object was expected, not {type(found).__name__}")
    return found


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of one object; null counts as absent. Raises ModelError, which names file, field and value."""

    raw: Mapping[str, Any]
    path: Path

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST:
            raise self.wrong(name, value, f"an integer from {least} to {MOST}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MOST:
            raise self.wrong(name, value, f"a number over 0, up to {MOST}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def ids(self, name: str) -> list[int]:
        """Token ids written as one number, as a list, or not at all."""
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in ids):
            raise self.wrong(name, value, "token ids")
        return ids

    def wrong(self, name: str, value: object, wanted: str) -> ModelError:
        return ModelError(f"{self.path}: {name} is {value!r}, not {wanted}")

    def unsupported(self, name: str, value: object, only: str) -> ModelError:
        return ModelError(f"{self.path}: {name} = {value!r} is not supported, only {only}")

    def _value(self, name: str, default: object) -> object:
        value = self.raw.get(name)
        return default if value is None else value
