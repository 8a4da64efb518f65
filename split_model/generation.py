"""What `generation_config.json` says: which ids end an answer, and how to draw where a request does not say."""

from __future__ import annotations

from pathlib import Path

from split_model.fields import Fields, read_object
from split_model.settings import Sampling


def read_generation(folder: Path, config: Fields) -> tuple[frozenset[int], Sampling]:
    """Ids that end an answer, of `config` where the file has none, and the usual sampling. Raises ModelError.

    Temperature, top_p and top_k are taken, as vLLM does; penalties are not, as no route has them.
    """
    path = folder / "generation_config.json"
    said = Fields(read_object(path) if path.exists() else {}, path)
    ends = config if said.raw.get("eos_token_id") is None else said
    plain = said.raw.get("temperature") == 0
    temperature = 0.0 if plain else said.real("temperature", 1.0)
    top_p, top_k = said.real("top_p", 1.0), said.integer("top_k", 0, least=0)
    if temperature > 100:
        raise said.wrong("temperature", temperature, "from 0 to 100")
    if top_p > 1:
        raise said.wrong("top_p", top_p, "over 0 and up to 1")
    return frozenset(ends.ids("eos_token_id")), Sampling(temperature, top_p, top_k)
