"""What the files of a checkpoint say about its tokenizer, read as transformers reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from split_model.chat_template import ChatTemplate
from split_model.config import ModelError, read_object

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LONGEST = 4 << 20  # bytes of a template's file


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str], ChatTemplate | None]:
    """The tokenizer, its special tokens by the names that templates call them, and the template. Raises ModelError."""
    path = folder / "tokenizer_config.json"
    config = read_object(path) if path.exists() else {}
    tokenizer = _read(folder / "tokenizer.json")
    special = _special(folder, config, path)
    _add_tokens(tokenizer, config, special, path)
    _set_beginning(tokenizer, config, special)
    _check_ids(tokenizer, folder)
    found = _template(folder, config, path)
    return tokenizer, special, ChatTemplate(found[0], special, found[1]) if found else None


def _read(path: Path) -> Tokenizer:
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every bad file
        raise ModelError(f"{path}: not a tokenizer: {' '.join(str(error).split())}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special(folder: Path, config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """`special_tokens_map.json` counts where the config does not list its added tokens itself, as older ones do not."""
    tokens = {name: (value, path) for name, value in config.items()}
    older = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and older.exists():
        tokens |= {name: (value, older) for name, value in read_object(older).items()}
    special = {}
    for name, (value, place) in tokens.items():
        if not name.endswith("_token") or value is None or isinstance(value, bool):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ModelError(f"{place}: {name} is {value!r}, not a token")
        special[name] = text
    return special


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], special: Mapping[str, str], path: Path) -> None:
    """Tokens that the config lists and the tokenizer lacks; and special ones that the vocabulary has, as such."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        entries = sorted((int(index), str(entry["content"]), entry) for index, entry in listed.items())
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: added_tokens_decoder is no list of tokens by id") from None
    for index, text, entry in entries:
        if tokenizer.token_to_id(text) is None:
            flags = {flag: entry[flag] for flag in FLAGS if isinstance(entry.get(flag), bool)}
            tokenizer.add_tokens([AddedToken(text, **flags)])
        if tokenizer.token_to_id(text) != index:
            there = tokenizer.token_to_id(text)
            raise ModelError(f"{path}: added_tokens_decoder has {text!r} as {index}, the tokenizer as {there}")
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens(
        [text for text in special.values() if text not in added and tokenizer.token_to_id(text) is not None]
    )


def _set_beginning(tokenizer: Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Puts bos in front where `add_bos_token` says so and the tokenizer itself does not.

    What the tokenizer puts around a text stays, and `add_eos_token` is for training: both as in transformers since 5.
    """
    text = special.get("bos_token")
    bos = None if text is None else tokenizer.token_to_id(text)
    if config.get("add_bos_token") is True and bos is not None and tokenizer.encode("").ids[:1] != [bos]:
        token = {"id": "bos", "ids": [bos], "tokens": [text]}
        tokenizer.post_processor = processors.TemplateProcessing(single="bos $A", special_tokens=[token])


def _check_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """An embedding may have more rows than there are tokens, and often has; fewer it may not."""
    path = folder / "config.json"
    rows = read_object(path).get("vocab_size") if path.exists() else None
    if not isinstance(rows, int):
        return  # whoever reads the model says what is wrong there
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(token, -1) >= rows:
        said = f"token {token!r} has id {vocabulary[token]}, but vocab_size in {path} is {rows}"
        raise ModelError(f"{folder / 'tokenizer.json'}: {said}")


def _template(folder: Path, config: Mapping[str, Any], path: Path) -> tuple[str, str] | None:
    """The template and its place: a file of its own comes before the config."""
    alone = folder / "chat_template.jinja"
    if alone.exists():
        if alone.stat().st_size > LONGEST:
            raise ModelError(f"{alone}: {alone.stat().st_size:,} bytes, limit {LONGEST:,}")
        try:
            return alone.read_text(encoding="utf-8"), str(alone)
        except UnicodeDecodeError as error:
            raise ModelError(f"{alone}: not UTF-8: {error.reason} at byte {error.start}") from None
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{path}: chat_template is a {type(found).__name__}")
    return None if found is None else (found, f"{path}: chat_template")
