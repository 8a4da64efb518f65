"""Token ids, chat templates, and text that appears token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from split_model.chat_template import TemplateError
from split_model.config import ModelError
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer, TextStream
from support.checkpoints import checkpoint

TOKENIZER = ChatTokenizer.load(checkpoint())
HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Höllo, a table for two?"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint() / name, tmp_path / name)
    return tmp_path


def change(folder: Path, **entries: object) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


def test_chat_is_what_transformers_writes() -> None:
    reference = AutoTokenizer.from_pretrained(checkpoint())
    assert TOKENIZER.chat(HELLO) == reference.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]


def test_a_plain_prompt_begins_with_bos() -> None:
    assert TOKENIZER.encode("abc")[0] == TOKENIZER.bos
    assert TOKENIZER.encode("<|bos|>abc") == TOKENIZER.encode("abc")


@pytest.mark.parametrize("add", [False, None])
def test_bos_is_left_out_where_the_config_does_not_ask_for_it(folder: Path, add: bool | None) -> None:
    assert ChatTokenizer.load(change(folder, add_bos_token=add)).encode("abc") == TOKENIZER.encode("abc")[1:]


@pytest.mark.parametrize("processed", [True, False], ids=["with a post-processor", "without"])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_plain_prompt_is_what_transformers_makes_of_it(folder: Path, kind: str, processed: bool) -> None:
    made = byte_fallback() if kind.startswith("Llama") else Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<s>" if kind.startswith("Llama") else "<|bos|>"
    if processed:
        ids = [(bos, made.token_to_id(bos))]
        made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": "</s>" if bos == "<s>" else "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours = ChatTokenizer.load(folder).encode("a bad cab")
    assert ours == AutoTokenizer.from_pretrained(folder)("a bad cab")["input_ids"]
    assert (ours[0] == made.token_to_id(bos)) == processed


@pytest.mark.parametrize("name", ["assistant-2m", "assistant-20m"])
def test_the_built_in_pair_begins_a_plain_prompt_as_its_training_did(name: str) -> None:
    folder = find_model(name)
    ours, theirs = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a hotel") == [ours.bos, *theirs("a hotel", add_special_tokens=False)["input_ids"]]
    assert ours.chat(HELLO) == theirs.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]


def test_special_tokens_are_not_text() -> None:
    assert TOKENIZER.decode(TOKENIZER.chat(HELLO)) == "Be brief.Höllo, a table for two?"


def test_no_template_is_named(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(change(folder, chat_template=None))
    assert not tokenizer.chats
    with pytest.raises(TemplateError, match="no chat template"):
        tokenizer.chat(HELLO)


def test_templates_by_name_and_in_a_file_of_their_own(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "abc{{ bos_token }}"}]
    assert ChatTokenizer.load(change(folder, chat_template=named)).chat(HELLO)[-1] == TOKENIZER.bos
    (folder / "chat_template.jinja").write_text("{% if true %}\n  x{% endif %}\n")
    assert ChatTokenizer.load(folder).chat(HELLO) == TOKENIZER.encode("  x")[1:]


def test_trimmed_blocks_and_loop_controls_work_as_in_transformers(folder: Path) -> None:
    template = (
        "{%- for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n{{ m.content | tojson }}"
        "\n{% endfor %}"
    )
    change(folder, chat_template=template)
    reference = AutoTokenizer.from_pretrained(folder)
    assert ChatTokenizer.load(folder).chat(HELLO) == reference.apply_chat_template(HELLO)["input_ids"]


@pytest.mark.parametrize("text", ["", "{", '{"version": "1.0"}'])
def test_a_bad_tokenizer_file_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ChatTokenizer.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ChatTokenizer.load(folder)


def test_the_digest_covers_vocabulary_and_template(folder: Path) -> None:
    assert ChatTokenizer.load(folder).digest == TOKENIZER.digest
    assert ChatTokenizer.load(change(folder, chat_template="x")).digest != TOKENIZER.digest


def byte_fallback(metaspace: bool = False) -> Tokenizer:
    """As Llama's: a character that is no entry becomes its bytes, which decode to one replacement each until whole.

    Leading spaces as Llama 2 first wrote them, or by `metaspace`, as Mistral does since.
    """
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
        return made
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
METASPACE = ChatTokenizer(byte_fallback(metaspace=True), SPECIAL)
FALLBACK = ChatTokenizer(byte_fallback(), SPECIAL)


def pieces(
    ids: list[int], stop: tuple[str, ...] = (), tokenizer: ChatTokenizer = TOKENIZER
) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.finish()], stream


@settings(deadline=None)
@given(st.text())
def test_streamed_text_is_the_whole_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    shown, _ = pieces(ids)
    assert "".join(shown) == TOKENIZER.decode(ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_any_tokens_stream_to_the_whole_text(ids: list[int]) -> None:
    shown, _ = pieces(ids)
    assert "".join(shown) == TOKENIZER.decode(ids)


EURO = [byte + 3 for byte in "€".encode()]
SENTENCEPIECE = pytest.mark.parametrize("tokenizer", [FALLBACK, METASPACE], ids=["prepended", "metaspace"])


@SENTENCEPIECE
@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([[0], [1], [2], [259], [260], [261], [9999], EURO, [*EURO[:2], 1, EURO[2]]])))
@example([[260], [1], [259], [260]])  # a special token hides no space
@example([[1], [1], [259], [260]])  # nor do two at the start
@example([[260], [9999], [259], [260]])  # nor does an id that no token has
def test_any_pieces_of_sentencepiece_stream_to_the_whole_text(tokenizer: ChatTokenizer, runs: list[list[int]]) -> None:
    ids = [one for run in runs for one in run]
    shown, _ = pieces(ids, tokenizer=tokenizer)
    assert "".join(shown) == tokenizer.decode(ids)


def test_a_bad_byte_spoils_no_good_one_before_it() -> None:
    ids = [*EURO, 0x80 + 3]
    assert FALLBACK.decode(ids) == 4 * "\N{REPLACEMENT CHARACTER}"  # the library takes neighbouring bytes for one thing
    assert "".join(pieces(ids, tokenizer=FALLBACK)[0])[0] == "€"


@SENTENCEPIECE
@settings(deadline=None)
@given(st.text("ab é😀"))
def test_leading_spaces_are_those_of_the_text(tokenizer: ChatTokenizer, text: str) -> None:
    shown, _ = pieces(tokenizer.encode(text), tokenizer=tokenizer)
    assert "".join(shown) == text or text.startswith(" ")  # which of those at the start is the tokenizer's, it forgets


def test_no_half_character_is_shown() -> None:
    text = "né 日本 👩‍👩‍👧 ok"
    shown, _ = pieces(TOKENIZER.encode(text))
    assert "".join(shown) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)
    assert sum(map(bool, shown)) > 8


@settings(deadline=None)
@given(st.text())
def test_characters_of_single_bytes_are_shown_whole(text: str) -> None:
    ids = FALLBACK.encode(text)
    shown, _ = pieces(ids, tokenizer=FALLBACK)
    assert "".join(shown) == FALLBACK.decode(ids)
    assert "\N{REPLACEMENT CHARACTER}" in text or "\N{REPLACEMENT CHARACTER}" not in "".join(shown)


def test_half_a_character_at_the_end_is_shown_as_it_is() -> None:
    ids = FALLBACK.encode("a😀")[:-1]
    shown, _ = pieces(ids, tokenizer=FALLBACK)
    assert "".join(shown) == FALLBACK.decode(ids)
    assert shown[:-1] == ["", "a", "", "", ""]


def test_bytes_of_a_character_do_not_hide_a_stop_string() -> None:
    shown, stream = pieces(FALLBACK.encode("ab😀cd"), ("😀c",), FALLBACK)
    assert "".join(shown) == "ab"
    assert stream.stopped


def test_text_is_shown_at_once_when_nothing_may_follow() -> None:
    stream = TextStream(TOKENIZER, ["STOP"])
    for token in TOKENIZER.encode("abcdef"):
        assert stream.push(token) == TOKENIZER.decode([token])


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_first_complete(text: str, stop: list[str]) -> None:
    shown, stream = pieces([TOKENIZER.encode(letter)[-1] for letter in text], tuple(stop))
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stop))] if stop else []
    expected = text
    if ends:
        expected = min((text[: ends[0] - len(one)] for one in stop if text[: ends[0]].endswith(one)), key=len)
    assert "".join(shown) == expected
    assert stream.stopped == bool(ends)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(TOKENIZER, ["abc"])
    a, b, d = (TOKENIZER.encode(letter)[-1] for letter in "abd")
    assert [stream.push(a), stream.push(b)] == ["", ""]
    assert stream.push(d) == "abd"
    assert [stream.push(a), stream.finish()] == ["", "a"]
    assert not stream.stopped


def test_nothing_is_shown_after_a_stop_string() -> None:
    ids = TOKENIZER.encode("one.two")
    shown, stream = pieces(ids, (".",))
    assert "".join(shown) == "one"
    assert stream.stopped
    assert stream.push(ids[-1]) == ""
