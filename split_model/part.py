"""What a packed folder says of itself: which part of which checkpoint it holds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from split_model.fields import ModelError, read_object

FILE = "tandem.json"


@dataclass(frozen=True, slots=True)
class Part:
    """Layers `[0, layers)`, with the embedding where there are any and with norm and head where `head`.

    `weights_digest` (16 bytes in hex) and `name` are those of the checkpoint it was made from, whatever `precision` it
    is stored in; `arithmetic` is what the digest covers beside the weights.
    """

    name: str
    weights_digest: str
    arithmetic: str
    layers: int
    head: bool
    precision: str
    path: Path

    @classmethod
    def read(cls, folder: Path) -> Part | None:
        """None for a whole checkpoint. Raises ModelError."""
        path = folder / FILE
        if not path.exists():
            return None
        raw = read_object(path)
        try:
            (first, stop), digest = raw["layers"], bytes.fromhex(raw["weights_digest"])
            names = [raw[name] for name in ("name", "arithmetic", "precision")]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: not written by `pack`: {error!r}") from None
        whole = (first, type(stop), type(raw.get("head")), len(digest)) == (0, int, bool, 16) and stop >= 0
        if not whole or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{path}: not written by `pack`")
        return cls(names[0], digest.hex(), names[1], stop, raw["head"], names[2], path)

    def write(self) -> None:
        said = asdict(self) | {"layers": [0, self.layers]}
        del said["path"]
        self.path.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    def check(self, first: int, stop: int, *, embedding: bool, head: bool) -> None:
        """Raises ModelError for what is not in here."""
        if stop > self.layers or (head and not self.head) or (embedding and not self.layers):
            held = "with the head" if self.head else "without the head"
            asked = " and ".join([f"layers [{first}, {stop})", *["the embedding"] * embedding, *["the head"] * head])
            raise ModelError(f"{self.path}: layers [0, {self.layers}) are packed here, {held}; asked for are {asked}")

    def digest(self, arithmetic: str) -> bytes:
        """Of the checkpoint that this is a part of. Raises ModelError where its config is not what it was."""
        if arithmetic != self.arithmetic:
            raise ModelError(f"{self.path}: config.json is not as it was packed, or another version did: pack it again")
        return bytes.fromhex(self.weights_digest)


def model_name(folder: Path) -> str:
    """What the model in `folder` is called: as the directory, or on the hub, or as what it was packed from."""
    part, place = Part.read(folder), folder.resolve()
    if part is not None:
        return part.name
    kept = place.parent.parent.name  # models--org--name/snapshots/commit, in the hub's cache
    return kept.split("--")[-1] if place.parent.name == "snapshots" and kept.startswith("models--") else place.name
