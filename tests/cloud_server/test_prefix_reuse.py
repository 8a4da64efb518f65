"""A device's next session computes what is new and gives the same tokens; nobody else finds what it left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_server.keys import issue
from cloud_server.shared import beginning, read_prefix
from cloud_server.tokens import Verifier
from protocol.errors import SessionFault
from protocol.frames import Admitted, Tokens
from split_model.config import ModelError
from split_model.prefix import common
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer
from support.checkpoints import checkpoint
from support.cloud import Cloud, cloud
from support.drafting_phone import drafting, guessing, speculate
from support.phone import Heard, Phone, expected, prompt_of, until

pytestmark = pytest.mark.anyio
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=11)
FIRST, MORE = prompt_of(60), prompt_of(20, 1)


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@pytest.fixture
async def server(key_folder: Path) -> AsyncIterator[Cloud]:
    async with cloud(checkpoint(), keys=key_folder) as made:
        yield made
        assert await made.settled() == (0, 0)
        assert made.service.prefixes.free_slots == made.service.config.slots


@pytest.fixture
def token(key_folder: Path) -> str:
    return issue(key_folder, "mine", 3600)


async def turns(phone: Phone, server: Cloud, token: str, sampling: Sampling, **first: object) -> tuple[Heard, Heard]:
    """Two turns of a conversation, of the right ids."""
    one = await phone.ask(server.connection, FIRST, sampling=sampling, token=token, **first)
    assert one.ids == expected(checkpoint(), FIRST, sampling, len(one.ids))
    longer = (*FIRST, *one.ids, *MORE)
    two = await phone.ask(server.connection, longer, sampling=sampling, token=token)
    assert two.ids == expected(checkpoint(), longer, sampling, 8)
    return one, two


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_a_second_turn_is_the_same_and_computes_what_is_new(
    phone: Phone, server: Cloud, token: str, sampling: Sampling
) -> None:
    one, two = await turns(phone, server, token, sampling)
    assert (one.admitted.held, two.admitted.held) == (0, len(FIRST) + len(one.ids) - 1)
    await server.settled()
    text = server.service.metrics.text().decode()
    assert f'vllm:prefix_cache_hits_total{{model_name="tiny-llama"}} {two.admitted.held:.1f}' in text
    asked = 2 * len(FIRST) + len(one.ids) + len(MORE)
    assert f'vllm:prefix_cache_queries_total{{model_name="tiny-llama"}} {asked:.1f}' in text
    assert server.service.worker.load.tokens == asked - two.admitted.held + len(one.ids) + len(two.ids) - 2


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_drafts_made_here_go_on_from_what_the_tiny_model_holds(
    phone: Phone, key_folder: Path, token: str, sampling: Sampling
) -> None:
    async with cloud(checkpoint(), keys=key_folder, tiny=checkpoint(seed=1), slots=2) as server:
        log = FIRST
        for _ in range(4):
            opened = drafting(phone.open_frame(log, sampling=sampling, max_tokens=12, token=token), 0, 4)
            channel = await server.connection.open()
            await channel.send(opened)
            heard = await phone._converse(channel, opened, list(log))
            await channel.aclose()
            assert heard.ids == expected(checkpoint(), log, sampling, 12)
            log = (*log, *heard.ids, *MORE[:5])
        assert heard.admitted.held > 2 * len(FIRST) - len(FIRST)


async def test_drafts_of_the_phone_that_were_wrong_are_not_kept(phone: Phone, server: Cloud, token: str) -> None:
    right = expected(checkpoint(), FIRST, GREEDY, 16)
    for _ in range(3):
        spoken = await speculate(phone, server.connection, FIRST, guessing(right, len(FIRST), 0.6), ahead=1,
                                 token=token)  # fmt: skip
        assert spoken.ids == right
    longer = (*FIRST, *right, *MORE)
    two = await phone.ask(server.connection, longer, token=token)
    assert two.ids == expected(checkpoint(), longer, GREEDY, 8)
    assert two.admitted.held == len(FIRST) + len(right) - 1


async def test_another_device_finds_nothing(phone: Phone, server: Cloud, token: str, key_folder: Path) -> None:
    await phone.ask(server.connection, FIRST, token=token)
    other = await phone.ask(server.connection, FIRST, token=issue(key_folder, "other", 3600))
    assert other.admitted.held == 0
    assert server.service.worker.load.tokens == 2 * (len(FIRST) + 7)
    again = await phone.ask(server.connection, FIRST, token=token)
    assert again.admitted.held == len(FIRST) - 1
    assert again.ids == other.ids == expected(checkpoint(), FIRST, GREEDY, 8)


async def test_without_keys_every_session_is_a_stranger(phone: Phone) -> None:
    async with cloud(checkpoint()) as server:
        for _ in range(2):
            assert (await phone.ask(server.connection, FIRST)).admitted.held == 0
        assert server.service.prefixes.cache.free_slots == 4
        assert not server.service.prefixes.cache.memory.any()


@pytest.mark.parametrize("split", [1, 5])
async def test_hidden_states_leave_nothing_and_find_nothing(phone: Phone, server: Cloud, token: str,
                                                            split: int) -> None:  # fmt: skip
    one = await phone.ask(server.connection, FIRST, token=token, split=split)
    assert server.service.prefixes.cache.free_slots == 4
    assert not server.service.prefixes.cache.memory.any()
    assert (await phone.ask(server.connection, FIRST, token=token)).admitted.held == 0
    two = await phone.ask(server.connection, FIRST, token=token, split=split)
    assert two.admitted.held == 0
    assert one.ids == two.ids == expected(checkpoint(), FIRST, GREEDY, 8)


async def test_what_was_evicted_is_computed_again(phone: Phone, key_folder: Path, token: str) -> None:
    async with cloud(checkpoint(), keys=key_folder, slots=1) as server:
        one = await phone.ask(server.connection, FIRST, token=token)
        await phone.ask(server.connection, MORE, token=issue(key_folder, "other", 3600))
        longer = (*FIRST, *one.ids, *MORE)
        two = await phone.ask(server.connection, longer, token=token)
        assert two.admitted.held == 0
        assert two.ids == expected(checkpoint(), longer, GREEDY, 8)


@pytest.mark.parametrize("slots", [2, 4])
async def test_sessions_of_one_device_at_once(phone: Phone, key_folder: Path, token: str, slots: int) -> None:
    async with cloud(checkpoint(), keys=key_folder, slots=slots) as server:
        one = await phone.ask(server.connection, FIRST, token=token)
        logs = [(*FIRST, *one.ids, *prompt_of(9, seed)) for seed in range(6)]
        heard = await asyncio.gather(*(phone.ask(server.connection, log, token=token) for log in logs))
        for log, each in zip(logs, heard, strict=True):
            assert each.ids == expected(checkpoint(), log, GREEDY, 8)
        assert sum(each.admitted.held > 0 for each in heard) == 1
        await server.settled()
        assert server.service.prefixes.free_slots == slots


async def test_a_cancelled_session_leaves_what_it_computed(phone: Phone, server: Cloud, token: str) -> None:
    right = expected(checkpoint(), FIRST, SAMPLED, 30)
    channel = await server.connection.open()
    await channel.send(phone.open_frame(FIRST, sampling=SAMPLED, max_tokens=30, token=token))
    assert isinstance(await until(channel, Tokens), Tokens)
    await channel.aclose()
    await server.settled()
    resumed = await phone.ask(server.connection, FIRST, sampling=SAMPLED, max_tokens=30, token=token,
                              delivered=right[:1])  # fmt: skip
    assert resumed.ids == right[1:]
    assert resumed.admitted.held == len(FIRST)


async def test_a_higher_attempt_goes_on_with_what_the_running_one_has(phone: Phone, server: Cloud,
                                                                      token: str) -> None:  # fmt: skip
    right, request = expected(checkpoint(), FIRST, SAMPLED, 30), bytes(range(16))
    channel = await server.connection.open()
    await channel.send(phone.open_frame(FIRST, sampling=SAMPLED, max_tokens=30, token=token, request_id=request))
    await until(channel, Tokens)
    heard = await phone.ask(server.connection, FIRST, sampling=SAMPLED, max_tokens=30, token=token,
                            delivered=right[:1], request_id=request, attempt=2)  # fmt: skip
    assert heard.ids == right[1:]
    await channel.aclose()
    longer = (*FIRST, *right, *MORE)
    two = await phone.ask(server.connection, longer, sampling=SAMPLED, token=token)
    assert two.ids == expected(checkpoint(), longer, SAMPLED, 8)
    assert two.admitted.held == len(FIRST) + 29


async def test_a_step_that_fails_leaves_nothing(
    phone: Phone, server: Cloud, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(step: object) -> list[int]:
        raise RuntimeError("a bad step")

    with monkeypatch.context() as broken:
        broken.setattr(server.service._engine, "run", fail)
        with pytest.raises(SessionFault, match="the step failed"):
            await phone.ask(server.connection, FIRST, token=token)
    assert server.service.prefixes.cache.free_slots == 4
    assert (await phone.ask(server.connection, FIRST, token=token)).ids == expected(checkpoint(), FIRST, GREEDY, 8)


async def test_a_session_that_may_have_to_wait_is_promised_nothing(phone: Phone, key_folder: Path, token: str) -> None:
    async with cloud(checkpoint(), keys=key_folder, slots=1) as server:
        await phone.ask(server.connection, FIRST, token=token)
        channel = await server.connection.open()
        await channel.send(phone.open_frame(MORE, max_tokens=200, token=issue(key_folder, "other", 3600)))
        await until(channel, Tokens)
        asked = asyncio.create_task(phone.ask(server.connection, FIRST, token=token))
        waiting = await server.connection.open()
        await waiting.send(phone.open_frame(FIRST, token=token))
        admitted = await until(waiting, Admitted)
        assert isinstance(admitted, Admitted)
        assert admitted.held == 0
        await waiting.aclose()
        await channel.aclose()
        assert (await asked).ids == expected(checkpoint(), FIRST, GREEDY, 8)


async def test_what_a_revoked_device_left_is_zeroed(phone: Phone, server: Cloud, token: str) -> None:
    await phone.ask(server.connection, FIRST, token=token)
    verifier = server.service.verifier
    assert isinstance(verifier, Verifier)
    trusted = verifier.trusted
    verifier.take(type(trusted)(trusted.keys, {"other": 1e12}, trusted.signer))
    await server.settled()
    assert server.service.prefixes.cache.free_slots == 3
    verifier.take(type(trusted)(trusted.keys, {"mine": 1e12}, trusted.signer))
    await server.settled()
    assert server.service.prefixes.cache.free_slots == 4
    assert not server.service.prefixes.cache.memory.any()


SYSTEM = "You are a brief assistant at the hotel table.\nAnswer in one line."


@pytest.mark.parametrize("slots", [1, 3])
async def test_the_operator_s_prefix_is_everybody_s(phone: Phone, tmp_path: Path, slots: int) -> None:
    tokenizer = ChatTokenizer.load(checkpoint())
    file = tmp_path / "system.txt"
    file.write_text(SYSTEM + "\n")
    length = len(beginning(tokenizer, SYSTEM, 1024))
    async with cloud(checkpoint(), slots=slots, shared_prefix=file) as server:  # type: ignore[arg-type]
        await server.service.share(read_prefix(file))
        for words in ("how are you", "And you?"):
            said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": words}]
            prompt = tuple(tokenizer.chat(said))
            heard = await phone.ask(server.connection, prompt, sampling=SAMPLED)
            assert heard.ids == expected(checkpoint(), prompt, SAMPLED, 8)
            assert heard.admitted.held == length > 10
        assert (await phone.ask(server.connection, FIRST)).admitted.held == 0
        assert server.service.prefixes.free_slots == slots


def test_a_shared_prefix_is_where_chats_with_that_message_begin() -> None:
    tokenizer = ChatTokenizer.load(checkpoint())
    found = beginning(tokenizer, SYSTEM, 1024)
    system = {"role": "system", "content": SYSTEM}
    for words in ("", "x", "tell me of boats", "\n\n", "中"):
        ids = tuple(tokenizer.chat([system, {"role": "user", "content": words}]))
        assert common(found, ids) == len(found)
    assert SYSTEM in tokenizer.decode(found)


def test_bad_shared_prefixes_are_refused(tmp_path: Path) -> None:
    tokenizer, file = ChatTokenizer.load(checkpoint()), tmp_path / "system.txt"
    with pytest.raises(ModelError, match=r"system\.txt: No such file"):
        read_prefix(file)
    file.write_bytes(b"ok \xff")
    with pytest.raises(ModelError, match=r"system\.txt: not UTF-8 at byte 3"):
        read_prefix(file)
    file.write_text(" \n")
    with pytest.raises(ModelError, match="2 bytes of text, must be 1 to 1048576"):
        read_prefix(file)
    with pytest.raises(ModelError, match=r"--shared-prefix: \d+ tokens, limit 20"):
        beginning(tokenizer, SYSTEM, 40)
