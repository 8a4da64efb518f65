"""Schedules of what goes wrong while one answer is carried, and what is seen when one is played."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from edge_agent.runs.session import SUSPICION_S, SUSPICION_TRIPS
from protocol.limits import PING_AFTER
from split_model.sampling import Sampling
from support.phone import GREEDY
from support.virtual import run
from support.virtual_network import Network, Weather
from support.virtual_world import Asked, World, world

CLEAR = Weather()


class Start(Enum):
    """How well the phone knows the replica when it asks."""

    COLD = auto()
    TICKET = auto()
    WARM = auto()


@dataclass(frozen=True, slots=True)
class Schedule:
    """Times are seconds from the request. `dead` are hosts without power, from when to when."""

    up: Weather = CLEAR
    down: Weather = CLEAR
    start: Start = Start.COLD
    split: int = 0
    draft: int = 0  # tokens at a time, by a tiny model on the phone
    prompt: int = 17
    tokens: int = 10
    sampling: Sampling = GREEDY
    rebinds: tuple[float, ...] = ()
    dead: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    replicas: int = 1
    grpc: bool = False
    seed: int = 1

    @property
    def calm(self) -> Schedule:
        """The same request with nothing going wrong."""
        return replace(self, up=self.up.calm, down=self.down.calm, rebinds=(), dead={}, seed=1)

    def explained_s(self, harmed: int) -> float:
        """Seconds more than in a calm run that this schedule explains, with so many datagrams harmed in daylight.

        For each of those a probe and its answer; for darkness and a dead host also suspicion and a new handshake; for a
        rebinding the ping that shows it, and the proof of the new address.
        """
        rtt = self.up.delay_s + self.down.delay_s + self.up.jitter_s + self.down.jitter_s
        probe, again = 0.25 + 2 * rtt, max(SUSPICION_S, SUSPICION_TRIPS * rtt) + 4 * rtt
        darkness = sum(end - begin + again for begin, end in self.up.blackholes)
        return harmed * probe + darkness + len(self.dead) * 2 * again + len(self.rebinds) * (PING_AFTER + probe)


@dataclass(frozen=True, slots=True)
class Played:
    """What was seen; `left` and `beyond` are to be empty."""

    asked: Asked
    left: list[str]
    beyond: list[str]
    ups: int  # datagrams
    downs: int
    harmed: int  # of them, while the link was not dark

    def faults(self) -> list[str]:
        """What must not be, whatever the schedule."""
        wrong = [] if self.asked.right else [f"{self.asked.ids} instead of {self.asked.wanted}"]
        return wrong + self.left + self.beyond


def play(schedule: Schedule) -> Played:
    """One answer by this schedule, in virtual time."""

    async def scene() -> Played:
        network = Network(schedule.up, schedule.down, schedule.seed)
        async with world(network, schedule.replicas, schedule.grpc) as made:
            await _meet(made, schedule.start)
            network.begin()
            network.dead = {network.host(name): when for name, when in schedule.dead.items()}
            for at in schedule.rebinds:
                asyncio.get_running_loop().call_later(at, network.rebind)
            prompt = tuple(range(3, 3 + schedule.prompt))
            asked = await made.ask(prompt, schedule.tokens, schedule.split, schedule.sampling, schedule.draft)
            ups, downs = network.up.carried, network.down.carried
            harmed = network.up.harmed + network.down.harmed
            return Played(asked, await made.left(), network.beyond, ups, downs, harmed)

    return run(scene, schedule.seed)


async def _meet(made: World, start: Start) -> None:
    if start is Start.COLD:
        return
    for link in made.links.links:
        await link.probe()
        await asyncio.sleep(1.0)  # for its ticket to come
        link.observe()
        if start is Start.TICKET:
            await link.dialler.aclose()
    await asyncio.sleep(1.0)
