"""Chat templates as the families write them, against transformers; and those that are broken or never end."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer

from split_model.chat_template import ChatTemplate, TemplateError
from split_model.config import ModelError
from split_model.tokenizer import ChatTokenizer
from support.checkpoints import checkpoint

# Written for this test with the constructs of published templates, not copied from them.
LLAMA_3 = """\
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set told = "" %}
{%- endif %}
{{- "<|head|>system<|tail|>\\n\\nToday: " + strftime_now("%Y") + "\\n" + told + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|tail|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls[0].function | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|tail|>\\n\\n' }}{%- endif %}
"""
QWEN = """\
{%- macro told(message) %}{{ '<|head|>' ~ message.role ~ '\\n' ~ message.content ~ '<|eot|>\\n' }}{%- endmacro %}
{%- if tools %}
    {{- '<|head|>system\\n' }}{%- for tool in tools %}{{- tool | tojson(indent=2) }}{%- endfor %}
{%- elif messages[0].role != 'system' %}
    {{- '<|head|>system\\nYou are made for a test.<|eot|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.seen and message.role == 'user' and message.content is string
           and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.seen = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|head|>assistant\\n' }}{% generation %}{{ content }}<|eot|>{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- told(message) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}{%- set first, rest = messages[0]['content'], messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant take turns: ' ~ loop.index0) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and first is defined %}{{- '[INST] ' + first + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant after the first') }}{%- endif %}
{%- endfor %}
"""
GLM = """\
[gMASK]<sop>{% if tools is not none and tools %}<|head|>system
{% for tool in tools %}{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}{% endif %}{% for item in messages %}{% if item['tools'] is defined %}{{ item['tools'] }}{% endif %}
<|head|>{{ item['role'] }}
{{ item['content'] | string | replace('  ', ' ') }}{% if loop.last and not loop.first %}{% break %}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|head|>assistant{% endif %}
"""
SMOL = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|head|>system\\nA default, for a test.<|eot|>\\n' }}{% endif %}\
{{'<|head|>' + message['role'] + '\\n' + message['content'] + '<|eot|>' + '\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|head|>assistant\\n' }}{% endif %}\
"""
FAMILIES = {"llama 3": LLAMA_3, "qwen": QWEN, "mistral": MISTRAL, "glm": GLM, "smollm2": SMOL}
USER, ASKED = {"role": "user", "content": "  Höllo,  a table for two? "}, {"role": "user", "content": "And at 7?"}
ANSWER = {"role": "assistant", "content": "<think>hm</think>\n\nYes."}
SYSTEM = {"role": "system", "content": "Be brief. "}
TALKS = {"one": [USER], "told": [SYSTEM, USER], "turns": [SYSTEM, USER, ANSWER, ASKED]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with the special tokens of all the templates."""
    folder = tmp_path_factory.mktemp("families")
    made = Tokenizer.from_file(str(checkpoint() / "tokenizer.json"))
    marks = ["<|head|>", "<|tail|>", "<|eot|>", "[gMASK]", "<sop>", "[INST]", "[/INST]"]
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    made.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "one"))


def configured(folder: Path, **entries: Any) -> Path:
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | entries))
    return folder


@pytest.mark.parametrize("style", FAMILIES)
def test_chats_of_every_style_are_those_of_transformers(folder: Path, style: str) -> None:
    configured(folder, chat_template=FAMILIES[style])
    ours, theirs = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for talk in TALKS.values():
        ids = ours.chat(talk)
        assert ids == theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        assert len(ids) > 10


def test_a_template_that_wants_turns_refuses_others(folder: Path) -> None:
    tokenizer = ChatTokenizer.load(configured(folder, chat_template=MISTRAL))
    with pytest.raises(TemplateError, match="chat template: user and assistant take turns: 1"):
        tokenizer.chat([USER, USER])


def test_tokens_that_a_template_names_have_their_ids(folder: Path) -> None:
    template = "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ eos_token }}{{ nothing_token }}"
    special = {"pad_token": {"content": "<|pad|>", "lstrip": False, "__type": "AddedToken"}, "unk_token": None}
    configured(folder, chat_template=template, **special)
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template([USER])["input_ids"]
    assert ChatTokenizer.load(folder).chat([USER]) == theirs == [0, 2, 1]


@pytest.mark.parametrize("listed", [False, True], ids=["older", "newer"])
def test_the_older_map_of_special_tokens_counts_where_the_newer_list_is_not(folder: Path, listed: bool) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot|>"}}))
    entries = {"chat_template": "{{ eos_token }}"}
    newer = {"added_tokens_decoder": {"1": {"content": "<|end|>", "special": True}}}
    configured(folder, **entries, **(newer if listed else {}))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template([USER])["input_ids"]
    ours = ChatTokenizer.load(folder)
    assert ours.chat([USER]) == theirs == [ours.eos]
    assert ours.decode([ours.eos or 0]) == ""
    assert (ours.eos == 1) == listed


def test_tokens_that_only_the_config_lists_are_added(folder: Path) -> None:
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    entry = {"content": "<|more|>", "single_word": False, "lstrip": False, "rstrip": True, "normalized": False}
    configured(folder, added_tokens_decoder={str(size): entry | {"special": True}}, chat_template="a<|more|>  b")
    ours, theirs = ChatTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.chat([USER]) == theirs.apply_chat_template([USER])["input_ids"]
    assert size in ours.chat([USER])
    configured(folder, added_tokens_decoder={str(size + 5): entry})
    with pytest.raises(ModelError, match=rf"decoder has '<\|more\|>' as {size + 5}, the tokenizer as {size}"):
        ChatTokenizer.load(folder)


@pytest.mark.parametrize("flags", [{"add_eos_token": True}, {"add_bos_token": False}], ids=str)
@pytest.mark.parametrize("marks", [None, "[gMASK] <sop> $A", "<|bos|> $A <|end|>"])
def test_what_goes_around_a_plain_prompt_is_as_in_transformers(
    folder: Path, marks: str | None, flags: dict[str, bool]
) -> None:
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if marks:
        known = [(mark, made.token_to_id(mark)) for mark in marks.split() if mark != "$A"]
        made.post_processor = processors.TemplateProcessing(single=marks, special_tokens=known)
        made.save(str(folder / "tokenizer.json"))
    ours = ChatTokenizer.load(configured(folder, **flags)).encode("a hotel")
    assert ours == AutoTokenizer.from_pretrained(folder)("a hotel")["input_ids"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no such\nrole') }}", "no such role"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{% for x in range(10**9) %}{% endfor %}", "[Rr]ange"),
        ("{{ 1 / 0 }}", "zero"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_a_template_may_refuse_what_it_is_given(template: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason) as refusal:
        ChatTemplate(template, {}).render([USER])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ 'a' * 10**9 }}", "needs more than 512 MiB"),
        ("{% set n = namespace(a='a') %}{% for x in range(60) %}{% set n.a = n.a * 2 %}{% endfor %}", "512 MiB|second"),
        ("{{ 'a' * 10**7 }}", "writes 10,000,000 characters, limit 4,194,304"),
        ("{% for x in range(9**5) %}{% for x in range(9**5) %}{% endfor %}{% endfor %}", "more than a second"),
        ("{{ 10 ** (10**8) }}", "more than a second"),
        ("{{" + "(" * 9000 + ")" * 9000 + "}}", "recursion"),
        ("x" * (1 << 21), "2,097,152 characters, limit 1,048,576"),
    ],
    ids=lambda value: value[:30],
)
def test_a_bad_template_is_a_bad_model(template: str, reason: str) -> None:
    with pytest.raises(ModelError, match=f"^the file: .*{reason}") as refusal:
        ChatTemplate(template, {}, "the file")
    assert "\n" not in str(refusal.value)
    assert ChatTemplate("ok", {}).render([USER]) == "ok"  # the next is not the worse for it


def test_a_loop_that_some_messages_set_off_ends_and_holds_up_nobody_for_long() -> None:
    nested = "{% for x in range(99999) %}{% for x in range(99999) %}{% endfor %}{% endfor %}"
    trap, honest = ChatTemplate("{% if messages | length > 1 %}" + nested + "{% endif %}", {}), ChatTemplate("ok", {})
    found: list[str] = []
    waiting = threading.Thread(target=lambda: found.append(honest.render([USER])))
    assert trap.render([USER]) == ""
    waiting.start()
    with pytest.raises(TemplateError, match="more than a second"):
        trap.render([USER, ANSWER])
    waiting.join()
    assert found == ["ok"]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"chat_template": 5}, "chat_template is a int"),
        ({"chat_template": "{% if %}"}, "tokenizer_config.json: chat_template: Expected"),
        ({"bos_token": 5}, "bos_token is 5, not a token"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder is no list of tokens by id"),
        ({"added_tokens_decoder": {"a": {"content": "b"}}}, "added_tokens_decoder is no list of tokens by id"),
    ],
)
def test_a_bad_tokenizer_config_is_named(folder: Path, entries: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        ChatTokenizer.load(configured(folder, **entries))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\xff\xfe{", "not UTF-8: invalid start byte at byte 0"), (b"x" * (5 << 20), "5,242,880 bytes, limit 4,194,304")],
    ids=["latin", "huge"],
)
def test_a_bad_template_file_is_named(folder: Path, content: bytes, words: str) -> None:
    (configured(folder) / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=rf"chat_template\.jinja: {words}"):
        ChatTokenizer.load(folder)


def test_a_tokenizer_may_have_fewer_tokens_than_the_embedding_has_rows_but_not_more(folder: Path) -> None:
    size = Tokenizer.from_file(str(configured(folder) / "tokenizer.json")).get_vocab_size()
    for rows in (size, size + 100):
        (folder / "config.json").write_text(json.dumps({"vocab_size": rows, "model_type": "llama"}))
        assert ChatTokenizer.load(folder).encode("a hotel")
    (folder / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
    with pytest.raises(ModelError, match=rf"token '</think>' has id {size - 1}, but vocab_size in .* is {size - 1}"):
        ChatTokenizer.load(folder)


def test_a_forked_program_has_a_process_of_its_own() -> None:
    template = ChatTemplate("{{ messages | length }}", {})
    child = os.fork()
    if not child:
        try:
            os._exit(0 if all(template.render([USER] * count) == str(count) for count in range(9)) else 1)
        finally:
            os._exit(2)
    assert all(template.render([USER] * count) == str(count) for count in range(99))
    assert os.waitpid(child, 0)[1] == 0
