"""The command `edge-agent`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.process import LogFormat, Signals, add_flags, announce, check_flags, set_up_logging, settle
from split_model.settings import PRECISIONS, Precision

if TYPE_CHECKING:
    from edge_agent.client import AgentPlace
    from edge_agent.config import AgentConfig

log = logging.getLogger("edge_agent")
TINY, FULL = "assistant-2m", "assistant-20m"
LEAST_CONTEXT = 16  # positions
URL = "http://127.0.0.1:8080"
REPLAYED = (
    ("--rtt-ms", "MS", "round trip"),
    ("--up-mbit", "N", "rate of the path up"),
    ("--down-mbit", "N", "and down"),
    ("--cloud-wait-s", "S", "in the cloud's queue"),
    ("--edge-rate-factor", "X", "the phone so many times as fast"),
    ("--cloud-rate-factor", "X", "the cloud so many times as fast"),
    ("--governor", "X", "the share of the phone's rate that its energy governor leaves, to 1"),
    ("--alpha", "A", "weight of network time against compute time, 0 to 1"),
    ("--price-per-mb", "S", "seconds that a megabyte is worth"),
)  # what may be other than it was recorded


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except (OSError, ValueError) as error:
        print(f"edge-agent: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge-agent", description="Answer on the phone, in the cloud, or by both.")
    commands = parser.add_subparsers(required=True)

    serve = commands.add_parser("serve", help="run the agent and its OpenAI-compatible endpoint")
    where = serve.add_mutually_exclusive_group(required=True)
    where.add_argument("--cloud", action="append", metavar="HOST:PORT", help="a replica; may be given several times")
    where.add_argument("--no-cloud", action="store_true", help="answer on the phone only")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8080)
    serve.add_argument("--unix", type=Path, metavar="PATH", help="listen on a Unix socket instead of a port")
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME[:PORT]",
                       help="a further name that clients may call the agent by")  # fmt: skip
    serve.add_argument("--api-key-file", type=Path, metavar="FILE", help="a key that clients must show, mode 0600")
    serve.add_argument("--ca", type=Path, metavar="FILE", help="PEM of the CA that certified the replicas")
    serve.add_argument("--fingerprint", metavar="SHA256", help="of that CA, instead of --ca: it is then fetched once")
    serve.add_argument("--token-file", type=Path, metavar="FILE", help="this device's token, mode 0600; kept renewed")
    serve.add_argument("--token-url", action="append", default=[], metavar="URL",
                       help="where to renew it (https://CLOUD:8000/v1/token)")  # fmt: skip
    serve.add_argument("--tiny", default=TINY, metavar="NAME|DIR", help="built-in name, checkpoint directory or hub id")
    serve.add_argument("--full", default=FULL, metavar="NAME|DIR")
    for flag, whose in (("--precision", "the full model's layers"), ("--tiny-precision", "the tiny model")):
        serve.add_argument(flag, choices=[one.value for one in Precision], metavar="P",
                           help=f"how {whose} here are held: {PRECISIONS}")  # fmt: skip
    serve.add_argument("--edge-layers", type=int, metavar="N",
                       help="of the full one to hold here (default: those packed, all of a built-in one)")  # fmt: skip
    serve.add_argument("--state", type=Path, metavar="DIR", help="tickets and measurements (~/.local/state/tandem)")
    serve.add_argument("--alpha", type=float, default=0.5, help="weight of network time against compute time, 0 to 1")
    serve.add_argument("--hidden-bits", type=int, choices=(8, 16), default=16,
                       help="of a prompt's hidden states in a split; 8 halve the bytes, not exact")  # fmt: skip
    serve.add_argument("--price-per-mb", type=float, default=0.0, metavar="S",
                       help="seconds that a megabyte is worth on a metered link")  # fmt: skip
    serve.add_argument("--power-limit", type=float, metavar="W",
                       help="near it the phone works slower (default: 5 on battery, else what RAPL says)")  # fmt: skip
    serve.add_argument("--temperature-limit", type=float, metavar="C",
                       help="likewise, counted from 25 °C (default: what the sensors call high)")  # fmt: skip
    serve.add_argument("--context", type=int, metavar="N", help="of a conversation (default: the models' own)")
    serve.add_argument("--threads", type=int, help="of the compute pool (default: the fast physical cores)")
    add_flags(serve, "answers", drain_s=10.0)
    serve.set_defaults(run=_serve)

    pack = commands.add_parser("pack", help="write the part of a model that a phone needs")
    pack.add_argument("--model", required=True, metavar="NAME|DIR",
                      help="built-in name, checkpoint directory or hub id")  # fmt: skip
    pack.add_argument("--split", type=int, metavar="N", help="layers the phone is to hold (default: the whole model)")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    pack.add_argument("--precision", choices=("fp32", "bf16", "int8", "int4"), default="bf16", help="to be stored in")
    pack.set_defaults(run=_pack)

    for name, run, text in (("ask", _ask, "ask a running agent, and print its answer as it comes"),
                            ("plan", _plan, "show how a running agent scores a question")):  # fmt: skip
        command = commands.add_parser(name, help=text)
        command.add_argument("question")
        _add_request(command)
        command.set_defaults(run=run)

    talk = commands.add_parser("chat", help="talk with a running agent in the terminal; /help there says how")
    talk.add_argument("--system", metavar="TEXT", help="said to the model before the conversation")
    _add_request(talk)
    talk.set_defaults(run=_chat)

    decisions = commands.add_parser("decisions", help="show what a running agent decided lately, and what came of it")
    _add_place(decisions)
    decisions.add_argument("--limit", type=int, default=20, metavar="N", help="the latest so many, at most 256")
    decisions.add_argument(
        "--jsonl", action="store_true", help="a line of JSON for each, for `replay`: no word of them"
    )
    decisions.set_defaults(run=_decisions)

    again = commands.add_parser("replay", help="score recorded decisions under other conditions, without an agent")
    again.add_argument("file", type=Path, help="lines of JSON from `decisions --jsonl`")
    for flag, metavar, text in REPLAYED:
        again.add_argument(flag, type=float, metavar=metavar, help=text)
    again.add_argument("--any-route", action="store_true", help="also where a route was asked for by name")
    again.set_defaults(run=_replay)
    return parser


def _add_place(command: argparse.ArgumentParser) -> None:
    """Where the agent is."""
    command.add_argument("--url", default=URL, help="the agent's address")
    command.add_argument("--unix", type=Path, metavar="PATH", help="the agent's Unix socket, if it has one")
    command.add_argument("--api-key-file", type=Path, metavar="FILE", help="the key that the agent wants")


def _add_request(command: argparse.ArgumentParser) -> None:
    """Where the agent is, and what is asked of it."""
    _add_place(command)
    command.add_argument("--model", default="tandem")
    command.add_argument("--route", choices=("auto", "local", "cloud", "split", "speculative"), default="auto")
    command.add_argument("--split", type=int)
    command.add_argument("--draft", type=int, metavar="N", help="tokens to draft at a time, at most")
    command.add_argument("--deadline-ms", type=float, metavar="MS", help="for the whole answer, as predicted")
    command.add_argument("--max-bytes", type=int, metavar="N", help="up and down, as predicted")
    command.add_argument("--quality", choices=("fast", "balanced", "best"), default="balanced")
    command.add_argument("--privacy", choices=("any", "device"), default="any")
    command.add_argument("--hidden-bits", type=int, choices=(8, 16), help="instead of the agent's own")
    command.add_argument("--sparse", action="store_const", const=True, help="read parts of a long context, not exact")
    command.add_argument("--max-tokens", type=int, default=256)
    command.add_argument("--temperature", type=float, default=0.0)
    command.add_argument("--seed", type=int)


def _config(given: argparse.Namespace) -> AgentConfig:
    """Raises ValueError or OSError that names the argument."""
    from edge_agent.config import AgentConfig, default_state
    from edge_agent.credentials import normal_fingerprint, pinned_ca, read_token, token_urls, trust_in
    from edge_agent.local_rules import LocalRules
    from protocol.transport.base import Address
    from split_model.part import Part
    from split_model.source import find_model

    if given.cloud and (given.ca is None) == (given.fingerprint is None):
        raise ValueError("--cloud needs --ca or --fingerprint, and not both: they say which servers to trust")
    if not 0 <= given.alpha <= 1:
        raise ValueError(f"--alpha {given.alpha}, must be 0 to 1")
    if not 0 <= given.price_per_mb < math.inf:
        raise ValueError(f"--price-per-mb {given.price_per_mb:g}, must be 0 or more seconds")
    if given.context is not None and given.context < LEAST_CONTEXT:
        raise ValueError(f"--context {given.context}, must be {LEAST_CONTEXT} positions or more")
    if given.power_limit is not None and not 0 < given.power_limit < math.inf:
        raise ValueError(f"--power-limit {given.power_limit:g}, must be more than 0 watts")
    if given.temperature_limit is not None and not 30 <= given.temperature_limit <= 120:
        raise ValueError(f"--temperature-limit {given.temperature_limit:g}, must be 30 to 120 °C")
    check_flags(given)
    LocalRules(given.host, given.port, given.allow_host)  # or it would be refused only when the models are loaded
    full, edge_layers = find_model(given.full), given.edge_layers
    if edge_layers is None and given.full != FULL and Part.read(full) is None:
        edge_layers = 0
    ca = given.ca.read_bytes() if given.ca else b""
    if given.ca and b"-----BEGIN CERTIFICATE-----" not in ca:
        raise ValueError(f"--ca {given.ca} holds no PEM certificate")
    clouds = tuple(Address.parse(one) for one in given.cloud or ())
    urls = token_urls(given.token_url, [str(Address(host, 8000)) for host in dict.fromkeys(one.host for one in clouds)])
    state = given.state or default_state()
    if given.cloud and given.fingerprint:
        ca = asyncio.run(pinned_ca(urls, normal_fingerprint(given.fingerprint), state))
    if ca:
        trust_in(ca)
    return AgentConfig(
        tiny=find_model(given.tiny),
        full=full,
        clouds=clouds,
        host=given.host,
        port=given.port,
        ca=ca,
        token=read_token(given.token_file) if given.token_file else "",
        token_file=given.token_file,
        token_urls=urls if given.token_file else (),
        precision=given.precision and Precision(given.precision),
        tiny_precision=given.tiny_precision and Precision(given.tiny_precision),
        edge_layers=edge_layers,
        state=state,
        alpha=given.alpha,
        hidden_bits=given.hidden_bits,
        price_s_per_mb=given.price_per_mb,
        power_limit_w=given.power_limit,
        temperature_limit=given.temperature_limit,
        context=given.context,
        threads=given.threads,
        drain_s=given.drain,
        unix=given.unix,
        allow_hosts=tuple(given.allow_host),
        api_key=read_token(given.api_key_file) if given.api_key_file else "",
    )


def _serve(given: argparse.Namespace) -> int:
    from split_model.config import ModelError

    set_up_logging(given.log_format, given.log_level)
    # oneDNN keeps the code it compiles for every shape, 1,024 of them if not told otherwise: 20 MB on this phone
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # and torch as many again of its own: benchmarks/resident.py
    try:
        return asyncio.run(_run(_config(given), given.log_format))
    except ModelError as error:
        raise ValueError(error) from None


async def _run(config: AgentConfig, style: LogFormat) -> int:
    from edge_agent.server import serving

    signals, stop = Signals(), asyncio.Event()
    async with serving(config) as server:
        signals.ready(stop.set)
        settle()
        pair = server.agent.pair
        clouds = ", ".join(str(one) for one in config.clouds) or "none"
        announce(
            log,
            style,
            f"{'unix' if config.unix else 'http'}://{server.address}/v1 answers with {pair.tiny.name} and "
            f"{pair.full.name} ({pair.edge_layers} of {pair.full.layers} layers here), clouds: {clouds}",
        )
        await stop.wait()
        log.info("draining: %d answers have %g s to finish", len(server.agent.under_way), config.drain_s)
        left = await server.drain(config.drain_s, signals.hurried)
        if left:
            log.warning("%d answers cancelled at the deadline", left)
    return 0


def _place(given: argparse.Namespace) -> AgentPlace:
    from edge_agent.client import AgentPlace
    from edge_agent.credentials import read_token

    return AgentPlace(given.url, given.unix, read_token(given.api_key_file) if given.api_key_file else "")


def _pack(given: argparse.Namespace) -> int:
    from edge_agent import packing

    return packing.run(given)


def _ask(given: argparse.Namespace) -> int:
    from edge_agent import client

    return client.ask(_place(given), client.body(given))


def _plan(given: argparse.Namespace) -> int:
    from edge_agent import client

    return client.plan(_place(given), client.body(given))


def _chat(given: argparse.Namespace) -> int:
    from edge_agent import chat, client

    return chat.chat(_place(given), client.settings(given), given.system)


def _decisions(given: argparse.Namespace) -> int:
    from edge_agent import client

    return client.decisions(_place(given), given.limit, given.jsonl)


def _replay(given: argparse.Namespace) -> int:
    from edge_agent import replay

    return replay.replay(given.file, replay.Changes.read(given))


if __name__ == "__main__":
    sys.exit(main())
