"""Time to the first token of a conversation's turns, with what earlier turns computed and without, on the phone and in
the cloud: one process, the memory transport, the built-in pair.

    python benchmarks/prefix.py [--turns 6] [--rounds 5] [--answer 40]

Turns with and without reuse take turns; every figure is the median over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.service import Service
from cloud_server.session import Session
from cloud_server.tokens import Verifier
from edge_agent.agent import Agent, running
from edge_agent.config import AgentConfig
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.link import Link
from protocol.transport.base import Address, Connection, ServerChannel
from protocol.transport.memory import MemoryConnection
from split_model.compute import Compute
from split_model.model import Model
from split_model.prefix import LIFE_S, Prefixes
from split_model.sampling import Sampling
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer

SYSTEM = ("You are the assistant of a small hotel by the sea. Breakfast is from seven to ten in the room behind the "
          "reception, boats leave at nine and at two, and a table for the evening is to be booked before noon. Answer "
          "in one or two short sentences, be polite, and say so when you do not know something. ")  # fmt: skip
QUESTIONS = ("When is breakfast?", "Is there a boat in the afternoon?", "Can I book a table for two this evening?",
             "What should I do until then?", "And if it rains?", "Thank you. Please say all that again.")  # fmt: skip
WAYS = {
    "phone": Wish(Route.LOCAL, quality=Quality.BEST),
    "split at 4": Wish(Route.SPLIT, 4),
    "cloud": Wish(Route.CLOUD, quality=Quality.BEST),
}


async def conversation(agent: Agent, wish: Wish, turns: int, most: int) -> list[tuple[int, int, float]]:
    """Of each turn: tokens of the prompt, how many of them were held, and milliseconds to the first token."""
    tokenizer, found = agent.means.tokenizer, []
    messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(turns):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        prompt = tuple(tokenizer.chat(messages))
        job = Job(os.urandom(16), prompt, most, Sampling(temperature=0.7, seed=turn), (), wish)
        (answer,) = agent.answer(await agent.decide(job), [job])
        messages.append({"role": "assistant", "content": "".join([piece.text async for piece in answer]).strip()})
        outcome = answer.outcome
        assert outcome is not None
        assert outcome.first_token_s is not None
        held = outcome.held_cloud if wish.route is Route.CLOUD else outcome.held_edge
        found.append((len(prompt), held or 0, 1000 * outcome.first_token_s))
        await agent.means.full.compute.call(lambda: None)
    return found


def forget(every: Sequence[Prefixes], keep: bool) -> None:
    for prefixes in every:
        prefixes.forget(lambda owner: True)
        prefixes.life_s = LIFE_S if keep else 0.0


async def measured(turns: int, rounds: int, most: int) -> dict[str, dict[bool, list[list[tuple[int, int, float]]]]]:
    """By way and reuse: the rounds."""
    full, tiny = find_model("assistant-20m"), find_model("assistant-2m")
    found: dict[str, dict[bool, list[list[tuple[int, int, float]]]]] = {way: {True: [], False: []} for way in WAYS}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys.make(folder / "keys", ["localhost"])
        compute = Compute()
        stack.push_async_callback(compute.aclose)
        model = await compute.call(Model.load, full)
        verifier = Verifier(keys.read(folder / "keys"))
        service = Service(ServerConfig(full), model, ChatTokenizer.load(full), compute, verifier)
        service.ready = True
        await service.worker.warm_up(96)

        async def handle(channel: ServerChannel) -> None:
            await Session(service, channel).serve()

        connection = MemoryConnection(handle)
        stack.push_async_callback(connection.aclose)

        async def dial(address: Address) -> Connection:
            return connection

        token = keys.issue(folder / "keys", "phone", 3600)
        config = AgentConfig(tiny, full, state=folder / "state", token=token)
        agent = await stack.enter_async_context(running(config, [Link(Address("memory", 1), dial)]))
        every = (service.prefixes, agent.means.full.prefixes, agent.means.tiny.prefixes)
        for _ in range(rounds + 1):
            for way, wish in WAYS.items():
                for keep in (True, False):
                    forget(every, keep)
                    found[way][keep].append(await conversation(agent, wish, turns, most))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="First tokens of a conversation's turns.")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5, help="beside one that warms up")
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer, at most")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    found = asyncio.run(measured(given.turns, given.rounds, given.answer))
    table = Table(title=f"ms to the first token, {platform.machine()}, {os.cpu_count()} cores")
    for name in ("turn", "prompt", "held", *(f"{way}: {how}" for way in WAYS for how in ("anew", "reused"))):
        table.add_column(name, justify="right")
    for turn in range(given.turns):
        cells = []
        for way in WAYS:
            for keep in (False, True):
                cells.append(f"{statistics.median(one[turn][2] for one in found[way][keep][1:]):.1f}")
        prompt, held, _ = found["cloud"][True][-1][turn]
        table.add_row(str(turn + 1), str(prompt), str(held), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
